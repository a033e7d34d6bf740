"""Certificates that change while everything runs: nobody notices, and files that do not fit are not taken."""

import asyncio
import datetime
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from structlog.testing import capture_logs

from mesh.common.v1 import lifecycle_service_pb2 as pb
from mesh.common.v1 import lifecycle_service_pb2_grpc as pb_grpc
from services.kernel.errors import MeshError
from services.kernel.rpc.certificates import CertificateFiles, CertificatesUnusable, leaf_of
from services.kernel.rpc.channel import MeshChannel
from services.kernel.tenant_context import TenantContext
from tests.kernel.mesh import settings_of
from tests.kernel.test_mtls import Authority, Peers
from tests.support import tls
from tests.support.waiting import eventually

SERVER = ("server", "spiffe://tenantry/service/metering")
TENANT = ("tenant", "spiffe://tenantry/service/tenant")
ROTATIONS = 4
CALLERS = 4
WAIT_SECONDS = 20.0
DAMAGES = ("half a certificate", "half a key", "another's key", "half a bundle", "no certificate")


class Pair:
    """A running server and one channel to it; the server notes whose certificates it is shown."""

    def __init__(self, folder: Path, peers: Peers, context: TenantContext) -> None:
        self.folder = folder
        self.peers = peers
        self.shown: set[int] = set()
        self.answered = 0
        self.held = asyncio.Event()
        self.release = asyncio.Event()
        self.release.set()
        self._context = context
        peers.lifecycle.provision = self._provision
        self.channel = self.connect("tenant")

    def connect(self, name: str) -> MeshChannel:
        """A channel that shows the leaf of this name."""
        files = {"tls_cert_file": f"{name}.pem", "tls_key_file": f"{name}.key", "tls_ca_file": "ca.pem"}
        settings = settings_of(**{key: str(self.folder / file) for key, file in files.items()})
        return MeshChannel(f"localhost:{self.peers.server.bound_port}", settings=settings, target_service="metering")

    async def call(self, channel: MeshChannel | None = None) -> None:
        """One call. Raises: MeshError."""
        used = channel or self.channel
        stub = pb_grpc.TenantLifecycleServiceStub(used.channel)
        await used.unary(stub.ProvisionTenant, pb.ProvisionTenantRequest(), timeout_seconds=WAIT_SECONDS, tenant=self._context)
        self.answered += 1

    async def sees(self, serial: int) -> bool:
        """Makes a call and tells whether the server was shown this certificate by now."""
        await self.call()
        return serial in self.shown

    async def served_serial(self) -> int:
        """The serial of the certificate that a new connection is shown."""
        return await served_serial(self.peers.server.bound_port, self.folder)

    async def _provision(self, request: Any, context: Any) -> pb.ProvisionTenantResponse:
        (pem,) = context.auth_context()["x509_pem_cert"]
        self.shown.add(x509.load_pem_x509_certificate(pem).serial_number)
        self.held.set()
        await self.release.wait()
        return pb.ProvisionTenantResponse()


async def served_serial(port: int, folder: Path) -> int:
    """The serial that a new connection is shown when it trusts and shows what is in this folder."""
    return await tls.served_serial(port, authorities=folder / "ca.pem", certificate=folder / "tenant.pem", key=folder / "tenant.key")


def serial_in(folder: Path, name: str) -> int:
    """The serial of a leaf as it is on disk."""
    return tls.serial_in(folder / f"{name}.pem")


@pytest.fixture(autouse=True)
def _look_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.kernel.rpc.certificates.LOOK_EVERY_SECONDS", 0.0)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """A server and a client that trust each other."""
    peers = Peers(tmp_path)
    await peers.server.start()
    peers.authority.issue(*TENANT)
    made = Pair(tmp_path, peers, await peers.context())
    yield made
    await made.channel.close()
    await peers.server.stop()


async def test_leaves_rotate_under_load_and_no_call_fails(pair: Pair) -> None:
    """Four times both sides get new leaves while calls go on: none fails, and each side sees the other's new serial."""
    rotating = True

    async def load() -> None:
        while rotating:
            await pair.call()

    async with asyncio.TaskGroup() as group:
        for _ in range(CALLERS):
            group.create_task(load())
        for _ in range(ROTATIONS):
            before = pair.answered
            for who in (SERVER, TENANT):
                pair.peers.authority.issue(*who)
            await eventually(lambda: pair.sees(serial_in(pair.folder, "tenant")), within_seconds=WAIT_SECONDS)
            assert await pair.served_serial() == serial_in(pair.folder, "server")
            assert pair.answered > before
        rotating = False
    assert len(pair.shown) >= ROTATIONS
    assert pair.answered > ROTATIONS * CALLERS


async def test_calls_go_on_past_the_end_of_a_leaf_that_was_renewed(pair: Pair) -> None:
    """Leaves of three seconds, replaced before they end: no call fails before, at or after the end of the first."""
    for who in (SERVER, TENANT):
        pair.peers.authority.issue(*who, ends=3.0)
    await pair.call()
    end = x509.load_pem_x509_certificate((pair.folder / "tenant.pem").read_bytes()).not_valid_after_utc
    for who in (SERVER, TENANT):
        pair.peers.authority.issue(*who)
    while datetime.datetime.now(datetime.UTC) <= end:
        await pair.call()
    fresh = pair.connect("tenant")
    await pair.call(fresh)
    await fresh.close()
    assert x509.load_pem_x509_certificate((pair.folder / "tenant.pem").read_bytes()).not_valid_after_utc > end


