"""What tenants do with their receivers."""

from collections.abc import Collection, Sequence
from uuid import UUID

from services.kernel.errors import InvalidRequest, NotFound
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.webhook_signing import new_webhook_secret
from services.metering.webhooks.endpoint import Delivery, DeliveryPosition, DeliveryState, Endpoint, EndpointStore, refuse_address
from services.metering.webhooks.secrets import EndpointSecrets


class WebhookDesk:
    """Makes, changes and shows receivers and deliveries."""

    def __init__(self, store: EndpointStore, secrets: EndpointSecrets, *, private_addresses: bool) -> None:
        self._store = store
        self._secrets = secrets
        self._private_addresses = private_addresses

    async def create(self, tenant_id: TenantId, url: str) -> tuple[Endpoint, str]:
        """Makes a receiver; returns its secret, which is never shown again. Raises: InvalidRequest, LimitExceeded, WrongState."""
        refuse_address(url, private_addresses=self._private_addresses)
        endpoint_id, secret = new_uuid7(), new_webhook_secret()
        return await self._store.create(tenant_id, endpoint_id, url, self._secrets.seal(tenant_id, endpoint_id, secret)), secret

    async def list_all(self, tenant_id: TenantId) -> Sequence[Endpoint]:
        """Returns receivers, oldest first."""
        return await self._store.list_all(tenant_id)

    async def rotate(self, tenant_id: TenantId, endpoint_id: UUID, overlap_seconds: float) -> tuple[Endpoint, str]:
        """Makes a new secret, as `create` does. Raises: NotFound, WrongState."""
        secret = new_webhook_secret()
        sealed = self._secrets.seal(tenant_id, endpoint_id, secret)
        endpoint = await self._store.rotate(tenant_id, endpoint_id, sealed, overlap_seconds)
        if endpoint is None:
            raise NotFound("webhook_endpoint")
        return endpoint, secret

    async def delete(self, tenant_id: TenantId, endpoint_id: UUID) -> None:
        """Removes a receiver with its deliveries, if it is there."""
        await self._store.delete(tenant_id, endpoint_id)

    async def deliveries(
        self, tenant_id: TenantId, state: DeliveryState | None, endpoint_id: UUID | None, after: DeliveryPosition | None, size: int
    ) -> Sequence[Delivery]:
        """Returns up to `size` deliveries, newest first."""
        return await self._store.deliveries(tenant_id, state, endpoint_id, after, size)

    async def replay(self, tenant_id: TenantId, delivery_ids: Collection[UUID], dead_of: UUID | None) -> int:
        """Makes deliveries wait again; returns how many. Raises: InvalidRequest unless exactly one of the two is given."""
        if bool(delivery_ids) == (dead_of is not None):
            raise InvalidRequest("delivery_ids", "give either delivery_ids or dead_of_endpoint_id")
        return await self._store.replay(tenant_id, delivery_ids, dead_of)
