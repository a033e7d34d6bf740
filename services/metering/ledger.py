"""The ledger: opens, extends, settles, ends, renews and fences calls in group commits, records units, and tells the limits of every end.

Refuses nothing by itself but unproven tenants: what may follow what is decided inside the store's transaction.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol, Self, TypeVar
from uuid import UUID

import structlog

from services.kernel.errors import Unavailable
from services.kernel.ids import new_uuid7s
from services.metering.call import (
    CallKey,
    CallState,
    Ended,
    Ending,
    ExtendOutcome,
    Extension,
    Fenced,
    Fencing,
    Opened,
    Opening,
    OpenOutcome,
    PriceKey,
    RatedSettlement,
    Settled,
    Settlement,
    SettleOutcome,
    VoidKind,
)
from services.metering.group_commit import GroupCommit
from services.metering.outbox import CallEnd, EndKind
from services.metering.price_catalog import PriceCatalog
from services.metering.rating import cost_nano_usd
from services.metering.unit_use import Recorded, RecordUnitsOutcome, UnitUse

log = structlog.get_logger(__name__)

_REMEMBERED_CALLS = 100_000
# A caller that is answered may call again at once: its slot must be free by then. Longer than this it is the limits that are slow.
_TELL_SECONDS = 0.05
_END_KINDS = {VoidKind.NOT_BILLED: EndKind.VOID, VoidKind.UNKNOWN: EndKind.PIN}
_NOT_PROVEN = Opened(OpenOutcome.TENANT_NOT_PROVEN, CallState.NONE)
_USE_NOT_PROVEN = Recorded(RecordUnitsOutcome.TENANT_NOT_PROVEN, None)


class Proving(Protocol):
    """An item that brings the proof of its tenant."""

    @property
    def tenant_id(self) -> bytes:
        """Whose it says it is."""
        ...

    @property
    def context_token(self) -> str:
        """What proves it."""
        ...

    def in_tier(self, tier: str) -> Self:
        """Returns the same item of a tenant in that tier."""
        ...


I = TypeVar("I", bound=Proving)  # noqa: E741 - item
O = TypeVar("O")  # noqa: E741 - outcome


class LedgerStore(Protocol):
    """The ledger's table, one transaction a call of these; outcomes in the order of the items."""

    async def open(self, items: Sequence[Opening]) -> Sequence[Opened]:
        """Records attempts."""
        ...

    async def extend(self, items: Sequence[Extension]) -> Sequence[ExtendOutcome]:
        """Raises bounds of open attempts; never lowers one."""
        ...

    async def record(self, items: Sequence[UnitUse]) -> Sequence[Recorded]:
        """Records uses of units, each with its entry and its outbox row."""
        ...

    async def price_keys(self, keys: Sequence[CallKey]) -> Sequence[PriceKey | None]:
        """Returns what opened calls are rated by; None for calls never opened. Reads only."""
        ...

    async def settle(self, items: Sequence[RatedSettlement]) -> Sequence[Settled]:
        """Records bills, each with its entry and its outbox row."""
        ...

    async def end(self, items: Sequence[Ending]) -> Sequence[Ended]:
        """Ends attempts without a bill."""
        ...

    async def renew(self, keys: Sequence[CallKey]) -> Sequence[bool]:
        """Prolongs leases and tells of each whether its call is still open."""
        ...

    async def fence(self, items: Sequence[Fencing]) -> Sequence[Fenced]:
        """Decides calls whose lease at the limits ended."""
        ...


class EndSink(Protocol):
    """Takes ends that are already in the outbox, to tell them sooner than the poller would."""

    def send(self, ends: Iterable[CallEnd]) -> None:
        """Takes them; never waits, may drop."""
        ...

    async def told(self, *, within_seconds: float) -> None:
        """Waits until the limits know all that was taken so far, at most for that time."""
        ...


