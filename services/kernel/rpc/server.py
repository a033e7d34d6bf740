"""The one way to serve: six interceptors in a fixed order, health, reflection, TLS or loopback, and an end that lets calls finish.

Refuses to be built with a method that has no policy.
"""

import asyncio
import gc
import signal
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Protocol

import grpc
import structlog
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.kernel.cell import cell_of
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.credential_resolver import CredentialResolver
from services.kernel.rpc.acceptance import accepting_server
from services.kernel.rpc.auth import AuthInterceptor
from services.kernel.rpc.certificates import CertificateFiles, Certificates
from services.kernel.rpc.deadline import DeadlineInterceptor
from services.kernel.rpc.identity import ServiceIdentity
from services.kernel.rpc.interceptor import MeshInterceptor
from services.kernel.rpc.policy import PolicyInterceptor, policies_of
from services.kernel.rpc.status import StatusInterceptor
from services.kernel.rpc.trace import TraceInterceptor
from services.kernel.rpc.validation import ValidationInterceptor
from services.kernel.rpc.wakes import wake_behind_the_loop, woken_once
from services.kernel.settings import ServiceSettings
from services.kernel.telemetry.logging import configure_logging
from services.kernel.telemetry.tracing import configure_tracing, shutdown_tracing

log = structlog.get_logger(__name__)

# The generated add_…_to_server function, the servicer and its full name, such as mesh.tenant.v1.TenantService.
Registration = tuple[Callable[[Any, grpc.aio.Server], None], object, str]

_MAX_METADATA_BYTES = 16 * 1024
# A message that is too large is let in up to so many times the size, so that its refusal says so: grpc's own tells no reason.
_OVERSIZE = 3
_GC_ALLOCATIONS = 20_000


class MeshServer:
    """A grpc.aio server of one service."""

    def __init__(
        self,
        settings: ServiceSettings,
        *,
        servicers: Sequence[Registration],
        resolver: CredentialResolver,
        verifier: ContextTokenVerifier,
        own_checks: Collection[str] = (),
    ) -> None:
        self._settings = settings
        self._names = [name for _, _, name in servicers]
        self._health = health.aio.HealthServicer()
        self._health_server: grpc.aio.Server | None = None
        self._stopping = asyncio.Event()
        self._on_drain: list[Callable[[], None]] = []
        self._port = 0
        self.interceptors = build_interceptors(settings, self._names, resolver, verifier, own_checks)
        self._failure: BaseException | None = None
        self._server = accepting_server(self.interceptors, _server_options(settings), self._failed)
        for add, servicer, _ in servicers:
            add(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)

    @property
    def settings(self) -> ServiceSettings:
        """What the server was built with."""
        return self._settings

    @property
    def bound_port(self) -> int:
        """The port in use, known after start; differs from the setting when that says 0."""
        return self._port

    async def start(self) -> None:
        """Binds, serves and reports SERVING for every servicer."""
        self._port = self._bind()
        await self._server.start()
        wake_behind_the_loop()
        if self._settings.health_address:
            self._health_server = accepting_server([], [])
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_server)
            self._health_server.add_insecure_port(self._settings.health_address)
            await self._health_server.start()
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("server_started", address=self._settings.listen_address, port=self._port, tls=self._settings.tls_enabled)

    async def serve_until_signal(self) -> None:
        """Serves until SIGTERM, SIGINT or `request_stop`, then drains and closes. Starts the server unless it is running.

        Raises: what ended a server that nobody stopped. It must end its process, or probes would find that healthy for ever.
        """
        if not self._port:
            await self.start()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request_stop)
        try:
            await self._stopping.wait()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        await self.stop()
        if self._failure is not None:
            raise self._failure

    def request_stop(self) -> None:
        """Ends `serve_until_signal`, as a signal does."""
        self._stopping.set()

    def on_drain(self, callback: Callable[[], None]) -> None:
        """Calls back when listening ends: for streams that have no end of their own, which the grace time would wait for."""
        self._on_drain.append(callback)

    async def stop(self) -> None:
        """Reports NOT_SERVING, waits for endpoint removal, lets calls finish within the grace time."""
        log.info("server_draining", seconds=self._settings.drain_seconds)
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(self._settings.endpoint_removal_seconds)
        for callback in self._on_drain:
            callback()
        await self._server.stop(self._settings.drain_seconds)
        if self._health_server is not None:
            await self._health_server.stop(None)
        log.info("server_stopped")

    def _failed(self, failure: BaseException) -> None:
        self._failure = failure
        self.request_stop()

    def _bind(self) -> int:
        if not self._settings.tls_enabled:
            return self._server.add_insecure_port(self._settings.listen_address)
        return self._server.add_secure_port(self._settings.listen_address, server_credentials(CertificateFiles.of(self._settings)))


