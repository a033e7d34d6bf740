"""What is removed by time or after a crash: ended sagas and delivered events past their term, and keys of tenants that never were.

Refuses to remove what somebody may still ask for: receipts, events that wait or were given up, and sagas that have not ended.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Protocol

import structlog

from services.kernel.errors import MeshError
from services.kernel.ids import TenantId
from services.tenant.life_ports import DataKeyStore

log = structlog.get_logger(__name__)

TENANTS_AT_ONCE = 200
# Longer than any creation is between making a key and recording its tenant.
UNRECORDED_SECONDS = 600.0


class HistoryStore(Protocol):
    """Ended sagas with their steps, and delivered events."""

    async def past(self, term: timedelta, limit: int) -> Sequence[TenantId]:
        """Returns tenants with something older than the term."""
        ...

    async def forget(self, tenant_id: TenantId, term: timedelta) -> int:
        """Removes what is older in one transaction; returns how many records. Idempotent."""
        ...


class UnrecordedKeys(Protocol):
    """Notes of keys that were made for tenants which are not recorded."""

    async def left(self, older_than_seconds: float, limit: int) -> Sequence[TenantId]:
        """Returns tenants whose note is that old."""
        ...

    async def settle(self, tenant_id: TenantId, destroy: Callable[[TenantId], Awaitable[int]]) -> bool:
        """Destroys the keys behind a note and removes it, while nobody can record the tenant; False when it was recorded or settled."""
        ...


class HistoryKeeper:
    """Forgets what is past its term."""

    def __init__(self, store: HistoryStore, *, days: int) -> None:
        self._store = store
        self._term = timedelta(days=days)

    async def sweep(self) -> int:
        """Forgets a batch of tenants' past; returns how many tenants there were."""
        tenant_ids = await self._store.past(self._term, TENANTS_AT_ONCE)
        removed = sum([await self._store.forget(tenant_id, self._term) for tenant_id in tenant_ids])
        if removed:
            log.info("history_forgotten", tenants=len(tenant_ids), records=removed)
        return len(tenant_ids)


class KeySweeper:
    """Destroys the keys that a crash left without a tenant."""

    def __init__(self, notes: UnrecordedKeys, data_keys: DataKeyStore) -> None:
        self._notes = notes
        self._data_keys = data_keys

    async def sweep(self) -> int:
        """Settles a batch of notes; returns how many there were."""
        tenant_ids = await self._notes.left(UNRECORDED_SECONDS, TENANTS_AT_ONCE)
        for tenant_id in tenant_ids:
            if await self._notes.settle(tenant_id, self._data_keys.destroy):
                log.info("unrecorded_key_destroyed", tenant_id=str(tenant_id))
        return len(tenant_ids)


async def sweep_forever(sweep: Callable[[], Awaitable[int]], poll_seconds: float) -> None:
    """Sweeps until cancelled: at once while batches are full, else after a pause. What fails is tried again."""
    while True:
        try:
            found = await sweep()
        except MeshError as error:
            found = 0
            log.warning("sweep_failed", reason=error.reason_name)
        if found < TENANTS_AT_ONCE:
            await asyncio.sleep(poll_seconds * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
