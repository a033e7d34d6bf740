"""Counters that are gone come back from the ledger, in one snapshot that answers this store's own last request.

The rules: docs/protocol.md, 5 and 6.
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import structlog

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import MeshError, NotFound, Unavailable
from services.kernel.ids import ReservationId, TenantId
from services.kernel.request_context import bind_tenant
from services.kernel.tenant_context import TenantContext
from services.ratelimit.counter import Family
from services.ratelimit.limits import NOBODY, Subject
from services.ratelimit.terms import CountedPeriod, Terms

log = structlog.get_logger(__name__)

REBUILD_SECONDS = 3.0
SNAPSHOT_SECONDS = 2.0
_LOOK_SECONDS = 0.02


class CountedState(StrEnum):
    """What a call of the snapshot is to the limits."""

    HELD = "held"
    PINNED = "pinned"
    SETTLED = "settled"
    VOID = "void"


class Begin(StrEnum):
    """What the store says to a request for a rebuild."""

    READY = "ready"
    PENDING = "pending"
    BEGUN = "begun"
    ERASED = "erased"


@dataclass(frozen=True, slots=True)
class CountedCall:
    """One call of the snapshot, or one consumption (attempt 0): settled at what it used, held and pinned at their bound."""

    reservation_id: ReservationId
    state: CountedState
    reserve_us: int
    tokens: int
    cost_nano_usd: int
    subject: Subject = NOBODY
    attempt: int = 1
    product_unit: str = ""
    quantity: int = 0


@dataclass(frozen=True, slots=True)
class CountedSum:
    """What is settled of one period and subject, and the families whose counter it is."""

    families: Sequence[Family]
    start_us: int
    amount: int
    user: str = ""
    feature: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the limits of a tenant must count, as of the moment its epoch began."""

    epoch: int
    calls: Sequence[CountedCall]
    sums: Sequence[CountedSum] = ()


# What the ledger is to add up, and the families whose counters the sums are.
CountedPeriods = Mapping[CountedPeriod, Sequence[Family]]


class SnapshotLedger(Protocol):
    """Begins epochs."""

    async def begin_epoch(
        self,
        context: TenantContext,
        nonce: str,
        periods: CountedPeriods,
        recent_seconds: int,
        timeout_seconds: float,
    ) -> Snapshot:
        """Begins a new epoch and returns its snapshot: sums of the periods, and every call that ended lately. Raises: MeshError."""
        ...


class SnapshotStore(Protocol):
    """Loads a snapshot where it has nothing."""

    async def begin(self, tenant_id: TenantId, nonce: str, terms: Terms) -> tuple[Begin, int]:
        """Writes down the nonce of the only snapshot that may be loaded, unless these rules' counters are there or another has asked.

        Returns also the store's time.
        """
        ...

    async def load(self, tenant_id: TenantId, nonce: str, snapshot: Snapshot, terms: Terms) -> bool:
        """Replaces everything by the snapshot; False when another request was made since."""
        ...


class Rebuilder:
    """Rebuilds a tenant once for all who wait in this process; between processes the store's nonce decides."""

    def __init__(self, store: SnapshotStore, ledger: SnapshotLedger) -> None:
        self._store = store
        self._ledger = ledger
        self._under_way: dict[TenantId, asyncio.Task[None]] = {}

    async def ensure(self, context: TenantContext, terms: Terms) -> None:
        """Returns once a rebuild has ended, this one or one that was under way.

        Raises: Unavailable LIMITS_REBUILDING, NotFound for an erased tenant.
        """
        tenant_id = context.tenant_id
        if tenant_id is None:
            msg = "a rebuild needs a tenant"
            raise RuntimeError(msg)
        under_way = self._under_way.get(tenant_id)
        if under_way is None:
            # The first caller's deadline is not everyone's: the rebuild has its own, and is kept here until it is done.
            under_way = asyncio.get_running_loop().create_task(self._bounded(context, tenant_id, terms), name="ratelimit.rebuild")
            self._under_way[tenant_id] = under_way
            under_way.add_done_callback(lambda done: self._ended(tenant_id, done))
        await asyncio.shield(under_way)

    async def close(self) -> None:
        """Stops rebuilds under way; their nonces die in the store."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)

    def _ended(self, tenant_id: TenantId, done: asyncio.Task[None]) -> None:
        self._under_way.pop(tenant_id, None)
        if not done.cancelled():
            done.exception()  # every waiter may have gone

    async def _bounded(self, context: TenantContext, tenant_id: TenantId, terms: Terms) -> None:
        bind_tenant(context)
        try:
            async with asyncio.timeout(REBUILD_SECONDS):
                await self._rebuild(context, tenant_id, terms)
        except TimeoutError:
            raise rebuilding("it takes longer than usual") from None

    async def _rebuild(self, context: TenantContext, tenant_id: TenantId, terms: Terms) -> None:
        while True:
            nonce = secrets.token_hex(16)
            begun, now_us = await self._store.begin(tenant_id, nonce, terms)
            match begun:
                case Begin.READY:
                    return
                case Begin.ERASED:
                    raise NotFound("tenant")
                case Begin.PENDING:
                    # Overwriting it would void an answer that is on its way; it stops counting after a second.
                    await asyncio.sleep(_LOOK_SECONDS)
                case Begin.BEGUN:
                    snapshot = await self._snapshot(context, nonce, terms, now_us)
                    if await self._store.load(tenant_id, nonce, snapshot, terms):
                        return

    async def _snapshot(self, context: TenantContext, nonce: str, terms: Terms, now_us: int) -> Snapshot:
        periods = terms.counted_periods(now_us)
        try:
            snapshot = await self._ledger.begin_epoch(context, nonce, periods, terms.recent_seconds, SNAPSHOT_SECONDS)
        except MeshError as error:
            log.warning("rebuild_failed", reason=error.reason_name)
            raise rebuilding("the ledger does not answer") from error
        log.info("limits_rebuilt", epoch=snapshot.epoch, calls=len(snapshot.calls))
        return snapshot


def rebuilding(why: str) -> Unavailable:
    """The answer while a tenant has no counters."""
    return Unavailable(
        "metering",
        f"the tenant's limits are being rebuilt from the ledger ({why}); try again shortly",
        reason=error_reason_pb2.ERROR_REASON_LIMITS_REBUILDING,
    )
