"""With TLS a service is who its certificate says, and nobody without one of the mesh's gets in."""

import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mesh.common.v1 import lifecycle_service_pb2 as pb
from mesh.common.v1 import lifecycle_service_pb2_grpc as pb_grpc
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.errors import MeshError
from services.kernel.request_context import current_caller
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.identity import service_of_certificate
from services.kernel.rpc.server import MeshServer
from services.kernel.settings import ServiceSettings
from services.kernel.tenant_context import TenantContext
from tests.kernel.mesh import BEARERS, LIFECYCLE, InferenceSettings, KeyringResolver, Keys, Lifecycle, TenantSettings, settings_of


class Authority:
    """A certificate authority of one test."""

    def __init__(self, folder: Path, name: str = "mesh") -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.certificate = self._build(self.name, self.key, []).sign(self.key, hashes.SHA256())
        self.pem = self.certificate.public_bytes(serialization.Encoding.PEM)
        (folder / "ca.pem").write_bytes(self.pem)

    def issue(self, name: str, *uris: str, begins: float = -60.0, ends: float = 3600.0) -> dict[str, Any]:
        """Writes a certificate that is valid between two moments, in seconds from now, and returns the settings that use it."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.DNSName("localhost"), *(x509.UniformResourceIdentifier(uri) for uri in uris)]
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = self._build(subject, key, names, begins, ends).sign(self.key, hashes.SHA256())
        pem = serialization.Encoding.PEM
        (self.folder / f"{name}.pem").write_bytes(certificate.public_bytes(pem))
        (self.folder / f"{name}.key").write_bytes(_pem_of(key))
        return {
            "tls_cert_file": str(self.folder / f"{name}.pem"),
            "tls_key_file": str(self.folder / f"{name}.key"),
            "tls_ca_file": str(self.folder / "ca.pem"),
        }

    def key_pem(self) -> bytes:
        """Its own key, as text."""
        return _pem_of(self.key)

    def _build(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        names: list[x509.GeneralName],
        begins: float = -60.0,
        ends: float = 3600.0,
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(seconds=begins))
            .not_valid_after(now + datetime.timedelta(seconds=ends))
            .add_extension(x509.BasicConstraints(ca=not names, path_length=None), critical=True)
        )
        return builder.add_extension(x509.SubjectAlternativeName(names), critical=False) if names else builder


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


class Peers:
    """A TLS server and the means to call it."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder)
        self.keys, self.resolver, self.lifecycle = Keys(), KeyringResolver(), Lifecycle()
        self.callers: list[str] = []
        self.lifecycle.provision = self._provision
        own = self.authority.issue("server", "spiffe://tenantry/service/metering")
        self.server = MeshServer(
            settings_of(listen_address="localhost:0", **own),
            servicers=[(pb_grpc.add_TenantLifecycleServiceServicer_to_server, self.lifecycle, LIFECYCLE)],
            resolver=self.resolver,
            verifier=ContextTokenVerifier(self.keys),
        )

    async def context(self) -> TenantContext:
        return await ContextTokenVerifier(self.keys).verify(self.keys.token())

    async def call(self, settings: ServiceSettings) -> None:
        tenant = await self.context()
        channel = MeshChannel(f"localhost:{self.server.bound_port}", settings=settings, target_service="metering")
        try:
            stub = pb_grpc.TenantLifecycleServiceStub(channel.channel)
            await channel.unary(stub.ProvisionTenant, pb.ProvisionTenantRequest(), timeout_seconds=5.0, tenant=tenant)
        finally:
            await channel.close()

    async def _provision(self, request: Any, context: Any) -> pb.ProvisionTenantResponse:
        self.callers.append(current_caller())
        return pb.ProvisionTenantResponse()


async def test_a_service_is_who_its_certificate_says(tmp_path: Path) -> None:
    """The URI of the certificate names the caller; what a caller claims in metadata does not count."""
    peers = Peers(tmp_path)
    await peers.server.start()
    tenant = peers.authority.issue("tenant", "spiffe://tenantry/service/tenant")
    inference = peers.authority.issue("inference", "spiffe://tenantry/service/inference")
    await peers.call(settings_of(TenantSettings, **tenant))
    assert peers.callers == ["tenant"]
    with pytest.raises(MeshError) as refused:
        await peers.call(settings_of(InferenceSettings, **inference))
    assert refused.value.metadata["caller"] == "inference"
    with pytest.raises(grpc.aio.AioRpcError) as claimed:
        await _raw_claim(peers, inference)
    assert claimed.value.code() is grpc.StatusCode.PERMISSION_DENIED
    await peers.server.stop()


