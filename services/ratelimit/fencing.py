"""What becomes of holds whose lease ended: the ledger is asked, and only its answer ends a hold. Time alone never does."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import structlog

from services.kernel.errors import MeshError, Unavailable
from services.kernel.ids import ReservationId, TenantId
from services.kernel.request_context import RequestScope, enter_scope

log = structlog.get_logger(__name__)

FENCE_TIMEOUT_SECONDS = 1.0
SWEEP_SECONDS = 1.0
MOST_FENCES = 500
_SWEEP_CHUNK = 64
# A tenant without leases is looked at this seldom, until nothing is left of its calls but sums.
LEFTOVER_SECONDS = 30.0


class FenceVerdict(StrEnum):
    """What the ledger says of a call whose lease ended."""

    VOID = "void"
    UNRESOLVED = "unresolved"
    SETTLED = "settled"
    SETTLED_BEFORE = "settled_before"


@dataclass(frozen=True, slots=True)
class ExpiredHolds:
    """A tenant's holds with an ended lease, and how many leases there are in all. `epoch` is None while the tenant has no counters.

    `leftovers`: something is kept that will be of no use in a while.
    """

    tenant_id: TenantId
    epoch: int | None
    lease_count: int
    reservation_ids: Sequence[ReservationId]
    leftovers: bool = False


class FenceLedger(Protocol):
    """Says what calls are, for good: an unknown one can never be opened after it was asked about."""

    async def fence(self, calls: Sequence[tuple[TenantId, ReservationId, int]], timeout_seconds: float) -> list[FenceVerdict]:
        """Returns one verdict a call (tenant, reservation, epoch), in order. Raises: MeshError."""
        ...


class FenceStore(Protocol):
    """Keeps the leases."""

    async def expired(self, tenant_ids: Sequence[TenantId], at_most: int) -> list[ExpiredHolds]:
        """Lists ended leases and forgets what no rule counts any more. A store that does not answer leaves its tenants out."""
        ...

    async def apply_fences(self, tenant_id: TenantId, epoch: int, verdicts: Sequence[tuple[ReservationId, FenceVerdict]]) -> int:
        """Releases VOID and SETTLED_BEFORE, pins UNRESOLVED, where epoch and state still fit; SETTLED waits. Returns how many changed."""
        ...

    async def tenants_with_leases(self) -> Sequence[TenantId]:
        """Looks through the next part of the store for tenants that have leases; goes round and round."""
        ...


class Fencing:
    """Fences on demand, and sweeps once a second over the tenants that this process has held something for."""

    def __init__(self, store: FenceStore, ledger: FenceLedger) -> None:
        self._store = store
        self._ledger = ledger
        # When each is to be looked at next.
        self._watched: dict[TenantId, float] = {}
        self._under_way: dict[TenantId, asyncio.Future[None]] = {}

    def watch(self, tenant_id: TenantId) -> None:
        """Makes the sweep look after the tenant until it has no lease left, and nothing to forget."""
        self._watched[tenant_id] = 0.0

    async def fence_expired(self, tenant_id: TenantId) -> None:
        """Asks about all ended leases of a tenant, once for all callers who wait. Raises: Unavailable when the ledger does not answer."""
        under_way = self._under_way.get(tenant_id)
        if under_way is None:
            # Shared by its waiters, so it must outlive the first of them: it is kept here until it is done.
            under_way = asyncio.ensure_future(self._fence_tenant(tenant_id))
            self._under_way[tenant_id] = under_way
            under_way.add_done_callback(lambda done: self._ended(tenant_id, done))
        try:
            await asyncio.shield(under_way)
        except Unavailable:
            raise
        except MeshError as error:
            # The ledger's own trouble is no fault of this caller, whose deadline may be far away.
            raise Unavailable("metering") from error

    async def run(self) -> None:
        """Sweeps until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await self.sweep()
            except MeshError as error:
                # Holds stay until the ledger answers: that is the rule, and the next sweep asks again.
                log.warning("fence_sweep_failed", reason=error.reason_name)

    async def sweep(self) -> None:
        """Fences every ended lease of the watched tenants, and adds tenants that a lost replica left behind.

        A part of the store that is away keeps no hold of the others.
        """
        try:
            for tenant_id in await self._store.tenants_with_leases():
                self.watch(tenant_id)
        except Unavailable:
            log.warning("lease_scan_failed")
        now = time.monotonic()
        tenant_ids = [tenant_id for tenant_id, due in self._watched.items() if due <= now]
        for start in range(0, len(tenant_ids), _SWEEP_CHUNK):
            await self._fence(tenant_ids[start : start + _SWEEP_CHUNK])

    def _ended(self, tenant_id: TenantId, done: asyncio.Future[None]) -> None:
        self._under_way.pop(tenant_id, None)
        if not done.cancelled():
            # Every waiter may have been cancelled: the failure was told to whoever is left.
            done.exception()

    async def _fence_tenant(self, tenant_id: TenantId) -> None:
        enter_scope(RequestScope())  # the first caller's deadline is not everyone's
        if not await self._fence([tenant_id]):
            raise Unavailable("redis")

    async def _fence(self, tenant_ids: Sequence[TenantId]) -> int:
        """Returns how many of the tenants the store answered for."""
        found = await self._store.expired(tenant_ids, MOST_FENCES)
        for holds in found:
            self._put_off(holds)
        asked = [(holds, reservation_id) for holds in found if holds.epoch is not None for reservation_id in holds.reservation_ids]
        for start in range(0, len(asked), MOST_FENCES):
            await self._ask(asked[start : start + MOST_FENCES])
        return len(found)

    def _put_off(self, holds: ExpiredHolds) -> None:
        if holds.lease_count:
            return
        if holds.leftovers:
            self._watched[holds.tenant_id] = time.monotonic() + LEFTOVER_SECONDS
        else:
            self._watched.pop(holds.tenant_id, None)

    async def _ask(self, asked: Sequence[tuple[ExpiredHolds, ReservationId]]) -> None:
        calls = [(holds.tenant_id, reservation_id, holds.epoch or 0) for holds, reservation_id in asked]
        verdicts = await self._ledger.fence(calls, FENCE_TIMEOUT_SECONDS)
        by_tenant: dict[tuple[TenantId, int], list[tuple[ReservationId, FenceVerdict]]] = {}
        for (tenant_id, reservation_id, epoch), verdict in zip(calls, verdicts, strict=True):
            by_tenant.setdefault((tenant_id, epoch), []).append((reservation_id, verdict))
        for (tenant_id, epoch), answers in by_tenant.items():
            changed = await self._store.apply_fences(tenant_id, epoch, answers)
            log.info("leases_fenced", tenant_id=str(tenant_id), asked=len(answers), changed=changed)
