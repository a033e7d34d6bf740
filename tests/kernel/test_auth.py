"""Who may come in, and what a stranger can do with stolen, forged or contradictory metadata: nothing."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import grpc
import pytest

from mesh.common.v1 import lifecycle_service_pb2 as pb
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from services.kernel.request_context import client_call_id, current_caller, current_tenant, maybe_tenant, required_scope
from services.kernel.rpc.identity import peer_host
from services.kernel.rpc.wire_status import decode_rpc_error
from tests.kernel.mesh import BEARERS, Mesh

PROVISION = "/mesh.common.v1.TenantLifecycleService/ProvisionTenant"
SERVICE = {"x-mesh-service": "tenant", "x-mesh-service-token": BEARERS["tenant"]}


async def refusal(mesh: Mesh, metadata: Mapping[str, str], path: str = PROVISION) -> MeshError:
    """What the server answers to these metadata."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await mesh.raw_call(path, b"", metadata)
    return decode_rpc_error(refused.value, "peer")


async def test_a_service_acts_for_the_tenant_of_a_signed_token(mesh: Mesh) -> None:
    """The servicer sees the caller, the tenant and the caller's call id."""
    seen: dict[str, object] = {}

    async def look(request: Any, context: Any) -> pb.ProvisionTenantResponse:
        seen.update(caller=current_caller(), tenant=current_tenant().tenant_id, call=client_call_id())
        return pb.ProvisionTenantResponse()

    mesh.lifecycle.provision = look
    call_id = new_uuid7()
    token = {"x-tenant-context": mesh.tenant.token, "x-tenant-id": str(mesh.tenant.tenant_id), "x-request-id": str(call_id)}
    await mesh.raw_call(PROVISION, b"", SERVICE | token)
    assert seen == {"caller": "tenant", "tenant": mesh.tenant.tenant_id, "call": call_id}


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "CREDENTIAL_MISSING"),
        ({"x-tenant-id": str(new_uuid7())}, "CREDENTIAL_MISSING"),
        ({"x-mesh-service": "tenant"}, "CREDENTIAL_INVALID"),
        ({"x-mesh-service": "tenant", "x-mesh-service-token": BEARERS["inference"]}, "CREDENTIAL_INVALID"),
        ({"x-mesh-service": "nobody", "x-mesh-service-token": BEARERS["tenant"]}, "CREDENTIAL_INVALID"),
        ({"x-mesh-service-token": BEARERS["tenant"]}, "CREDENTIAL_MISSING"),
        ({"authorization": "Basic abc"}, "CREDENTIAL_INVALID"),
        ({"authorization": "Bearer "}, "CREDENTIAL_INVALID"),
        ({"authorization": "Bearer unknown"}, "CREDENTIAL_INVALID"),
        (SERVICE, "CREDENTIAL_MISSING"),
        (SERVICE | {"x-tenant-id": str(new_uuid7())}, "CREDENTIAL_MISSING"),
        (SERVICE | {"x-tenant-context": "forged.token"}, "CONTEXT_INVALID"),
    ],
)
async def test_whoever_proves_nothing_is_not_authenticated(mesh: Mesh, metadata: dict[str, str], reason: str) -> None:
    """Every missing or wrong proof is UNAUTHENTICATED; a bare tenant id is worth nothing, also from a service."""
    error = await refusal(mesh, metadata)
    assert (error.code, error.reason_name) == (grpc.StatusCode.UNAUTHENTICATED, reason)


async def test_a_stolen_context_token_is_worth_nothing_outside_the_mesh(mesh: Mesh) -> None:
    """Without a service identity the token is refused, alone and beside a credential."""
    mesh.resolver.known["key"] = mesh.tenant
    stolen = {"x-tenant-context": mesh.tenant.token}
    assert (await refusal(mesh, stolen)).reason_name == "CONTEXT_INVALID"
    assert (await refusal(mesh, stolen | {"authorization": "Bearer key"})).reason_name == "CONTEXT_INVALID"
    assert (await refusal(mesh, stolen | SERVICE | {"authorization": "Bearer key"})).reason_name == "CONTEXT_INVALID"


async def test_a_tenant_id_that_differs_from_the_proof_is_refused(mesh: Mesh) -> None:
    """Naming another tenant than the token or the credential proves is PERMISSION_DENIED."""
    mesh.resolver.known["key"] = mesh.tenant
    other = {"x-tenant-id": str(new_uuid7())}
    for proof in (SERVICE | {"x-tenant-context": mesh.tenant.token}, {"authorization": "Bearer key"}):
        error = await refusal(mesh, proof | other)
        assert (error.code, error.reason_name) == (grpc.StatusCode.PERMISSION_DENIED, "TENANT_MISMATCH")


async def test_a_tenant_of_another_region_is_sent_to_its_cell(mesh: Mesh) -> None:
    """Whoever proved it, a tenant whose data lives in another region is WRONG_CELL, with its region, before the method is run."""
    mesh.resolver.known["key"] = replace(mesh.tenant, region="eu-west")
    token = mesh.keys.token(mesh.tenant.tenant_id, region="eu-west")
    for proof in (SERVICE | {"x-tenant-context": token}, {"authorization": "Bearer key"}):
        error = await refusal(mesh, proof)
        assert (error.code, error.reason_name) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_CELL")
        assert error.metadata["region"] == "eu-west"


