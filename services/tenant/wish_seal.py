"""Seals the addresses of a place that a wish came with, for the time until they are used. Refuses to make a key nobody would know of."""

import base64
import json
from typing import Protocol

from services.kernel.ids import TenantId
from services.tenant.life_ports import DataKeyStore, SecretSeal
from services.tenant.placement import PlacementWish, SiloStores
from services.tenant.saga import Saga
from services.tenant.tenant_wish import SEALED_STORES, TenantWish, read_wish


class KeyNotes(Protocol):
    """Notes of data keys that are made for tenants which are not recorded yet. Every method is one transaction."""

    async def note_key(self, tenant_id: TenantId) -> None:
        """Notes that a key is made next: recording the tenant takes the note along."""
        ...

    async def forget_key(self, tenant_id: TenantId) -> None:
        """Removes the note of a key that is destroyed."""
        ...


class WishSeal:
    """Sealed under the tenant's own key, which is the first thing there is of it."""

    def __init__(self, notes: KeyNotes, seal: SecretSeal, data_keys: DataKeyStore) -> None:
        self._notes = notes
        self._seal = seal
        self._data_keys = data_keys

    async def seal(self, tenant_id: TenantId, wish: TenantWish) -> str:
        """Returns the addresses of a place somebody else made, sealed; empty when there are none."""
        if wish.placement.silo == SiloStores():
            return ""
        plain = json.dumps(wish.placement.silo.named()).encode()
        return base64.b64encode(await self._seal.seal(tenant_id, SEALED_STORES, plain)).decode()

    async def seal_before_record(self, tenant_id: TenantId, wish: TenantWish) -> str:
        """As `seal` for a tenant that is not recorded yet: what a crash leaves of its key is known, and swept."""
        if wish.placement.silo == SiloStores():
            return ""
        await self._notes.note_key(tenant_id)
        return await self.seal(tenant_id, wish)

    async def drop(self, tenant_id: TenantId) -> None:
        """Destroys the keys of a tenant that was not recorded after all."""
        await self._data_keys.destroy(tenant_id)
        await self._notes.forget_key(tenant_id)

    async def open(self, saga: Saga) -> PlacementWish:
        """Returns the place that a recorded wish asks for, with its addresses."""
        wish, sealed = read_wish(saga.content), saga.content.get(SEALED_STORES, "")
        if not sealed:
            return wish.placement
        plain = await self._seal.open(saga.tenant_id, SEALED_STORES, base64.b64decode(sealed))
        return PlacementWish(wish.placement.kind, SiloStores(**json.loads(plain)))
