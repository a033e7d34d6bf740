"""A suspended tenant is refused by every service of a running mesh, and comes back as it was."""

import time
from collections.abc import Awaitable, Callable

import grpc
import pytest

from devstack.mesh_client import credentials, operator_credentials, refusal
from mesh.inference.v1 import inference_service_pb2
from mesh.metering.v1 import usage_service_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2
from mesh.retrieval.v1 import document_service_pb2
from mesh.tenant.v1 import tenant_service_pb2
from tests.support.mesh import Mesh
from tests.support.waiting import eventually

# The promise is one second and is held by `python -m bench revocation`; a loaded machine only has to show that the end comes.
GENEROUS_SECONDS = 5.0

Call = Callable[[], Awaitable[object]]


async def reason_of(call: Call) -> str:
    """Why a call is refused; empty where it is answered."""
    try:
        await call()
    except grpc.aio.AioRpcError as error:
        return refusal(error).reason
    return ""


def calls_of(mesh: Mesh, api_key: str) -> dict[str, Call]:
    """A call to each service with the tenant's key."""
    metadata, client = credentials(api_key), mesh.client
    message = inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text="Hello.")
    question = inference_service_pb2.GenerateRequest(messages=[message], options=inference_service_pb2.GenerateOptions(max_output_tokens=1))
    return {
        "tenant": lambda: client.tenants.GetTenant(tenant_service_pb2.GetTenantRequest(), metadata=metadata, timeout=20),
        "ratelimit": lambda: client.limits.ListLimits(rate_limit_service_pb2.ListLimitsRequest(), metadata=metadata, timeout=20),
        "inference": lambda: client.inference.Generate(question, metadata=metadata, timeout=20),
        "retrieval": lambda: client.documents.ListDocuments(document_service_pb2.ListDocumentsRequest(), metadata=metadata, timeout=20),
        "metering": lambda: client.usage.GetUsageReport(usage_service_pb2.GetUsageReportRequest(), metadata=metadata, timeout=20),
    }


async def test_a_suspended_tenant_is_refused_everywhere_until_it_is_resumed(mesh: Mesh, capsys: pytest.CaptureFixture[str]) -> None:
    """Services that know a key refuse it once its tenant is suspended, and say why; resumed it is served again, and no other is refused."""
    tenant, other = await mesh.tenant(), await mesh.tenant()
    operator = operator_credentials(mesh.stack.state.secrets.operator_key, "an unpaid bill")
    calls = calls_of(mesh, tenant.api_key)
    for call in (*calls.values(), *calls_of(mesh, other.api_key).values()):
        await call()
    named = tenant_service_pb2.SuspendTenantRequest(tenant_id=tenant.tenant_id)
    answer = await mesh.client.tenants.SuspendTenant(named, metadata=operator, timeout=20)
    begun = time.monotonic()
    assert answer.tenant.state == tenant_service_pb2.TENANT_STATE_SUSPENDED

    async def all_say(reason: str) -> bool:
        return all([await reason_of(call) == reason for call in calls.values()])

    await eventually(lambda: all_say("TENANT_SUSPENDED"), within_seconds=GENEROUS_SECONDS)
    with capsys.disabled():
        print(f"\nrefused by five services {time.monotonic() - begun:.2f} s after the suspension was answered")  # noqa: T201 - the measurement
    for name, call in calls_of(mesh, other.api_key).items():
        assert await reason_of(call) == "", name
    await mesh.client.tenants.ResumeTenant(
        tenant_service_pb2.ResumeTenantRequest(tenant_id=tenant.tenant_id), metadata=operator, timeout=20
    )
    await eventually(lambda: all_say(""), within_seconds=GENEROUS_SECONDS)
