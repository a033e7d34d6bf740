"""A tenant's own provider key, fetched from the tenant service. In memory alone, at most 300 s, and never logged."""

from mesh.tenant.v1 import secret_service_pb2, secret_service_pb2_grpc
from services.kernel.errors import Unauthenticated
from services.kernel.ids import TenantId
from services.kernel.rpc.channel import MeshChannel
from services.kernel.tenant_context import TenantContext
from services.kernel.timed_cache import TimedCache

TRUSTED_SECONDS = 300.0
CAPACITY = 10_000
_TIMEOUT_SECONDS = 2.0


class TenantProviderKeys:
    """Answers from memory for up to 300 s. `forget` is for the change feed, and for a key the provider refused."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        self._stub = secret_service_pb2_grpc.SecretServiceStub(channel.channel)
        self._cache: TimedCache[TenantId, str] = TimedCache(CAPACITY, TRUSTED_SECONDS)

    async def get(self, context: TenantContext) -> str:
        """Returns the own key of the context's tenant; empty when it has none. Raises: MeshError: the house's key is no way out then."""
        if context.tenant_id is None:
            raise Unauthenticated.context_missing()
        return await self._cache.get(context.tenant_id, lambda: self._fetch(context))

    def forget(self, tenant_id: TenantId | None) -> None:
        """Drops a tenant's key, or everybody's: the next call asks again."""
        self._cache.forget(tenant_id)

    async def _fetch(self, context: TenantContext) -> str:
        response = await self._channel.unary(
            self._stub.GetProviderKey,
            secret_service_pb2.GetProviderKeyRequest(),
            timeout_seconds=_TIMEOUT_SECONDS,
            tenant=context,
            idempotent=True,
        )
        return response.api_key
