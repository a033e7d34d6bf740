"""A tenant's configuration, fetched once per version.

The context token names the version, so a change of plan is seen with the next token and nothing needs invalidating. With a feed of
changes it is seen by who holds an older token too: a stream that goes on under the token it began with is held to what is in force.
"""

from mesh.tenant.v1 import tenant_service_pb2, tenant_service_pb2_grpc
from services.kernel.change_feed import ChangeFeed
from services.kernel.errors import Unauthenticated
from services.kernel.ids import TenantId
from services.kernel.rpc.channel import MeshChannel
from services.kernel.single_flight import SingleFlightCache
from services.kernel.tenant_context import TenantContext

FETCH_TIMEOUT_SECONDS = 2.0
CAPACITY = 10_000
# The kinds of changes after which a configuration is another.
CONFIG_CHANGES = ("CONFIG", "PLANS")


class TenantConfigCache:
    """Answers from memory when the version is known, and asks the tenant service once for all who wait otherwise."""

    def __init__(self, channel: MeshChannel, *, feed: ChangeFeed | None = None) -> None:
        self._channel = channel
        self._stub = tenant_service_pb2_grpc.TenantServiceStub(channel.channel)
        self._cache: SingleFlightCache[tuple[TenantId, int], tenant_service_pb2.TenantConfig] = SingleFlightCache(CAPACITY)
        if feed is not None:
            feed.forget_on(CONFIG_CHANGES, self._forget)

    async def get(self, context: TenantContext, at_least: int = 0) -> tenant_service_pb2.TenantConfig:
        """Returns the configuration of the context's tenant, of its version, of `at_least`, or newer.

        Raises: NotFound when the tenant is gone; Unavailable when the tenant service does not answer and the version is not in memory.
        """
        if context.tenant_id is None:
            raise Unauthenticated.context_missing()
        return await self._cache.get((context.tenant_id, max(at_least, context.config_version)), lambda: self._fetch(context))

    async def newest(self, context: TenantContext) -> tenant_service_pb2.TenantConfig:
        """Returns the configuration as it is now, and remembers nothing. Raises: as `get`, Unavailable whenever nobody answers."""
        return await self._fetch(context)

    def _forget(self, tenant_id: TenantId | None) -> None:
        if tenant_id is None:
            self._cache.forget(None)
        else:
            self._cache.forget_where(lambda key: key[0] == tenant_id)

    async def _fetch(self, context: TenantContext) -> tenant_service_pb2.TenantConfig:
        response = await self._channel.unary(
            self._stub.GetTenantConfig,
            tenant_service_pb2.GetTenantConfigRequest(),
            timeout_seconds=FETCH_TIMEOUT_SECONDS,
            tenant=context,
            idempotent=True,
        )
        return response.config
