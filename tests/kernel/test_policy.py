"""What a policy asks of a proven caller."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from mesh.common.v1 import lifecycle_service_pb2_grpc
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.errors import MeshError
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.request_context import EXTERNAL, RequestScope
from services.kernel.rpc.policy import NONE, OPERATOR, REQUIRED, Policy, PolicyMissing, policies_of, refuse_unlisted
from services.kernel.rpc.server import MeshServer
from services.kernel.tenant_context import TenantContext
from tests.kernel.mesh import LIFECYCLE, KeyringResolver, Keys, settings_of

TENANT = TenantId(new_uuid7())


def call(
    caller: str = EXTERNAL, *, tenant: TenantId | None = TENANT, operator: bool = False, scopes: tuple[str, ...] = (), **metadata: str
) -> RequestScope:
    """A call of a proven caller."""
    context = TenantContext(tenant, "free", "local", "key:1", frozenset(scopes), 1, datetime.now(UTC), operator, "token")
    return RequestScope("/a/B", {key.replace("_", "-"): value for key, value in metadata.items()}, caller=caller, tenant=context)


def anonymous(caller: str, **metadata: str) -> RequestScope:
    """A call of a service for no tenant."""
    return RequestScope("/a/B", {key.replace("_", "-"): value for key, value in metadata.items()}, caller=caller)


def policy(tenant: int, *callers: str, scopes: tuple[str, ...] = ()) -> Policy:
    """A parsed policy."""
    return Policy(tenant, frozenset(callers), scopes)


ACCEPTED = [
    (policy(REQUIRED, EXTERNAL), call()),
    (policy(REQUIRED, EXTERNAL, scopes=("a:b",)), call(scopes=("a:b", "c:d"))),
    # Scopes are a matter of outside credentials; services need none.
    (policy(REQUIRED, "inference", scopes=("a:b",)), call("inference")),
    (policy(REQUIRED, EXTERNAL), call(operator=True, x_operator_reason="ticket 7")),
    (policy(NONE, "inference"), anonymous("inference")),
    # A credential is identity, not tenant metadata.
    (policy(NONE, EXTERNAL), call(x_tenant_id=str(TENANT))),
    (policy(OPERATOR, EXTERNAL), call(tenant=None, operator=True, x_operator_reason="r" * 500)),
]
REFUSED = [
    (policy(REQUIRED, "inference"), call(), "CALLER_NOT_ALLOWED"),
    (policy(REQUIRED, EXTERNAL), call("inference"), "CALLER_NOT_ALLOWED"),
    (policy(REQUIRED, "inference"), anonymous("inference"), "CREDENTIAL_MISSING"),
    (policy(REQUIRED, EXTERNAL), call(tenant=None, operator=True, x_operator_reason="r"), "INVALID_METADATA"),
    (policy(REQUIRED, EXTERNAL), call(operator=True), "OPERATOR_REASON_MISSING"),
    (policy(REQUIRED, EXTERNAL, scopes=("a:b", "c:d")), call(scopes=("a:b",)), "SCOPE_MISSING"),
    (policy(NONE, EXTERNAL, scopes=("a:b",)), anonymous(EXTERNAL), "SCOPE_MISSING"),
    (policy(NONE, "inference"), anonymous("inference", x_tenant_id="1"), "TENANT_NOT_TAKEN"),
    (policy(NONE, "inference"), call("inference", x_tenant_context="t"), "TENANT_NOT_TAKEN"),
    (policy(OPERATOR, EXTERNAL), call(x_operator_reason="r"), "CALLER_NOT_ALLOWED"),
    (policy(OPERATOR, EXTERNAL), anonymous(EXTERNAL, x_operator_reason="r"), "CALLER_NOT_ALLOWED"),
    (policy(OPERATOR, EXTERNAL), call(operator=True), "OPERATOR_REASON_MISSING"),
    (policy(OPERATOR, EXTERNAL), call(operator=True, x_operator_reason="   "), "OPERATOR_REASON_MISSING"),
    (policy(OPERATOR, EXTERNAL), call(operator=True, x_operator_reason="r" * 501), "OPERATOR_REASON_MISSING"),
]


@pytest.mark.parametrize(("asked", "made"), ACCEPTED)
def test_a_call_that_has_what_is_asked_passes(asked: Policy, made: RequestScope) -> None:
    """Caller, tenant, reason and scopes as declared."""
    refuse_unlisted(asked, made)
    with pytest.raises(MeshError):
        refuse_unlisted(asked, replace(made, caller="a stranger"))


@pytest.mark.parametrize(("asked", "made", "reason"), REFUSED)
def test_a_call_that_lacks_something_is_told_what(asked: Policy, made: RequestScope, reason: str) -> None:
    """Each thing that is missing has its own reason."""
    with pytest.raises(MeshError) as refused:
        refuse_unlisted(asked, made)
    assert refused.value.reason_name == reason


def test_who_is_no_operator_is_told_so() -> None:
    """At an operators' method a tenant's credential, and none at all, hear that it is for operators, and what to send."""
    for made in (call(x_operator_reason="r"), anonymous(EXTERNAL, x_operator_reason="r")):
        with pytest.raises(MeshError) as refused:
            refuse_unlisted(policy(OPERATOR, EXTERNAL), made)
        said = refused.value.message
        assert "is for operators" in said
        assert "operator's key" in said
        assert "x-operator-reason" in said
        assert "outside" not in said
        assert refused.value.metadata["needs"] == "operator"


def test_the_policy_is_the_one_of_the_contract() -> None:
    """Policies are read from the descriptors, not repeated in code."""
    policies = policies_of([LIFECYCLE])
    assert policies[f"/{LIFECYCLE}/ProvisionTenant"] == policy(REQUIRED, "tenant")
    methods = [name for name in dir(lifecycle_service_pb2_grpc.TenantLifecycleServiceServicer) if name.endswith("Tenant")]
    assert policies == {f"/{LIFECYCLE}/{name}": policy(REQUIRED, "tenant") for name in methods}
    assert {"ProvisionTenant", "EraseTenant", "ExportTenant", "MoveTenant", "ReencryptTenant", "ScanTenant", "PurgeTenant"} == set(methods)


async def test_a_server_with_an_undeclared_method_refuses_to_start() -> None:
    """A method without a policy option stops the process with the method's name."""
    file = descriptor_pb2.FileDescriptorProto(name="tests/kernel/open.proto", package="tests.kernel")
    file.message_type.add(name="Empty")
    method = file.service.add(name="OpenService").method.add(name="DoIt")
    method.input_type = method.output_type = ".tests.kernel.Empty"
    descriptor_pool.Default().Add(file)
    with pytest.raises(PolicyMissing, match=r"/tests\.kernel\.OpenService/DoIt"):
        MeshServer(
            settings_of(),
            servicers=[(lambda servicer, server: None, object(), "tests.kernel.OpenService")],
            resolver=KeyringResolver(),
            verifier=ContextTokenVerifier(Keys()),
        )