class Ledger:
    """The state machine of calls for batches over tenants. Every answer was committed before it is returned."""

    def __init__(
        self,
        store: LedgerStore,
        prices: PriceCatalog,
        ends: EndSink,
        *,
        tier_of: Callable[[str, bytes], Awaitable[str | None]],
    ) -> None:
        self._store = store
        self._prices = prices
        self._ends = ends
        self._tier_of = tier_of
        # What calls opened here are rated by, to settle them without asking first. Never stale: an opened call keeps its price.
        self._price_keys: dict[bytes, PriceKey] = {}
        self._opens = GroupCommit(store.open)
        self._extensions = GroupCommit(store.extend)
        self._uses = GroupCommit(self._record_batch)
        self._settles = GroupCommit(self._settle_batch)
        self._endings = GroupCommit(self._end_batch)
        self._renewals = GroupCommit(store.renew)
        self._fences = GroupCommit(self._fence_batch)

    async def open(self, items: Sequence[Opening]) -> list[Opened]:
        """Records attempts whose context token proves their tenant; the others leave no trace."""
        answers = await self._of_the_proven(items, self._opens, _NOT_PROVEN)
        for item, result in zip(items, answers, strict=True):
            if result.outcome is OpenOutcome.OPENED:
                self._remember(item)
        return answers

    async def extend(self, items: Sequence[Extension]) -> list[ExtendOutcome]:
        """Raises the bounds of open attempts, before more than the old ones is used."""
        return await self._extensions.submit(items)

    async def record(self, items: Sequence[UnitUse]) -> list[RecordUnitsOutcome]:
        """Records uses of units whose context token proves their tenant, once each; the others leave no trace."""
        recorded = await self._of_the_proven(items, self._uses, _USE_NOT_PROVEN)
        for item, result in zip(items, recorded, strict=True):
            if result.outcome is RecordUnitsOutcome.CONFLICT:
                _alarm_of_use(item)
        return [result.outcome for result in recorded]

    async def settle(self, items: Sequence[Settlement]) -> list[Settled]:
        """Records what attempts were billed, once each."""
        settled = await self._settles.submit(items)
        await self._ends.told(within_seconds=_TELL_SECONDS)
        for item, result in zip(items, settled, strict=True):
            if result.outcome in (SettleOutcome.CONFLICT, SettleOutcome.NOT_OPEN):
                _alarm(item, result)
        return settled

    async def end(self, items: Sequence[Ending]) -> list[Ended]:
        """Ends attempts that were not billed, or whose bill cannot be known here."""
        ended = await self._endings.submit(items)
        await self._ends.told(within_seconds=_TELL_SECONDS)
        return ended

    async def renew(self, keys: Sequence[CallKey]) -> list[CallKey]:
        """Prolongs leases; returns those whose calls are not open any more."""
        if not keys:
            return []
        standing = await self._renewals.submit(keys)
        return [key for key, stands in zip(keys, standing, strict=True) if not stands]

    async def fence(self, items: Sequence[Fencing]) -> list[Fenced]:
        """Decides what becomes of holds whose lease ended."""
        return await self._fences.submit(items)

    async def close(self) -> None:
        """Waits for every accepted batch."""
        for commits in (self._opens, self._extensions, self._uses, self._settles, self._endings, self._renewals, self._fences):
            await commits.close()

    async def _of_the_proven(self, items: Sequence[I], commits: GroupCommit[I, O], otherwise: O) -> list[O]:
        proven: dict[int, I] = {}
        for index, item in enumerate(items):
            tier = await self._tier_of(item.context_token, item.tenant_id)
            if tier is not None:
                proven[index] = item.in_tier(tier)
        committed = await commits.submit(list(proven.values())) if proven else []
        answers = dict(zip(proven, committed, strict=True))
        return [answers.get(index, otherwise) for index in range(len(items))]

    # The ends are handed on inside the group commits: a caller that went away meanwhile must not delay them.

    async def _settle_batch(self, items: Sequence[Settlement]) -> Sequence[Settled]:
        keys = await self._price_keys_of(items)
        minted = new_uuid7s(len(items))
        settled = await self._store.settle([await self._rate(*each) for each in zip(items, keys, minted, strict=True)])
        self._ends.send(
            _settled_end(item, result.told_epoch, result.cost_nano_usd)
            for item, result in zip(items, settled, strict=True)
            if result.told_epoch is not None
        )
        for item in items:
            self._price_keys.pop(item.tenant_id + item.reservation_id, None)
        return settled

    async def _record_batch(self, items: Sequence[UnitUse]) -> Sequence[Recorded]:
        recorded = await self._store.record(items)
        # The hold knows how much: an end of units tells no amounts.
        self._ends.send(
            CallEnd(item.tenant_id, item.reservation_id, EndKind.SETTLED, result.told_epoch)
            for item, result in zip(items, recorded, strict=True)
            if result.told_epoch is not None
        )
        return recorded

    async def _end_batch(self, items: Sequence[Ending]) -> Sequence[Ended]:
        ended = await self._store.end(items)
        self._ends.send(
            CallEnd(item.tenant_id, item.reservation_id, _END_KINDS[item.kind], result.told_epoch)
            for item, result in zip(items, ended, strict=True)
            if result.told_epoch is not None
        )
        return ended

    async def _fence_batch(self, items: Sequence[Fencing]) -> Sequence[Fenced]:
        fenced = await self._store.fence(items)
        self._ends.send(
            CallEnd(item.tenant_id, item.reservation_id, EndKind.PIN, result.told_epoch)
            for item, result in zip(items, fenced, strict=True)
            if result.told_epoch is not None
        )
        return fenced

    async def _price_keys_of(self, items: Sequence[Settlement]) -> list[PriceKey | None]:
        keys = [self._price_keys.get(item.tenant_id + item.reservation_id) for item in items]
        unknown = [index for index, key in enumerate(keys) if key is None]
        if unknown:
            found = await self._store.price_keys([CallKey(items[index].tenant_id, items[index].reservation_id) for index in unknown])
            for index, key in zip(unknown, found, strict=True):
                keys[index] = key
        return keys

    async def _rate(self, item: Settlement, key: PriceKey | None, entry_id: bytes) -> RatedSettlement:
        if key is None:
            return RatedSettlement(item, entry_id, None)
        prices = await self._prices.prices_of(key)
        if prices is None:
            # The open found this price in the database, so it is there: only our view of it is behind.
            raise Unavailable("price book", f"the prices of version {key.version} are being loaded; settle again shortly")
        return RatedSettlement(item, entry_id, cost_nano_usd(item.usage, prices))

    def _remember(self, item: Opening) -> None:
        if len(self._price_keys) >= _REMEMBERED_CALLS:
            self._price_keys.pop(next(iter(self._price_keys)))
        self._price_keys[item.tenant_id + item.reservation_id] = PriceKey(item.price_version, item.provider, item.model)


def _settled_end(item: Settlement, epoch: int, nano_usd: int) -> CallEnd:
    return CallEnd(item.tenant_id, item.reservation_id, EndKind.SETTLED, epoch, item.usage.total, nano_usd, item.usage.output)


def _alarm(item: Settlement, result: Settled) -> None:
    """Raises the alarm that a bill could not be recorded: someone must look at the provider's report."""
    event = "settlement_conflict" if result.outcome is SettleOutcome.CONFLICT else "settlement_refused"
    log.error(
        event,
        tenant_id=str(UUID(bytes=item.tenant_id)),
        reservation_id=str(UUID(bytes=item.reservation_id)),
        provider_request_id=item.provider_request_id,
        refused_tokens=item.usage.total,
        recorded_nano_usd=result.cost_nano_usd,
    )


def _alarm_of_use(item: UnitUse) -> None:
    log.error(
        "units_conflict",
        tenant_id=str(UUID(bytes=item.tenant_id)),
        reservation_id=str(UUID(bytes=item.reservation_id)),
        product_unit=item.product_unit,
        refused_quantity=item.quantity,
    )
