"""Who may call a method, as its contract declares in `(mesh.common.v1.policy)`. Refuses to build for a method that declares nothing."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pool

from mesh.common.v1 import error_reason_pb2, policy_pb2
from services.kernel.errors import Forbidden, MeshError, Unauthenticated
from services.kernel.request_context import EXTERNAL, RequestScope, required_scope
from services.kernel.rpc import metadata as keys
from services.kernel.rpc.interceptor import Behavior, Deserializer, MeshInterceptor, Method

REQUIRED = policy_pb2.TENANT_REQUIREMENT_REQUIRED
NONE = policy_pb2.TENANT_REQUIREMENT_NONE
OPERATOR = policy_pb2.TENANT_REQUIREMENT_OPERATOR
_MAX_REASON_LENGTH = 500

_CALLER_WORDS = {EXTERNAL: "callers from outside the mesh"}


class PolicyMissing(Exception):
    """A method's contract does not say who may call it; the server must not start."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The parsed option of one method."""

    tenant: int
    callers: frozenset[str]
    scopes: tuple[str, ...]


def policies_of(services: Iterable[str]) -> dict[str, Policy]:
    """Reads the policy of every method of the named services, by path. Raises: PolicyMissing naming each method without one."""
    policies: dict[str, Policy] = {}
    missing: list[str] = []
    for service in services:
        for method in descriptor_pool.Default().FindServiceByName(service).methods:
            option = method.GetOptions().Extensions[policy_pb2.policy]
            path = f"/{service}/{method.name}"
            if option.tenant not in (REQUIRED, NONE, OPERATOR) or not option.callers:
                missing.append(path)
            policies[path] = Policy(option.tenant, frozenset(option.callers), tuple(option.scopes))
    if missing:
        msg = f"no (mesh.common.v1.policy) with a tenant requirement and callers on: {', '.join(missing)}"
        raise PolicyMissing(msg)
    return policies


class PolicyInterceptor(MeshInterceptor):
    """Enforces the methods' policies on proven callers."""

    def __init__(self, policies: dict[str, Policy]) -> None:
        super().__init__()
        self._policies = policies

    def wrap(self, method: Method, inner: Behavior, deserialize: Deserializer | None) -> Behavior:
        """Returns the behaviour that runs only for callers the policy admits."""
        policy = self._policies.get(method.path)
        if policy is None:
            msg = f"{method.path} is served but its service was not named to the server"
            raise PolicyMissing(msg)

        async def admitted(request: Any, context: Any) -> Any:
            refuse_unlisted(policy, required_scope())
            return await inner(request, context)

        return admitted


def refuse_unlisted(policy: Policy, call: RequestScope) -> None:
    """Raises the MeshError that says what the policy misses in this call; returns when it misses nothing."""
    if call.caller not in policy.callers:
        raise _not_allowed(call)
    _refuse_tenant(policy, call)
    if policy.scopes and call.caller == EXTERNAL:
        held = call.tenant.scopes if call.tenant is not None else frozenset[str]()
        for wanted in policy.scopes:
            if wanted not in held:
                raise Forbidden(
                    error_reason_pb2.ERROR_REASON_SCOPE_MISSING,
                    f"your credential lacks the scope {wanted}; use one that has it",
                    scope=wanted,
                )


def _refuse_tenant(policy: Policy, call: RequestScope) -> None:
    match policy.tenant:
        case policy_pb2.TENANT_REQUIREMENT_REQUIRED:
            _refuse_without_tenant(call)
        case policy_pb2.TENANT_REQUIREMENT_NONE:
            if call.caller != EXTERNAL:
                _refuse_tenant_metadata(call)
        case policy_pb2.TENANT_REQUIREMENT_OPERATOR:
            if call.tenant is None or not call.tenant.operator:
                raise _operators_only(call)
            _refuse_without_reason(call)
        case _:
            raise PolicyMissing(call.method)


def _refuse_without_tenant(call: RequestScope) -> None:
    if call.tenant is None:
        raise Unauthenticated(
            error_reason_pb2.ERROR_REASON_CREDENTIAL_MISSING,
            "the method acts for a tenant and none was proven; send x-tenant-context",
        )
    if call.tenant.tenant_id is None:
        raise keys.invalid(keys.TENANT_ID, "must name the tenant the operator acts for")
    if call.tenant.operator and call.caller == EXTERNAL:
        _refuse_without_reason(call)


def _refuse_tenant_metadata(call: RequestScope) -> None:
    for key in (keys.TENANT_ID, keys.TENANT_CONTEXT):
        if key in call.metadata:
            refusal = keys.invalid(key, "is not taken by this method: a batch names its tenants itself")
            refusal.reason = error_reason_pb2.ERROR_REASON_TENANT_NOT_TAKEN
            raise refusal


def _refuse_without_reason(call: RequestScope) -> None:
    reason = call.metadata.get(keys.OPERATOR_REASON, "").strip()
    if not 1 <= len(reason) <= _MAX_REASON_LENGTH:
        raise Forbidden(
            error_reason_pb2.ERROR_REASON_OPERATOR_REASON_MISSING,
            f"say why you act, in 1 to {_MAX_REASON_LENGTH} characters, as x-operator-reason",
        )


def _operators_only(call: RequestScope) -> MeshError:
    yours = "your credential is none" if call.tenant is None else "your credential is a tenant's"
    return Forbidden(
        error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED,
        f"{call.method} is for operators and {yours}; send an operator's key, and why you act as {keys.OPERATOR_REASON}",
        caller=call.caller,
        method=call.method,
        needs="operator",
    )


def _not_allowed(call: RequestScope) -> MeshError:
    return Forbidden(
        error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED,
        f"{call.method} is not for {_CALLER_WORDS.get(call.caller, call.caller)}; `describe` its service to see who may call it",
        caller=call.caller,
        method=call.method,
    )