async def test_a_certificate_without_a_service_is_no_service(tmp_path: Path) -> None:
    """A product's client certificate lets it knock; it still needs a credential, and no context token is taken from it."""
    peers = Peers(tmp_path)
    await peers.server.start()
    with pytest.raises(MeshError) as refused:
        await peers.call(settings_of(**peers.authority.issue("product", "spiffe://tenantry/client/product")))
    assert refused.value.reason_name == "CONTEXT_INVALID"
    await peers.server.stop()


async def test_a_stranger_is_not_even_heard(tmp_path: Path) -> None:
    """A certificate of another authority ends the handshake."""
    peers = Peers(tmp_path)
    await peers.server.start()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    strange = Authority(elsewhere).issue("tenant", "spiffe://tenantry/service/tenant")
    strange["tls_ca_file"] = str(tmp_path / "ca.pem")
    with pytest.raises(MeshError) as refused:
        await peers.call(settings_of(**strange))
    assert refused.value.code is grpc.StatusCode.UNAVAILABLE
    assert peers.callers == []
    await peers.server.stop()


async def test_a_certificate_that_is_over_opens_nothing(tmp_path: Path) -> None:
    """An expired client certificate, and one that is not valid yet, end the handshake."""
    peers = Peers(tmp_path)
    await peers.server.start()
    for begins, ends in ((-7200.0, -3600.0), (3600.0, 7200.0)):
        with pytest.raises(MeshError) as refused:
            await peers.call(settings_of(**peers.authority.issue("tenant", "spiffe://tenantry/service/tenant", begins=begins, ends=ends)))
        assert refused.value.code is grpc.StatusCode.UNAVAILABLE
    assert peers.callers == []
    await peers.server.stop()


@pytest.mark.parametrize(
    "uris",
    [("spiffe://tenantry/service/tenant", "spiffe://tenantry/service/inference"), ("spiffe://elsewhere/service/tenant",)],
    ids=["two services", "none of the mesh"],
)
async def test_a_certificate_of_two_services_or_none_is_a_strangers(tmp_path: Path, uris: tuple[str, ...]) -> None:
    """Its holder may knock and no more: no context token is taken from it, as from anybody outside."""
    peers = Peers(tmp_path)
    await peers.server.start()
    with pytest.raises(MeshError) as refused:
        await peers.call(settings_of(**peers.authority.issue("odd", *uris)))
    assert refused.value.reason_name == "CONTEXT_INVALID"
    assert peers.callers == []
    await peers.server.stop()


@pytest.mark.parametrize(
    ("names", "service"),
    [
        ([b"spiffe://tenantry/service/tenant"], "tenant"),
        ([b"spiffe://tenantry/service/tenant", b"spiffe://tenantry/service/metering"], None),
        ([b"spiffe://tenantry/service/"], None),
        ([b"spiffe://elsewhere/service/tenant"], None),
        ([b"localhost", b"\xff"], None),
        ([], None),
    ],
)
def test_one_certificate_is_one_service(names: list[bytes], service: str | None) -> None:
    """No name, a foreign one or two different ones make no service."""
    assert service_of_certificate({"x509_subject_alternative_name": names}) == service


async def _raw_claim(peers: Peers, files: dict[str, str]) -> None:
    credentials = grpc.ssl_channel_credentials(
        Path(files["tls_ca_file"]).read_bytes(), Path(files["tls_key_file"]).read_bytes(), Path(files["tls_cert_file"]).read_bytes()
    )
    metadata = (("x-mesh-service", "tenant"), ("x-mesh-service-token", BEARERS["tenant"]), ("x-tenant-context", peers.keys.token()))
    async with grpc.aio.secure_channel(f"localhost:{peers.server.bound_port}", credentials) as channel:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{LIFECYCLE}/ProvisionTenant")
        await method(b"", metadata=metadata, timeout=5.0)