async def test_a_caller_the_policy_does_not_list_is_refused(mesh: Mesh) -> None:
    """A valid credential or another service's identity does not open a method of the tenant service alone."""
    mesh.resolver.known["key"] = mesh.tenant
    external = await refusal(mesh, {"authorization": "Bearer key"})
    assert external.reason_name == "CALLER_NOT_ALLOWED"
    assert external.metadata == {"caller": "external", "method": PROVISION}
    inference = {"x-mesh-service": "inference", "x-mesh-service-token": BEARERS["inference"], "x-tenant-context": mesh.tenant.token}
    assert (await refusal(mesh, inference)).metadata["caller"] == "inference"


async def test_tenant_metadata_on_a_method_without_tenant_is_refused(mesh: Mesh) -> None:
    """A batch names its tenants itself, so that a forgotten context cannot stand for them."""
    inference = {"x-mesh-service": "inference", "x-mesh-service-token": BEARERS["inference"]}
    path = "/mesh.tenant.v1.AuthenticationService/GetContextKeys"
    await mesh.raw_call(path, b"", inference)
    for key, value in (("x-tenant-id", str(mesh.tenant.tenant_id)), ("x-tenant-context", mesh.tenant.token)):
        error = await refusal(mesh, inference | {key: value}, path)
        assert (error.code, error.reason_name) == (grpc.StatusCode.INVALID_ARGUMENT, "TENANT_NOT_TAKEN")
        assert error.metadata == {"key": key}


@pytest.mark.parametrize("key", ["x-request-id", "x-tenant-id"])
@pytest.mark.parametrize("value", ["", "1", "a" * 36, "{01900000-0000-7000-8000-000000000000}", "01900000000070008000000000000000"])
async def test_an_id_that_is_no_uuid_is_refused(mesh: Mesh, key: str, value: str) -> None:
    """Malformed ids in metadata are INVALID_METADATA with the key."""
    error = await refusal(mesh, SERVICE | {"x-tenant-context": mesh.tenant.token, key: value})
    assert (error.reason_name, error.metadata) == ("INVALID_METADATA", {"key": key})


async def test_a_tenant_may_be_named_in_either_case(mesh: Mesh) -> None:
    """The id that the token proves, in capital letters, is the same tenant."""
    assert str(mesh.tenant.tenant_id).upper() != str(mesh.tenant.tenant_id)
    shouted = {"x-tenant-context": mesh.tenant.token, "x-tenant-id": str(mesh.tenant.tenant_id).upper()}
    await mesh.raw_call(PROVISION, b"", SERVICE | shouted)


async def test_an_operators_token_does_not_stand_for_an_empty_id(mesh: Mesh) -> None:
    """A token that proves no tenant agrees with no text, also not with an empty one."""
    token = mesh.keys.token(operator=True)
    error = await refusal(mesh, SERVICE | {"x-tenant-context": token, "x-tenant-id": ""})
    assert error.metadata == {"key": "x-tenant-id"}
    assert "must be a UUID" in error.message


async def test_a_key_sent_twice_is_refused(mesh: Mesh) -> None:
    """A proxy may look at the first value and the server at the last: neither is believed."""
    pairs = (*SERVICE.items(), ("x-tenant-id", str(mesh.tenant.tenant_id)), ("x-tenant-id", str(new_uuid7())))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await mesh.raw_pairs(PROVISION, b"", *pairs)
    assert decode_rpc_error(refused.value, "peer").metadata == {"key": "x-tenant-id"}


async def test_a_scope_does_not_leak_into_the_next_call(mesh: Mesh) -> None:
    """Each call begins with nothing known; outside of calls there is no tenant."""
    await mesh.provision()
    assert maybe_tenant() is None
    with pytest.raises(RuntimeError):
        required_scope()
    with pytest.raises(RuntimeError):
        current_tenant()


async def test_secrets_do_not_show_in_a_scope(mesh: Mesh) -> None:
    """A printed scope carries no bearer and no token."""
    shown: list[str] = []

    async def look(request: Any, context: Any) -> pb.ProvisionTenantResponse:
        shown.append(repr(required_scope()))
        return pb.ProvisionTenantResponse()

    mesh.lifecycle.provision = look
    await mesh.provision()
    assert BEARERS["tenant"] not in shown[0]
    assert mesh.tenant.token not in shown[0]


@pytest.mark.parametrize(
    ("peer", "host"),
    [("ipv4:10.1.2.3:4711", "10.1.2.3"), ("ipv6:%5B::1%5D:4711", "::1"), ("ipv6:[::1]:4711", "::1"), ("unix:/tmp/x", "")],
)
def test_a_peer_is_its_address_without_the_port(peer: str, host: str) -> None:
    """Allow-lists compare addresses."""
    assert peer_host(peer) == host
