"""The whole mesh on mutual TLS, as `make run TLS=1` starts it: the demo, grpcurl, health, rotation, and the same state without TLS."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from devstack.addresses import Ports
from devstack.certificates import CLIENT
from devstack.demo import Story
from devstack.environment import PLAIN, Wiring
from devstack.handbook import HARBOR, LUMEN
from devstack.mesh_client import MeshClient, credentials
from devstack.provisioning import create_tenant
from devstack.run import grpcurl_lines
from devstack.stack import HEALTH_SERVICE_NAMES, certificates_in, is_serving, running_stack
from devstack.state import SERVICES, DemoTenant
from mesh.metering.v1 import usage_service_pb2
from tests.e2e.test_grpcurl import SERVICES_LISTED, SHARED, run
from tests.support.mesh import Mesh, running_mesh, state_folder
from tests.support.tls import serial_in, served_serial
from tests.support.tools import tool
from tests.support.waiting import eventually

ROTATED_SECONDS = 30.0


@pytest.fixture(scope="module")
async def tls_mesh() -> AsyncIterator[Mesh]:
    """A mesh on mutual TLS."""
    async with running_mesh(tls=True) as running:
        yield running


def trust(mesh: Mesh) -> list[str]:
    """What grpcurl is told of the client's leaf."""
    leaf = mesh.stack.client_leaf
    assert leaf is not None
    return ["-cacert", str(leaf.authorities), "-cert", str(leaf.certificate), "-key", str(leaf.key)]


async def test_every_claim_of_the_demo_holds_on_tls(tls_mesh: Mesh) -> None:
    """The story of two tenants is the same when every connection is mutual TLS."""
    tenants = {company.slug: await tls_mesh.another(company) for company in (LUMEN, HARBOR)}
    checks = [check async for check in Story(tls_mesh.client, tenants).tell()]
    assert [(check.name, check.seen) for check in checks if not check.passed] == []


async def test_no_bearer_of_a_service_is_about(tls_mesh: Mesh) -> None:
    """No service is given a bearer of its own or knows another's: certificates are the only identity."""
    for name in SERVICES:
        environment = Path(f"/proc/{tls_mesh.stack.processes[name].pid}/environ").read_bytes()
        assert b"TENANTRY_TLS_CERT_FILE=" in environment
        assert b"TENANTRY_SERVICE_TOKEN" not in environment
        assert b"TENANTRY_PEER_TOKEN_HASHES" not in environment


async def test_plaintext_and_strangers_are_not_heard(tls_mesh: Mesh) -> None:
    """Without TLS, or without a certificate of the mesh, no port answers so much as its health."""
    for name in SERVICES:
        address = tls_mesh.stack.ports.address(name)
        without = trust(tls_mesh)[:2]
        for how in (["-plaintext"], without):
            code, out, _ = await run(tool("grpcurl"), "-max-time", "5", *how, address, "grpc.health.v1.Health/Check")
            assert (code != 0, out) == (True, ""), name


async def test_grpcurl_lists_and_checks_health_on_tls(tls_mesh: Mesh) -> None:
    """With the client's leaf, reflection and health answer at every port."""
    for name in SERVICES:
        address, how = tls_mesh.stack.ports.address(name), trust(tls_mesh)
        code, out, err = await run(tool("grpcurl"), *how, address, "list")
        assert (code, set(out.split()) >= SERVICES_LISTED[name] | SHARED) == (0, True), err
        body = json.dumps({"service": HEALTH_SERVICE_NAMES[name]})
        _, out, err = await run(tool("grpcurl"), *how, "-d", body, address, "grpc.health.v1.Health/Check")
        assert json.loads(out or "{}") == {"status": "SERVING"}, err


async def test_the_printed_lines_work_on_tls(tls_mesh: Mesh) -> None:
    """The three commands that `make run TLS=1` prints succeed when pasted into a shell."""
    tool("grpcurl")
    tenant = await tls_mesh.tenant()
    outputs = []
    for line in grpcurl_lines(tls_mesh.stack.ports, tenant, "Who's there?", tls_mesh.stack.client_leaf):
        pasted = line.replace("grpcurl", tool("grpcurl"), 1).replace("RETRIEVAL_MODE_REQUIRED", "RETRIEVAL_MODE_OFF")
        code, out, err = await run("bash", "-c", pasted)
        assert code == 0, err
        outputs.append(out)
    assert "mesh.inference.v1.InferenceService" in outputs[0]
    assert '"final"' in outputs[1]
    assert json.loads(outputs[2])["settled_count"] == "1"


async def test_the_running_mesh_takes_up_new_certificates(tls_mesh: Mesh) -> None:
    """With every leaf replaced while tenants call, no call fails and every service comes to show its new one."""
    tenant = await tls_mesh.tenant()
    certificates = tls_mesh.stack.wiring.certificates
    assert certificates is not None
    for name in SERVICES:
        certificates.files(name).certificate.unlink()
    assert certificates.renew() == list(SERVICES)

    async def everybody_shows_the_new_one() -> bool:
        report = usage_service_pb2.GetUsageReportRequest()
        await tls_mesh.client.usage.GetUsageReport(report, metadata=credentials(tenant.api_key), timeout=10)
        return all([await _shows_the_newest(tls_mesh, name) for name in SERVICES])

    await eventually(everybody_shows_the_new_one, within_seconds=ROTATED_SECONDS)
    # Across services, on connections that were made anew.
    async with MeshClient.connect(tls_mesh.stack.ports, certificates.files(CLIENT)) as fresh:
        await fresh.usage.GetUsageReport(usage_service_pb2.GetUsageReportRequest(), metadata=credentials(tenant.api_key), timeout=10)


async def _shows_the_newest(mesh: Mesh, name: str) -> bool:
    leaf, client = mesh.stack.wiring.certificates, mesh.stack.client_leaf
    assert leaf is not None
    assert client is not None
    port = getattr(mesh.stack.ports, name)
    shown = await served_serial(port, authorities=client.authorities, certificate=client.certificate, key=client.key)
    return shown == serial_in(leaf.files(name).certificate)


@pytest.mark.slow
async def test_the_state_goes_on_with_and_without_tls() -> None:
    """What was made on TLS is there without it and the other way round: how the parts speak is chosen anew at each start."""
    tenant: DemoTenant | None = None
    with state_folder() as state:
        certificates = certificates_in(state)
        for wiring in (Wiring(certificates), PLAIN, Wiring(certificates)):
            ports = Ports.free()
            async with running_stack(state, ports, wiring=wiring) as stack, MeshClient.connect(ports, stack.client_leaf) as client:
                if tenant is None:
                    tenant = await create_tenant(stack, client, LUMEN)
                report = usage_service_pb2.GetUsageReportRequest()
                await client.usage.GetUsageReport(report, metadata=credentials(tenant.api_key), timeout=20)
                assert await is_serving(ports, "inference", stack.client_leaf)
                assert not await is_serving(ports, "inference", None if wiring.certificates else certificates.files(CLIENT))
