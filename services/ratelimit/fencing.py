"""What becomes of holds whose lease ended: the ledger is asked, and only its answer ends a hold. Time alone never does."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
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

    `leftovers`: something is kept that will be of no use in a while; `more`: something of no use is left. `wait_seconds`: until the next
    lease ends; 0 where there is something to do at once.
    """

    tenant_id: TenantId
    epoch: int | None
    lease_count: int
    reservation_ids: Sequence[ReservationId]
    leftovers: bool = False
    more: bool = False
    wait_seconds: float = 0.0


# Of one tenant: in which epoch the ledger was asked, and what it said of which calls.
Fences = tuple[TenantId, int, Sequence[tuple[ReservationId, FenceVerdict]]]


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

    async def apply_fences(self, fences: Sequence[Fences]) -> list[int | Unavailable]:
        """Releases VOID and SETTLED_BEFORE, pins UNRESOLVED, where epoch and state still fit; SETTLED waits.

        Returns of each tenant how many changed, or that its part of the store is away. Raises: Unavailable.
        """
        ...

    async def tenants_with_leases(self) -> Sequence[TenantId]:
        """Looks through the next part of the store for tenants that have leases; goes round and round."""
        ...


class Fencing:
    """Fences on demand, and sweeps once a second over the tenants of which something that this process has held may be left."""

    def __init__(
        self, store: FenceStore, ledger: FenceLedger, *, lease_seconds: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._lease_seconds = lease_seconds
        self._clock = clock
        # When each is to be looked at next: never later than a lease of it ends.
        self._watched: dict[TenantId, float] = {}
        self._under_way: dict[TenantId, asyncio.Future[None]] = {}

    def watch(self, tenant_id: TenantId) -> None:
        """Makes the next sweep look after the tenant, and later ones until it has no lease left, and nothing to forget."""
        self._watched[tenant_id] = 0.0

    def watch_lease(self, tenant_id: TenantId) -> None:
        """Does the same from when a lease ends that was given now, or may have been; what is due sooner stays due sooner."""
        self._look_by(tenant_id, self._clock() + self._lease_seconds)

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
        now = self._clock()
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
        unanswered = set(tenant_ids)
        for tenant_id in tenant_ids:
            # What is held while the store answers is of no answer: it puts its tenant back.
            self._watched.pop(tenant_id, None)
        try:
            found = await self._store.expired(tenant_ids, MOST_FENCES)
            for holds in found:
                unanswered.discard(holds.tenant_id)
                self._put_off(holds)
        finally:
            for tenant_id in unanswered:
                self.watch(tenant_id)
        asked = [(holds, reservation_id) for holds in found if holds.epoch is not None for reservation_id in holds.reservation_ids]
        away = [await self._ask(asked[start : start + MOST_FENCES]) for start in range(0, len(asked), MOST_FENCES)]
        return len(found) - sum(away)

    def _put_off(self, holds: ExpiredHolds) -> None:
        if holds.more:
            self.watch(holds.tenant_id)
        elif holds.lease_count:
            # No lease is longer, whatever the store's clock was before it was put right.
            self._look_by(holds.tenant_id, self._clock() + min(holds.wait_seconds, self._lease_seconds))
        elif holds.leftovers:
            self._look_by(holds.tenant_id, self._clock() + LEFTOVER_SECONDS)

    def _look_by(self, tenant_id: TenantId, due: float) -> None:
        if due < self._watched.get(tenant_id, math.inf):
            self._watched[tenant_id] = due

    async def _ask(self, asked: Sequence[tuple[ExpiredHolds, ReservationId]]) -> int:
        """Returns of how many tenants the store did not take the answers: the next sweep asks about them again."""
        calls = [(holds.tenant_id, reservation_id, holds.epoch or 0) for holds, reservation_id in asked]
        verdicts = await self._ledger.fence(calls, FENCE_TIMEOUT_SECONDS)
        by_tenant: dict[tuple[TenantId, int], list[tuple[ReservationId, FenceVerdict]]] = {}
        for (tenant_id, reservation_id, epoch), verdict in zip(calls, verdicts, strict=True):
            by_tenant.setdefault((tenant_id, epoch), []).append((reservation_id, verdict))
        fences = [(tenant_id, epoch, answers) for (tenant_id, epoch), answers in by_tenant.items()]
        changed = await self._store.apply_fences(fences)
        counts = [count for count in changed if isinstance(count, int)]
        log.info("leases_fenced", tenant_ids=[str(tenant_id) for tenant_id, _ in by_tenant], asked=len(calls), changed=sum(counts))
        return len(changed) - len(counts)
