"""grpcurl, as a person at a terminal uses it."""

import asyncio
import json

import pytest

from devstack.run import grpcurl_lines
from devstack.stack import HEALTH_SERVICE_NAMES
from tests.support.mesh import Mesh
from tests.support.tools import tool

SERVICES_LISTED = {
    "tenant": {
        "mesh.tenant.v1.ApiKeyService",
        "mesh.tenant.v1.AuditService",
        "mesh.tenant.v1.AuthenticationService",
        "mesh.tenant.v1.ConfigurationService",
        "mesh.tenant.v1.DataKeyService",
        "mesh.tenant.v1.DomainService",
        "mesh.tenant.v1.EventService",
        "mesh.tenant.v1.FlagService",
        "mesh.tenant.v1.IssuerService",
        "mesh.tenant.v1.PlacementService",
        "mesh.tenant.v1.PlanService",
        "mesh.tenant.v1.SecretService",
        "mesh.tenant.v1.TenantService",
        "mesh.tenant.v1.UserService",
    },
    "ratelimit": {"mesh.ratelimit.v1.RateLimitService", "envoy.service.ratelimit.v3.RateLimitService"},
    "inference": {
        "mesh.inference.v1.ConversationService",
        "mesh.inference.v1.InferenceService",
        "mesh.inference.v1.PromptService",
    },
    "retrieval": {"mesh.retrieval.v1.DocumentService", "mesh.retrieval.v1.SearchService"},
    "metering": {
        "mesh.metering.v1.BudgetService",
        "mesh.metering.v1.EventService",
        "mesh.metering.v1.ExportService",
        "mesh.metering.v1.ExportSinkService",
        "mesh.metering.v1.InvoiceService",
        "mesh.metering.v1.LedgerService",
        "mesh.metering.v1.PriceService",
        "mesh.metering.v1.ReconciliationService",
        "mesh.metering.v1.UsageService",
        "mesh.metering.v1.WebhookService",
        "mesh.metering.v1.VerificationService",
    },
}
SHARED = {
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "mesh.common.v1.TenantLifecycleService",
}


async def run(*arguments: str) -> tuple[int, str, str]:
    """Runs a command and returns its exit code, output and error output."""
    process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode or 0, out.decode(), err.decode()


@pytest.mark.parametrize("name", sorted(SERVICES_LISTED))
async def test_every_service_tells_what_it_serves(mesh: Mesh, name: str) -> None:
    """Reflection lists the service's own rpc services, the lifecycle, health and itself."""
    code, out, err = await run(tool("grpcurl"), "-plaintext", mesh.stack.ports.address(name), "list")
    assert (code, set(out.split())) == (0, SERVICES_LISTED[name] | SHARED), err


@pytest.mark.parametrize("name", sorted(HEALTH_SERVICE_NAMES))
async def test_every_servicer_has_a_health(mesh: Mesh, name: str) -> None:
    """The standard health service answers for each servicer by name."""
    body = json.dumps({"service": HEALTH_SERVICE_NAMES[name]})
    _, out, err = await run(tool("grpcurl"), "-plaintext", "-d", body, mesh.stack.ports.address(name), "grpc.health.v1.Health/Check")
    assert json.loads(out or "{}") == {"status": "SERVING"}, err


async def test_the_printed_lines_work_as_they_are(mesh: Mesh) -> None:
    """The three commands that `make run` prints succeed when pasted into a shell: a list, a streamed answer, a bill."""
    tool("grpcurl")
    tenant = await mesh.tenant()
    outputs = []
    for line in grpcurl_lines(mesh.stack.ports, tenant, "Who's there?"):
        pasted = line.replace("grpcurl", tool("grpcurl"), 1).replace("RETRIEVAL_MODE_REQUIRED", "RETRIEVAL_MODE_OFF")
        code, out, err = await run("bash", "-c", pasted)
        assert code == 0, err
        outputs.append(out)
    assert "mesh.inference.v1.InferenceService" in outputs[0]
    assert '"final"' in outputs[1]
    assert json.loads(outputs[2])["settled_count"] == "1"


async def test_a_refusal_is_readable(mesh: Mesh) -> None:
    """Without a credential grpcurl shows the code, the sentence and the reason."""
    address = mesh.stack.ports.address("inference")
    code, _, err = await run(tool("grpcurl"), "-plaintext", "-d", "{}", address, "mesh.inference.v1.PromptService/GetPrompt")
    assert code != 0
    assert "Unauthenticated" in err
    assert "CREDENTIAL_MISSING" in err
