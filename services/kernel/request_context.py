"""What is known about the call in hand, in one context variable: set by the interceptors, read by servicers, logs and outbound calls.

One variable with one mutable scope, not one variable a fact: setting a context variable per fact costs more than the rest of the edge.
"""

import time
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING
from uuid import UUID

from services.kernel.ids import TenantId
from services.kernel.tenant_context import TenantContext

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.kernel.telemetry.trace_parent import TraceParent

EXTERNAL = "external"


@dataclass(slots=True)
class RequestScope:
    """The facts of one call. Only interceptors and `bind_*` write it."""

    method: str = ""
    # Carries bearers and tokens: never part of a repr, which a traceback may print.
    metadata: dict[str, str] = field(default_factory=dict, repr=False)
    # The same as it came: a key may stand in it twice. grpc builds it anew each time it is asked.
    raw_metadata: "Sequence[tuple[str, str | bytes]]" = field(default=(), repr=False)
    peer_address: str = ""
    caller: str = ""
    tenant: TenantContext | None = None
    deadline: float | None = None
    client_call_id: UUID | None = None
    call_id: UUID | None = None
    trace: "TraceParent | None" = None


_scope: ContextVar[RequestScope | None] = ContextVar("mesh_request_scope", default=None)


def scope() -> RequestScope | None:
    """Returns the scope of the call in hand; None outside of one."""
    return _scope.get()


def enter_scope(new: RequestScope) -> Token[RequestScope | None]:
    """Begins a scope. Each RPC runs in its own task, so the server needs no reset."""
    return _scope.set(new)


def required_scope() -> RequestScope:
    """Returns the scope of the call in hand. Raises: RuntimeError outside of one."""
    found = _scope.get()
    if found is None:
        msg = "no call is in hand: background work starts with bind_tenant(context)"
        raise RuntimeError(msg)
    return found


def current_tenant() -> TenantContext:
    """Returns the proven tenant context. Raises: RuntimeError when the method takes none, which is a fault of the caller's code."""
    tenant = maybe_tenant()
    if tenant is None:
        msg = "the call in hand has no tenant: its policy does not require one"
        raise RuntimeError(msg)
    return tenant


def current_tenant_id() -> TenantId:
    """Returns the proven tenant's id. Raises: RuntimeError when the method's policy admitted a call without one."""
    tenant_id = current_tenant().tenant_id
    if tenant_id is None:
        msg = "the call in hand names no tenant: its policy does not require one"
        raise RuntimeError(msg)
    return tenant_id


def maybe_tenant() -> TenantContext | None:
    """Returns the proven tenant context, or None where there is none."""
    found = _scope.get()
    return None if found is None else found.tenant


def current_caller() -> str:
    """Returns the calling service's name, or `external`."""
    return required_scope().caller


def current_peer_address() -> str:
    """Returns the caller's network address without its port, such as `10.1.2.3`; empty outside of a call."""
    found = _scope.get()
    return "" if found is None else found.peer_address


def current_deadline() -> float | None:
    """Returns when the call must be answered, on time.monotonic(); None when the caller set no deadline."""
    found = _scope.get()
    return None if found is None else found.deadline


def remaining_seconds(default: float) -> float:
    """Returns how long the call may still take: 0.0 when over, `default` when it has no deadline."""
    deadline = current_deadline()
    return default if deadline is None else max(0.0, deadline - time.monotonic())


def client_call_id() -> UUID | None:
    """Returns the id the caller gave the call in `x-request-id`, if any."""
    found = _scope.get()
    return None if found is None else found.client_call_id


def operator_reason() -> str:
    """Returns `x-operator-reason`; empty when the caller gave none."""
    found = _scope.get()
    return "" if found is None else found.metadata.get("x-operator-reason", "")


def tenant_host() -> str:
    """Returns `x-tenant-host`, the host a front end was called by; empty when none was told."""
    found = _scope.get()
    return "" if found is None else found.metadata.get("x-tenant-host", "")


def tenant_path() -> str:
    """Returns the first two segments of `x-tenant-path`, such as `/t/acme`: the rest names no tenant, and answers are kept by this text."""
    found = _scope.get()
    path = "" if found is None else found.metadata.get("x-tenant-path", "")
    return "/".join(path.partition("?")[0].partition("#")[0].split("/", 3)[:3])


def bind_call_id(call_id: UUID) -> None:
    """Names the call in hand, for its logs and its outbound calls."""
    required_scope().call_id = call_id


class Binding:
    """A scope that is already in force; as a context manager it ends with the block."""

    __slots__ = ("_token",)

    def __init__(self, token: Token[RequestScope | None]) -> None:
        self._token = token

    def __enter__(self) -> None:
        """Nothing is left to do: the scope began when it was bound."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _scope.reset(self._token)


def bind_tenant(context: TenantContext, *, call_id: UUID | None = None, deadline: float | None = None) -> Binding:
    """Starts a scope for work in the name of a tenant, in the trace at hand: at once, and until the block ends if used with `with`."""
    outer = _scope.get()
    trace = None if outer is None else outer.trace
    return Binding(enter_scope(RequestScope(tenant=context, call_id=call_id, deadline=deadline, trace=trace)))
