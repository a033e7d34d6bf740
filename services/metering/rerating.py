"""Rating calls anew by the right prices: what each call costs more or less, worked out here and written as adjustments by the store.

Refuses to begin where a price is missing, where another re-rating of the tenant is under way, or without a look at what would change.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol
from uuid import UUID

import structlog

from services.kernel.errors import ContentConflict, InvalidRequest, NotFound, PriceMissing, WrongState
from services.kernel.ids import TenantId
from services.metering.call import TokenUsage
from services.metering.price_book import PriceVersion
from services.metering.rating import ClassPrices, cost_nano_usd

log = structlog.get_logger(__name__)

BATCH = 500
# So much of a re-rating a call of the rpc does: a few seconds of work.
BATCHES_A_CALL = 20
SCAN = 2_000


@dataclass(frozen=True, slots=True)
class RerateOrder:
    """Calls reserved from `start_time` to before `end_time` and rated by one of `price_versions`, to be rated by `right_version`."""

    start_time: datetime
    end_time: datetime
    price_versions: Sequence[str]
    right_version: str


@dataclass(frozen=True, slots=True)
class Rerating:
    """An order with its name: what was recorded before `cutoff_time` is rated anew."""

    rerating_id: UUID
    order: RerateOrder
    cutoff_time: datetime

    @property
    def digest(self) -> bytes:
        """SHA-256 of what it is to do; the order of the versions does not matter."""
        times = [moment.isoformat() for moment in (self.order.start_time, self.order.end_time, self.cutoff_time)]
        content = [*times, sorted(self.order.price_versions), self.order.right_version]
        return hashlib.sha256(json.dumps(content).encode()).digest()


@dataclass(frozen=True, slots=True)
class RatedCall:
    """A billed call as its entries leave it: what it used and cost in all, and the version it is rated by now."""

    reservation_id: UUID
    provider: str
    model: str
    price_version: str
    usage: TokenUsage
    cost_nano_usd: int


@dataclass(frozen=True, slots=True)
class RatePosition:
    """Where a re-rating is: all calls up to this one are done. They are gone through by the time of reservation."""

    reserve_time: datetime
    reservation_id: UUID


@dataclass(frozen=True, slots=True)
class ModelDifference:
    """How many calls of a model are rated anew, and how much more they cost; less where it is below 0."""

    provider: str
    model: str
    call_count: int
    difference_nano_usd: int


@dataclass(frozen=True, slots=True)
class RerateLook:
    """The ledger's time, read when no change of the tenant was under way, and the tenant's re-ratings by then."""

    read_time: datetime
    last_number: int
    under_way: UUID | None
    known_digest: bytes | None
    is_done: bool


@dataclass(frozen=True, slots=True)
class RerateAnswer:
    """How far a re-rating is, or what it would do."""

    is_done: bool
    models: Sequence[ModelDifference]
    cutoff_time: datetime
    told_count: int = 0
    outstanding_count: int = 0


Differ = Callable[[RatedCall], int | None]


class RerateStore(Protocol):
    """A tenant's calls and the entries that adjust them."""

    async def look(self, tenant_id: TenantId, rerating_id: UUID) -> RerateLook:
        """Waits for every change that is under way, and reads the time. What is recorded later has a later time."""
        ...

    async def calls(
        self, tenant_id: TenantId, rerating: Rerating, after: RatePosition | None, size: int
    ) -> tuple[Sequence[RatedCall], RatePosition | None]:
        """Returns calls that are rated by one of the versions, and where to go on; None at the end."""
        ...

    async def outstanding(self, tenant_id: TenantId, order: RerateOrder) -> int:
        """Counts the calls of the period that are open or unresolved and will be rated by one of the versions."""
        ...

    async def begin(self, tenant_id: TenantId, rerating: Rerating, number: int) -> bool:
        """Writes the re-rating down; False when another one took its number."""
        ...

    async def position(self, tenant_id: TenantId, rerating_id: UUID) -> RatePosition | None:
        """Returns the last call it rated anew; None before the first."""
        ...

    async def adjust(
        self, tenant_id: TenantId, rerating: Rerating, after: RatePosition | None, size: int, differ: Differ
    ) -> RatePosition | None:
        """Writes the adjustments of up to `size` calls in one transaction and returns where to go on; None at the end."""
        ...

    async def finish(self, tenant_id: TenantId, rerating_id: UUID) -> None:
        """Marks it done, once, and has the limits count anew where they have to."""
        ...

    async def differences(self, tenant_id: TenantId, rerating_id: UUID) -> Sequence[ModelDifference]:
        """Adds up what it wrote, by provider and model."""
        ...


class Versions(Protocol):
    """The price versions."""

    async def version(self, name: str) -> PriceVersion | None:
        """Returns a version by its name; None when it was never stored."""
        ...


