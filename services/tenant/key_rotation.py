"""Changes a tenant's data key online: new version, everything sealed again, old version gone. Refuses two rotations at once.

Every step may be repeated: a rotation that stopped anywhere goes on when it is asked for again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.kernel.errors import NotFound
from services.kernel.ids import TenantId
from services.kernel.tenant_context import TenantContext
from services.tenant.actor import Actor
from services.tenant.context_minting import PROVISIONING_SUBJECT, ContextMinter, Grant
from services.tenant.data_keys import DataKeyVault
from services.tenant.secret_box import SecretBox
from services.tenant.tenant_record import TenantDirectory

# What is left is in the hands of a writer: it is looked at again once that is over.
_BUSY_PAUSE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Rotated:
    """The version in use now and how many records this call sealed again."""

    active_version: int
    resealed_count: int


class SecretRecords(Protocol):
    """The sealed secrets among the tenant's records, and what is on record of its keys."""

    async def reseal(self, tenant_id: TenantId, reseal: Callable[[str, bytes], Awaitable[bytes]]) -> int:
        """Seals every secret again; returns how many."""
        ...

    async def note(self, tenant_id: TenantId, action: str, target: str, actor: Actor) -> None:
        """Puts a change of keys on record, once, and announces it."""
        ...


class ReencryptingPeer(Protocol):
    """A service that keeps sealed content."""

    async def reencrypt(self, context: TenantContext, active_version: int) -> tuple[int, bool]:
        """Seals some records again; returns how many, and whether none are left. Raises: MeshError."""
        ...


class KeyRotation:
    """Rotations of data keys."""

    def __init__(
        self,
        vault: DataKeyVault,
        box: SecretBox,
        records: SecretRecords,
        peers: Sequence[ReencryptingPeer],
        directory: TenantDirectory,
        minter: ContextMinter,
    ) -> None:
        self._vault = vault
        self._box = box
        self._records = records
        self._peers = peers
        self._directory = directory
        self._minter = minter

    async def rotate(self, tenant_id: TenantId, actor: Actor) -> Rotated:
        """Rotates, or goes on with the rotation under way, to its end. Raises: NotFound, WrongState(DESTROYED), Unavailable."""
        if await self._directory.get_facts(tenant_id) is None:
            raise NotFound("tenant")
        version = await self._vault.begin_rotation(tenant_id)
        await self._records.note(tenant_id, "DATA_KEY_ROTATED", f"data_key:{version}", actor)
        count = await self.reseal_secrets(tenant_id)
        for peer in self._peers:
            count += await self._reencrypt(peer, tenant_id, version)
        # Not before everything is sealed anew everywhere, and nothing can be sealed with an older one any more.
        await self._vault.retire(tenant_id, version)
        await self._records.note(tenant_id, "DATA_KEY_ROTATED", f"data_key:{version}", actor)
        return Rotated(version, count)

    async def reseal_secrets(self, tenant_id: TenantId) -> int:
        """Seals this service's own secrets of the tenant again under the active key; returns how many."""
        return await self._records.reseal(tenant_id, lambda purpose, sealed: self._box.reseal(tenant_id, purpose, sealed))

    async def _reencrypt(self, peer: ReencryptingPeer, tenant_id: TenantId, version: int) -> int:
        total = 0
        while True:
            # A context of its own for each page: the work may outlive one.
            count, done = await peer.reencrypt(await self._context(tenant_id), version)
            total += count
            if done:
                return total
            if not count:
                await asyncio.sleep(_BUSY_PAUSE_SECONDS)

    async def _context(self, tenant_id: TenantId) -> TenantContext:
        facts = await self._directory.get_facts(tenant_id)
        if facts is None:
            raise NotFound("tenant")
        return self._minter.mint(Grant(tenant_id, facts, PROVISIONING_SUBJECT, frozenset()))
