"""Real processes, started as the manifests start them. Their stores are away, which must not keep them from answering probes."""

import base64
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.check.checks import K8S
from deploy.check.manifests import Workload, by_name, parse, text, texts, tree
from deploy.check.mesh import ROOT
from deploy.check.tools import Tools
from devstack.ports import free_port
from mesh.common.v1 import lifecycle_service_pb2_grpc
from mesh.common.v1.lifecycle_service_pb2 import EraseTenantRequest

AWAY = "127.0.0.1:1"
SECRETS = {
    "TENANTRY_POSTGRES_DSN": f"postgresql://someone:word@{AWAY}/tenantry",
    "TENANTRY_POSTGRES_JOBS_DSN": f"postgresql://someone:word@{AWAY}/tenantry",
    "TENANTRY_POSTGRES_PARTITIONS_DSN": f"postgresql://someone:word@{AWAY}/tenantry",
    "TENANTRY_POSTGRES_PLACEMENT_DSN": f"postgresql://someone:word@{AWAY}/tenantry",
    "TENANTRY_SILO_ADMIN_DSN": f"postgresql://someone:word@{AWAY}/postgres",
    "TENANTRY_KEY_STORE_DSN": f"postgresql://someone:word@{AWAY}/keys",
    "TENANTRY_MASTER_KEYS": "first:" + base64.b64encode(bytes(range(32))).decode(),
    "TENANTRY_WEBHOOK_SEAL_KEYS": "1:" + base64.b64encode(bytes(range(32))).decode(),
    "TENANTRY_FRONT_KEY_SHA256": "0" * 64,
    "TENANTRY_REDIS_URL": f"redis://{AWAY}/0",
    "TENANTRY_QDRANT_URL": f"http://{AWAY}",
    "TENANTRY_QDRANT_API_KEY": "word",
    "TENANTRY_ANTHROPIC_API_KEY": "word",
    "TENANTRY_PROVIDER_ACCOUNTS": '{"house": {"requests_per_minute": 1000}}',
    "TENANTRY_CONTEXT_SIGNING_KEY": base64.b64encode(bytes(range(32))).decode(),
    "TENANTRY_OPERATOR_KEY_SHA256": "0" * 64,
}
START_SECONDS = 30.0


@pytest.fixture(scope="module")
def deployments(tools: Tools) -> dict[str, Workload]:
    """The Deployments of the base."""
    return by_name(parse(tools.build(K8S / "base")).workloads("Deployment"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as the Secret of a service would be mounted."""
    directory = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    signed = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1)).sign(key, hashes.SHA256())
    pem = signed.public_bytes(serialization.Encoding.PEM)
    (directory / "tls.crt").write_bytes(pem)
    (directory / "ca.crt").write_bytes(pem)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "tls.key").write_bytes(key.private_bytes(*form))
    return directory


def environment(workload: Workload, certificate: Path, health_port: int) -> dict[str, str]:
    """Returns the manifest's environment, moved to loopback, with its Secrets filled and no wait at the end."""
    literals = {name: value.replace("/etc/tenantry/tls", str(certificate)) for name, value in workload.literals.items()}
    literals["TENANTRY_LISTEN_ADDRESS"] = f"127.0.0.1:{free_port()}"
    literals["TENANTRY_HEALTH_ADDRESS"] = f"127.0.0.1:{health_port}"
    literals["TENANTRY_ENDPOINT_REMOVAL_SECONDS"] = "0"
    literals["TENANTRY_OTLP_ENDPOINT"] = ""
    return {"PATH": os.environ["PATH"], **literals, **{name: SECRETS[name] for name in workload.secrets}}


def running(workload: Workload, environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Yields the process of the workload, and ends it if it still runs."""
    with log.open("wb") as output:
        command = [sys.executable, "-m", *texts(workload.container, "args")]
        with subprocess.Popen(command, env=dict(environment), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()


@pytest.mark.parametrize("name", ["tenant", "ratelimit", "inference", "retrieval", "metering"])
def test_probes_of_the_manifest_are_answered_by_the_process(
    name: str, deployments: dict[str, Workload], certificate: Path, tmp_path: Path
) -> None:
    """A service started with the manifest's environment serves each probe in plaintext, nothing else there, and ends on SIGTERM."""
    workload, port, log = deployments[name], free_port(), tmp_path / "log"
    for process in running(workload, environment(workload, certificate, port), log):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                request = health_pb2.HealthCheckRequest(service=text(tree(workload.container, probe, "grpc"), "service"))
                try:
                    answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=START_SECONDS, wait_for_ready=True)
                except grpc.RpcError as error:
                    pytest.fail(f"{probe}: {error}\n{log.read_text()}")
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError) as refused:
                # Registered by all five, on their own port. The stub's types know the asynchronous channel only.
                stub = lifecycle_service_pb2_grpc.TenantLifecycleServiceStub(channel)  # type: ignore[arg-type]
                stub.EraseTenant(EraseTenantRequest(), timeout=5.0)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        process.send_signal(signal.SIGTERM)
        assert process.wait(START_SECONDS) == 0, log.read_text()