@dataclass(slots=True)
class Rates:
    """What is right and what stands, as prices."""

    right: PriceVersion
    standing: Mapping[str, PriceVersion]

    def difference(self, call: RatedCall) -> int | None:
        """Returns how much more the call costs by the right prices; None for one that keeps its cost.

        That is one whose cost is not what its version makes of it: the provider's own bill told it. Raises: PriceMissing.
        """
        standing = self.standing[call.price_version].prices[call.provider, call.model]
        if cost_nano_usd(call.usage, standing) != call.cost_nano_usd:
            return None
        return cost_nano_usd(call.usage, self.right_prices(call)) - call.cost_nano_usd

    def right_prices(self, call: RatedCall) -> ClassPrices:
        """Returns what the call is to be rated by. Raises: PriceMissing."""
        found = self.right.prices.get((call.provider, call.model))
        if found is None:
            raise PriceMissing(self.right.version, call.provider, call.model)
        return found

    @property
    def may_miss(self) -> bool:
        """Whether a call can have been rated by a price that the right version lacks."""
        return any(name not in self.right.prices for version in self.standing.values() for name in version.prices)


@dataclass(slots=True)
class _Sums:
    """Differences by model as they come."""

    models: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    told_count: int = 0

    def add(self, calls: Iterable[RatedCall], rates: Rates) -> None:
        for call in calls:
            difference = rates.difference(call)
            if difference is None:
                self.told_count += 1
                continue
            sums = self.models.setdefault((call.provider, call.model), [0, 0])
            sums[0] += 1
            sums[1] += difference

    def differences(self) -> list[ModelDifference]:
        return [ModelDifference(*name, *sums) for name, sums in sorted(self.models.items())]


class RerateDesk:
    """The one way to a re-rating."""

    def __init__(self, store: RerateStore, versions: Versions) -> None:
        self._store = store
        self._versions = versions

    async def preview(self, tenant_id: TenantId, order: RerateOrder) -> RerateAnswer:
        """Returns what rating anew would do with what is recorded now. Raises: NotFound, InvalidRequest, PriceMissing."""
        rates = await self._rates(order)
        seen = Rerating(UUID(int=0), order, (await self._store.look(tenant_id, UUID(int=0))).read_time)
        sums = _Sums()
        await self._scan(tenant_id, seen, lambda calls: sums.add(calls, rates))
        outstanding = await self._store.outstanding(tenant_id, order)
        return RerateAnswer(False, sums.differences(), seen.cutoff_time, sums.told_count, outstanding)

    async def rerate(self, tenant_id: TenantId, rerating: Rerating) -> RerateAnswer:
        """Begins a re-rating or goes on with it, and does a bounded part. Idempotent by its id.

        Raises: NotFound, InvalidRequest, PriceMissing, WrongState, ContentConflict; then nothing was written by this call.
        """
        rates = await self._rates(rerating.order)
        look = await self._store.look(tenant_id, rerating.rerating_id)
        if look.known_digest is None:
            await self._begin(tenant_id, rerating, rates, look)
        elif look.known_digest != rerating.digest:
            raise ContentConflict(
                "rerating",
                "this re-rating id was used before with other content: use a new id for another one",
                stored_digest=look.known_digest.hex(),
                request_digest=rerating.digest.hex(),
            )
        is_done = look.is_done or await self._go_on(tenant_id, rerating, rates)
        return RerateAnswer(is_done, await self._store.differences(tenant_id, rerating.rerating_id), rerating.cutoff_time)

    async def _begin(self, tenant_id: TenantId, rerating: Rerating, rates: Rates, look: RerateLook) -> None:
        if rerating.cutoff_time > look.read_time:
            raise InvalidRequest("cutoff_time", "must not be in the future: take what the call with validate_only answered")
        if look.under_way is not None:
            raise WrongState("rerating", "UNDER_WAY", f"the tenant's re-rating {look.under_way} is not done: repeat it until it is")
        if rates.may_miss:
            # Nothing was recorded before the cutoff that is not seen now: once begun, no price is missing.
            await self._scan(tenant_id, rerating, lambda calls: [rates.difference(call) for call in calls])
        if not await self._store.begin(tenant_id, rerating, look.last_number + 1):
            raise WrongState("rerating", "CHANGED", "another re-rating of the tenant was begun at the same moment: repeat the call")
        log.info("rerating_begun", rerating_id=str(rerating.rerating_id), right_version=rerating.order.right_version)

    async def _go_on(self, tenant_id: TenantId, rerating: Rerating, rates: Rates) -> bool:
        position = await self._store.position(tenant_id, rerating.rerating_id)
        for _ in range(BATCHES_A_CALL):
            position = await self._store.adjust(tenant_id, rerating, position, BATCH, rates.difference)
            if position is None:
                await self._store.finish(tenant_id, rerating.rerating_id)
                log.info("rerating_done", rerating_id=str(rerating.rerating_id))
                return True
        return False

    async def _scan(self, tenant_id: TenantId, rerating: Rerating, see: Callable[[Sequence[RatedCall]], object]) -> None:
        position: RatePosition | None = None
        while True:
            calls, position = await self._store.calls(tenant_id, rerating, position, SCAN)
            see(calls)
            if position is None:
                return

    async def _rates(self, order: RerateOrder) -> Rates:
        if order.right_version in order.price_versions:
            raise InvalidRequest("right_version", "must not be one of price_versions")
        return Rates(await self._known(order.right_version), {name: await self._known(name) for name in order.price_versions})

    async def _known(self, name: str) -> PriceVersion:
        found = await self._versions.version(name)
        if found is None:
            raise NotFound("price_version", f"no price version {name} was ever loaded")
        return found
