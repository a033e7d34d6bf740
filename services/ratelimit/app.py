"""Composition root of the ratelimit service: builds everything by constructor and closes it in reverse order."""

from mesh.common.v1 import lifecycle_service_pb2_grpc
from mesh.ratelimit.v1 import rate_limit_service_pb2_grpc
from services.kernel.background import BackgroundTasks
from services.kernel.credential_resolver import remote_trust
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import MeshServer
from services.kernel.tenant_config import TenantConfigCache
from services.kernel.tenant_context import TenantContext
from services.ratelimit.adapters.metering_client import MeteringClient
from services.ratelimit.adapters.redis_link import ClusterLink, Link, PipelinedLink
from services.ratelimit.adapters.redis_store import RedisStore
from services.ratelimit.fencing import Fencing
from services.ratelimit.limits import Limits
from services.ratelimit.rebuild import Rebuilder
from services.ratelimit.reservation import Reservations
from services.ratelimit.servicers.rate_limit import RateLimitServicer
from services.ratelimit.servicers.tenant_lifecycle import TenantLifecycleServicer
from services.ratelimit.settings import RatelimitSettings

_LEASE_SECONDS = 5.0
# What may take longer than a decision: batches of commits, snapshots, sweeps. Few at a time, so that decisions get between them.
_BULK_TIMEOUT_SECONDS = 0.5
_BULK_BATCH = 8


class RatelimitApp:
    """The running service."""

    def __init__(
        self,
        server: MeshServer,
        background: BackgroundTasks,
        rebuilder: Rebuilder,
        links: tuple[Link, ...],
        channels: tuple[MeshChannel, ...],
    ) -> None:
        self.server = server
        self._background = background
        self._rebuilder = rebuilder
        self._links = links
        self._channels = channels

    async def close(self) -> None:
        """Stops the sweep and rebuilds, then closes the connections."""
        await self._background.close()
        await self._rebuilder.close()
        for link in self._links:
            await link.close()
        for channel in self._channels:
            await channel.close()


async def build(settings: RatelimitSettings) -> RatelimitApp:
    """Builds the service; neither Redis nor a peer needs to be up."""
    tenant = MeshChannel(settings.tenant_address, settings=settings, target_service="tenant")
    metering = MeshChannel(settings.metering_address, settings=settings, target_service="metering")
    decisions, bulk = _links(settings)
    store = RedisStore(decisions, bulk, lease_seconds=_LEASE_SECONDS)
    ledger = MeteringClient(metering)
    configs = TenantConfigCache(tenant)

    async def limits_of(context: TenantContext) -> Limits:
        return Limits.of((await configs.get(context)).limits)

    fencing = Fencing(store, ledger)
    rebuilder = Rebuilder(store, ledger)
    reservations = Reservations(store, limits_of, rebuilder, fencing)
    resolver, verifier = remote_trust(tenant)
    server = MeshServer(
        settings,
        servicers=[
            (
                rate_limit_service_pb2_grpc.add_RateLimitServiceServicer_to_server,
                RateLimitServicer(reservations, _LEASE_SECONDS),
                "mesh.ratelimit.v1.RateLimitService",
            ),
            (
                lifecycle_service_pb2_grpc.add_TenantLifecycleServiceServicer_to_server,
                TenantLifecycleServicer(store),
                "mesh.common.v1.TenantLifecycleService",
            ),
        ],
        resolver=resolver,
        verifier=verifier,
    )
    background = BackgroundTasks()
    background.start("ratelimit.lease_sweep", fencing.run)
    return RatelimitApp(server, background, rebuilder, (decisions, bulk), (metering, tenant))


def _links(settings: RatelimitSettings) -> tuple[Link, Link]:
    if settings.redis_cluster:
        return (
            ClusterLink(settings.redis_url.get_secret_value(), timeout_seconds=settings.redis_timeout_seconds),
            ClusterLink(settings.redis_url.get_secret_value(), timeout_seconds=_BULK_TIMEOUT_SECONDS),
        )
    decisions = PipelinedLink(
        settings.redis_url.get_secret_value(), connections=settings.redis_connections, timeout_seconds=settings.redis_timeout_seconds
    )
    return decisions, PipelinedLink(
        settings.redis_url.get_secret_value(), connections=1, timeout_seconds=_BULK_TIMEOUT_SECONDS, max_batch=_BULK_BATCH
    )
