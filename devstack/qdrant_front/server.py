"""The composition root: builds the store and the gRPC server, runs until told to stop, and closes everything in order."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from qdrant_client import grpc as q

from .access import Authenticator
from .data_dir import exclusive_use
from .gate import Gate
from .servicers.collections import Collections
from .servicers.health import Health
from .servicers.points import Points
from .store import Store

# Loopback only: the API key travels in clear text.
HOST = "127.0.0.1"
GRACE_SECONDS = 5
_OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", -1),
    # Two servers sharing a port would share the calls and not the data.
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What one server is told."""

    port: int
    data_dir: Path
    max_open_shards: int
    api_key: str = field(repr=False)


async def serve(settings: Settings, announce: Callable[[int], None], stop: asyncio.Event) -> None:
    """Serve until `stop` is set; `announce` is called once with the port, when calls are taken."""
    with exclusive_use(settings.data_dir):
        store = Store(settings.data_dir, settings.max_open_shards)
        try:
            await _serve(settings, store, announce, stop)
        finally:
            await store.close()


async def _serve(settings: Settings, store: Store, announce: Callable[[int], None], stop: asyncio.Event) -> None:
    server = grpc.aio.server(interceptors=[Gate(Authenticator(settings.api_key))], options=_OPTIONS)
    q.add_CollectionsServicer_to_server(Collections(store), server)  # type: ignore[no-untyped-call]  # generated without types
    q.add_PointsServicer_to_server(Points(store), server)  # type: ignore[no-untyped-call]  # generated without types
    q.add_QdrantServicer_to_server(Health(), server)  # type: ignore[no-untyped-call]  # generated without types
    standard_health = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(standard_health, server)
    port = server.add_insecure_port(f"{HOST}:{settings.port}")
    await server.start()
    await standard_health.set("", health_pb2.HealthCheckResponse.SERVING)
    announce(port)
    async with asyncio.TaskGroup() as tasks:
        flushing = tasks.create_task(store.keep_flushing())
        await stop.wait()
        await standard_health.enter_graceful_shutdown()
        await server.stop(GRACE_SECONDS)
        flushing.cancel()