async def test_a_call_under_way_ends_on_the_connection_it_began_on(pair: Pair) -> None:
    """New certificates cut nothing: the old connection is closed when its last call has ended."""
    pair.release.clear()
    async with asyncio.TaskGroup() as group:
        slow = group.create_task(pair.call())
        await pair.held.wait()
        pair.peers.authority.issue(*TENANT)
        pair.held.clear()
        next_one = group.create_task(pair.call())
        await pair.held.wait()
        assert serial_in(pair.folder, "tenant") in pair.shown
        assert not slow.done()
        pair.release.set()
    assert slow.done()
    assert next_one.done()
    facade = pair.channel.channel
    await eventually(lambda: _is_empty(facade._retired), within_seconds=WAIT_SECONDS)


async def _is_empty(connections: list[Any]) -> bool:
    return not connections


async def test_the_authority_changes_with_an_overlap(pair: Pair) -> None:
    """Both bundles hold old and new authority before either leaf changes: at no step does a new connection or a call fail."""
    old, new = pair.peers.authority, Authority(_folder(pair.folder, "next"), "next")
    new.folder = pair.folder
    steps = [
        lambda: (pair.folder / "ca.pem").write_bytes(old.pem + new.pem),
        lambda: new.issue(*SERVER),
        lambda: new.issue(*TENANT),
        lambda: (pair.folder / "ca.pem").write_bytes(new.pem),
    ]
    for step in steps:
        step()
        await pair.call()
        fresh = pair.connect("tenant")
        await pair.call(fresh)
        await fresh.close()
    assert await pair.served_serial() == serial_in(pair.folder, "server")
    old.issue("late", TENANT[1])
    late = pair.connect("late")
    with pytest.raises(MeshError) as refused:
        await pair.call(late)
    assert refused.value.code is grpc.StatusCode.UNAVAILABLE
    await late.close()


@pytest.mark.parametrize("damage", DAMAGES)
async def test_files_that_do_not_fit_are_not_taken(pair: Pair, damage: str) -> None:
    """A half-written, mismatched or missing file takes nobody down: the set before it stays in use, and each side says so once."""
    serials = {who[0]: serial_in(pair.folder, who[0]) for who in (SERVER, TENANT)}
    before = _copy(pair.folder)
    with capture_logs() as logs:
        for name, _ in (SERVER, TENANT):
            _spoil(pair.folder, name, damage)
        for _ in range(5):
            await pair.call()
            assert await served_serial(pair.peers.server.bound_port, before) == serials["server"]
    assert pair.shown == {serials["tenant"]}
    assert len([entry for entry in logs if entry["event"] == "certificates_kept"]) == 2
    for who in (SERVER, TENANT):
        pair.peers.authority.issue(*who)
    (pair.folder / "ca.pem").write_bytes(pair.peers.authority.pem)
    await eventually(lambda: pair.sees(serial_in(pair.folder, "tenant")), within_seconds=WAIT_SECONDS)
    assert await pair.served_serial() == serial_in(pair.folder, "server")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_process_does_not_begin_with_files_that_do_not_fit(tmp_path: Path, damage: str) -> None:
    """With nothing to fall back on, the start is refused in a sentence that names the file."""
    Authority(tmp_path).issue(*TENANT)
    _spoil(tmp_path, "tenant", damage)
    with pytest.raises(CertificatesUnusable, match=r"tenant\.(pem|key)|ca\.pem"):
        CertificateFiles(tmp_path / "tenant.pem", tmp_path / "tenant.key", tmp_path / "ca.pem")


def test_nothing_is_read_while_nothing_changed(tmp_path: Path) -> None:
    """Looking again returns the very same set; a second is not looked into twice."""
    authority, now = Authority(tmp_path), [0.0]
    authority.issue(*TENANT)
    paths = (tmp_path / "tenant.pem", tmp_path / "tenant.key", tmp_path / "ca.pem")
    files = CertificateFiles(*paths, look_every_seconds=1.0, clock=lambda: now[0])
    first = files.current()
    authority.issue(*TENANT)
    now[0] = 0.9
    assert files.current() is first
    now[0] = 1.1
    second = files.current()
    assert leaf_of(second).serial_number == serial_in(tmp_path, "tenant")
    now[0] = 5.0
    assert files.current() is second


def _spoil(folder: Path, name: str, damage: str) -> None:
    certificate, key, bundle = folder / f"{name}.pem", folder / f"{name}.key", folder / "ca.pem"
    match damage:
        case "half a certificate":
            certificate.write_bytes(certificate.read_bytes()[:200])
        case "half a key":
            key.write_bytes(key.read_bytes()[:100])
        case "another's key":
            key.write_bytes(Authority(_folder(folder, f"other-{name}")).key_pem())
        case "half a bundle":
            bundle.write_bytes(bundle.read_bytes() + bundle.read_bytes()[:200])
        case "no certificate":
            certificate.unlink()
        case _:
            raise ValueError(damage)


def _copy(folder: Path) -> Path:
    kept = _folder(folder, "before")
    for path in folder.iterdir():
        if path.is_file():
            (kept / path.name).write_bytes(path.read_bytes())
    return kept


def _folder(parent: Path, name: str) -> Path:
    made = parent / name
    made.mkdir()
    return made
