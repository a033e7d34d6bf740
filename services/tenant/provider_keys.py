"""A tenant's own key at the model provider: written once, never shown again, handed only to the service that calls the provider."""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from services.kernel.errors import NotFound
from services.kernel.ids import TenantId
from services.tenant.actor import Actor
from services.tenant.secret_box import SecretBox

PURPOSE = "provider_key"
_FINGERPRINT_DIGITS = 16

Seal = Callable[[], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class ProviderKeyInfo:
    """What is told of a key."""

    fingerprint: str
    update_time: datetime


class ProviderKeyStore(Protocol):
    """Where sealed keys are. Every method is one transaction of that tenant."""

    async def put(self, tenant_id: TenantId, fingerprint: str, seal: Seal, actor: Actor) -> ProviderKeyInfo:
        """Stores what `seal` returns, which is called once no rotation can overtake the write."""
        ...

    async def delete(self, tenant_id: TenantId, actor: Actor) -> None:
        """Removes it; nothing when there is none."""
        ...

    async def info(self, tenant_id: TenantId) -> ProviderKeyInfo | None:
        """Returns what is told of it."""
        ...

    async def sealed(self, tenant_id: TenantId, use: Callable[[bytes], Awaitable[bytes]]) -> bytes | None:
        """Returns what `use` makes of the sealed key, which no rotation takes away meanwhile; None when there is none."""
        ...


class ProviderKeys:
    """The own keys of whichever tenant a call acts for."""

    def __init__(self, store: ProviderKeyStore, box: SecretBox) -> None:
        self._store = store
        self._box = box

    async def put(self, tenant_id: TenantId, api_key: str, actor: Actor) -> ProviderKeyInfo:
        """Stores a key in place of an earlier one."""
        fingerprint = hashlib.sha256(tenant_id.bytes + api_key.encode()).hexdigest()[:_FINGERPRINT_DIGITS]
        return await self._store.put(tenant_id, fingerprint, lambda: self._box.seal(tenant_id, PURPOSE, api_key.encode()), actor)

    async def delete(self, tenant_id: TenantId, actor: Actor) -> None:
        """Removes it. Idempotent."""
        await self._store.delete(tenant_id, actor)

    async def info(self, tenant_id: TenantId) -> ProviderKeyInfo:
        """Returns what is told of it. Raises: NotFound."""
        info = await self._store.info(tenant_id)
        if info is None:
            raise NotFound("provider_key")
        return info

    async def open(self, tenant_id: TenantId) -> str:
        """Returns the key itself; empty when there is none. Raises: KeyUseFailed."""
        opened = await self._store.sealed(tenant_id, lambda sealed: self._box.open(tenant_id, PURPOSE, sealed))
        return "" if opened is None else opened.decode()