def build_interceptors(
    settings: ServiceSettings,
    services: Sequence[str],
    resolver: CredentialResolver,
    verifier: ContextTokenVerifier,
    own_checks: Collection[str] = (),
) -> list[MeshInterceptor]:
    """Builds the six, outermost first.

    trace first, so that every later refusal has a trace; deadline next, so that the mapping of errors can tell a passed deadline from a
    fault; status around all that may refuse; auth before policy, which judges proven callers only; validation last, so that no stranger
    makes this process read or check a message.
    """
    identity = ServiceIdentity(tls=settings.tls_enabled, peer_hashes=settings.peer_hashes())
    return [
        TraceInterceptor(log_calls=settings.log_level.upper() == "DEBUG"),
        DeadlineInterceptor(),
        StatusInterceptor(),
        AuthInterceptor(identity, resolver, verifier, cell_of(settings)),
        PolicyInterceptor(policies_of(services)),
        ValidationInterceptor(own_checks, max_bytes=settings.max_message_bytes),
    ]


def server_credentials(files: CertificateFiles) -> grpc.ServerCredentials:
    """Serves what the files hold at each handshake. Every caller must show a certificate of the mesh's authority."""
    served = files.current()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        # Called by grpc at each handshake, on threads of its own; None keeps what is served.
        nonlocal served
        found = files.current()
        if found is served:
            return None
        served = found
        return _server_configuration(found)

    initial = _server_configuration(served)
    return grpc.dynamic_ssl_server_credentials(initial, changed, require_client_authentication=True)  # type: ignore[arg-type] # None too


def _server_configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(certificates.key, certificates.chain)], certificates.authorities)


def _server_options(settings: ServiceSettings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", _OVERSIZE * settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * _MAX_METADATA_BYTES),
        # Clients look up addresses again only when a connection ends: without an age, new pods would get no calls.
        ("grpc.max_connection_age_ms", int(settings.max_connection_age_seconds * 1000)),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        # Two processes on one port would each get half of the calls, unnoticed.
        ("grpc.so_reuseport", 0),
    ]


class App(Protocol):
    """What a service's composition root returns."""

    @property
    def server(self) -> MeshServer:
        """The server, not started yet."""
        ...

    async def close(self) -> None:
        """Closes everything the root built, in reverse order."""
        ...


def run_service(build: Callable[[], Awaitable[App]], settings: ServiceSettings | None = None) -> None:
    """Runs one service until it is told to stop: event loop, logs, traces, server, and the end of each in reverse order."""
    known = settings or ServiceSettings()
    configure_logging(known.service_name or "tenantry", known.log_level)
    uvloop.run(_run(build, known))


def _settle_garbage_collector() -> None:
    # What is there after the start stays: looking through it again and again, for cycles that requests rarely make, costs CPU.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_ALLOCATIONS, 20, 50)


async def _run(build: Callable[[], Awaitable[App]], settings: ServiceSettings) -> None:
    configure_tracing(settings)
    try:
        with woken_once():
            app = await build()
            _settle_garbage_collector()
            try:
                await app.server.serve_until_signal()
            finally:
                await app.close()
    finally:
        shutdown_tracing()
