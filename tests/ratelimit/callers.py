"""What tests do at the limits: through the service as inference and metering do, or at the store."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from typing import Any, ClassVar
from uuid import UUID, uuid4

from pydantic import SecretStr

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from mesh.ratelimit.v1 import rate_limit_service_pb2_grpc
from mesh.tenant.v1 import tenant_service_pb2
from services.kernel.errors import MeshError
from services.kernel.ids import ReservationId, TenantId, new_uuid7
from services.kernel.rpc.channel import MeshChannel
from services.kernel.settings import ServiceSettings
from services.kernel.tenant_context import TenantContext
from services.ratelimit.adapters.redis_link import Link, PipelinedLink
from services.ratelimit.adapters.redis_records import RedisRecords
from services.ratelimit.adapters.redis_snapshots import RedisSnapshots
from services.ratelimit.adapters.redis_store import RedisStore
from services.ratelimit.adapters.tenant_rules import terms_of
from services.ratelimit.adapters.tenant_scripts import KINDS, TenantScripts
from services.ratelimit.app import RatelimitApp, build
from services.ratelimit.calendar_periods import microseconds
from services.ratelimit.counter import Family
from services.ratelimit.decision import Refusal, refusal
from services.ratelimit.limit_rule import MINUTE_US, SECOND_US, Unit, Window, rules_of_plan
from services.ratelimit.limits import NOBODY, Amounts, Demand, Shortening, Subject
from services.ratelimit.packing import unpacked
from services.ratelimit.rebuild import Begin, CountedCall, CountedSum, Snapshot
from services.ratelimit.request import Ask
from services.ratelimit.settings import RatelimitSettings
from services.ratelimit.settlement import CommitKind, Settlement
from services.ratelimit.standing import Answer, Verdict
from services.ratelimit.terms import Terms
from tests.ratelimit.scripted_peer import Peer

# As much as a rule may allow: stands for a rule that is not there, so that what it counts can be seen.
UNLIMITED = 9_000_000_000_000_000
STANDARD_RULES = ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "cost_nano_usd_per_month", "concurrent_calls")
_STATES = {1: "held", 2: "pinned", 3: "settled", 4: "void", 5: "released"}

TOKENS = {name: f"token-of-{name}" for name in ("inference", "metering", "tenant", "gateway")}


class InferenceSettings(ServiceSettings):
    service_name: ClassVar[str] = "inference"


def plan_limits(**limits: int) -> tenant_service_pb2.PlanLimits:
    """A plan of these limits; those not named are too high to be met."""
    return tenant_service_pb2.PlanLimits(**{**dict.fromkeys(STANDARD_RULES, UNLIMITED), **limits})


def standard_terms(window_seconds: float = 60.0, **limits: int) -> Terms:
    """The five rules of a plan, over another window than a minute for tests of time."""
    window_us = int(window_seconds * SECOND_US)
    return Terms(
        [replace(rule, window_us=window_us if rule.window_us == MINUTE_US else 0) for rule in rules_of_plan(plan_limits(**limits))]
    )


class Stores:
    """Everything that reads and writes a tenant's keys. `scripts`: others than the product's own, such as those of a set clock."""

    def __init__(
        self, link: Link, *, lease_seconds: float = 5.0, forget_seconds: float = 120.0, scripts: TenantScripts | None = None
    ) -> None:
        self.scripts = scripts or TenantScripts(link, link)
        self.decisions = RedisStore(self.scripts, lease_seconds=lease_seconds, forget_seconds=forget_seconds)
        self.snapshots = RedisSnapshots(self.scripts, lease_seconds=lease_seconds)
        self.records = RedisRecords(self.scripts)


class MeteringSettings(ServiceSettings):
    service_name: ClassVar[str] = "metering"


class TenantSettings(ServiceSettings):
    service_name: ClassVar[str] = "tenant"


class GatewaySettings(ServiceSettings):
    service_name: ClassVar[str] = "gateway"


@dataclass
class AtStore:
    """One tenant at the store itself."""

    stores: Stores
    link: PipelinedLink
    terms: Terms = field(default_factory=standard_terms)
    tenant_id: TenantId = field(default_factory=lambda: TenantId(new_uuid7()))
    epoch: int = 1

    @property
    def store(self) -> RedisStore:
        """Where decisions are made."""
        return self.stores.decisions

    async def begin(self, nonce: str) -> Begin:
        """Asks for a rebuild."""
        return (await self.stores.snapshots.begin(self.tenant_id, nonce, self.terms))[0]

    async def load(self, nonce: str, epoch: int = 1, *calls: CountedCall, sums: Sequence[CountedSum] = ()) -> bool:
        """Loads an answer to a request for a rebuild."""
        return await self.stores.snapshots.load(self.tenant_id, nonce, Snapshot(epoch, calls, sums), self.terms)

    async def loaded(self, *calls: CountedCall, sums: Sequence[CountedSum] = ()) -> "AtStore":
        """Gives the tenant counters, as a rebuild does."""
        nonce = uuid4().hex
        await self.begin(nonce)
        assert await self.load(nonce, self.epoch, *calls, sums=sums)
        return self

    def ask(self, reservation_id: UUID, demand: Demand, subject: Subject = NOBODY, product_unit: str = "", *, at_once: bool = False) -> Ask:
        """A demand as the store takes it."""
        minted_us = (reservation_id.int >> 80) * 1000
        return Ask(ReservationId(reservation_id), minted_us, self.terms.plan(subject, product_unit), demand, at_once)

    async def reserve(
        self,
        tokens: int = 0,
        cost: int = 0,
        *,
        id: UUID | None = None,
        subject: Subject = NOBODY,
        attempt: int = 1,
        shortening: Shortening | None = None,
    ) -> tuple[ReservationId, Answer]:
        """Tries to hold; returns the id used and the answer."""
        reservation_id = ReservationId(id or new_uuid7())
        ask = self.ask(reservation_id, Demand(Amounts(tokens, cost), attempt, 0, shortening), subject)
        return reservation_id, (await self.store.reserve(self.tenant_id, self.terms, [ask]))[0]

    async def use(self, product_unit: str, quantity: int = 1, *, id: UUID | None = None, subject: Subject = NOBODY) -> Answer:
        """Tries to use units at once."""
        ask = self.ask(id or new_uuid7(), Demand(attempt=0, quantity=quantity), subject, product_unit, at_once=True)
        return (await self.store.reserve(self.tenant_id, self.terms, [ask]))[0]

    def refusal(self, answer: Answer, tokens: int = 0, cost: int = 0, subject: Subject = NOBODY) -> Refusal:
        """Why an answer refused a call of this size."""
        why = refusal(self.terms.plan(subject), answer, Demand(Amounts(tokens, cost)))
        assert why is not None
        return why

    async def held(self, tokens: int = 0, cost: int = 0, **options: Any) -> ReservationId:
        """Holds; the hold must be taken."""
        reservation_id, answer = await self.reserve(tokens, cost, **options)
        assert answer.verdict is Verdict.HELD
        return reservation_id

    async def commit(
        self, reservation_id: ReservationId, kind: CommitKind = CommitKind.SETTLED, tokens: int = 0, cost: int = 0, epoch: int | None = None
    ) -> bool:
        """Tells what the ledger decided; True when done."""
        item = Settlement(self.tenant_id, reservation_id, self.epoch if epoch is None else epoch, kind, Amounts(tokens, cost))
        return (await self.store.commit([item]))[0]

    async def used(self) -> tuple[int, ...]:
        """What the rules of all together count, in their order."""
        return await self.used_by(NOBODY)

    async def used_by(self, subject: Subject, product_unit: str = "") -> tuple[int, ...]:
        """What the rules of a subject count, in their order."""
        answer = await self.store.look(self.tenant_id, self.terms, self.terms.plan(subject, product_unit), Demand())
        assert answer.figures
        return tuple(answer.figures[::3])

    async def dump(self) -> list[object]:
        """Every key of the tenant, byte for byte."""
        keys = [f"{{{self.tenant_id}}}:{kind}" for kind in KINDS]
        return [await self.link.send("DUMP", key) for key in keys]

    async def lose(self) -> None:
        """Takes every key of the tenant away, as a Redis does that lost its data; an erasure would leave its tombstone."""
        for kind in KINDS:
            await self.link.send("DEL", f"{{{self.tenant_id}}}:{kind}")

    async def state(self, reservation_id: UUID) -> str | None:
        """The state of a reservation, None when there is no record of it."""
        packed = await self.link.send("HGET", f"{{{self.tenant_id}}}:reservations", reservation_id.bytes)
        return _STATES[unpacked(packed)[0]] if isinstance(packed, bytes) else None  # type: ignore[index] # a list

    async def end_lease(self, *reservation_ids: UUID) -> None:
        """Makes leases end now, as time would."""
        key = f"{{{self.tenant_id}}}:leases"
        for reservation_id in reservation_ids:
            score = await self.link.send("ZSCORE", key, reservation_id.bytes)
            # Leases of uses of units are kept 2^52 microseconds earlier.
            ended = 1 - 2**52 if isinstance(score, bytes) and float(score) < 0 else 1
            await self.link.send("ZADD", key, "XX", ended, reservation_id.bytes)


@dataclass
class AtService:
    """One tenant, called as inference and metering call."""

    stub: rate_limit_service_pb2_grpc.RateLimitServiceStub
    inference: MeshChannel
    metering: MeshChannel
    tenant: MeshChannel
    context: TenantContext
    store: AtStore

    @property
    def tenant_id(self) -> TenantId:
        return self.store.tenant_id

    async def reserve(
        self, tokens: int = 0, cost: int = 0, *, id: UUID | str | None = None, timeout_seconds: float = 5.0, **fields: Any
    ) -> messages.ReserveResponse:
        request = messages.ReserveRequest(
            reservation_id=str(id or new_uuid7()), amounts=messages.Amounts(tokens=tokens, cost_nano_usd=cost), **fields
        )
        return await self.inference.unary(self.stub.Reserve, request, timeout_seconds=timeout_seconds, tenant=self.context)

    async def extend(self, reservation_id: UUID, tokens: int, cost: int = 0, *, epoch: int = 1) -> messages.ExtendResponse:
        amounts = messages.Amounts(tokens=tokens, cost_nano_usd=cost)
        request = messages.ExtendRequest(reservation_id=str(reservation_id), epoch=epoch, amounts=amounts)
        return await self.inference.unary(self.stub.Extend, request, timeout_seconds=5.0, tenant=self.context)

    async def consume(self, product_unit: str, quantity: int = 1, *, id: UUID | None = None, **fields: Any) -> messages.ConsumeResponse:
        request = messages.ConsumeRequest(consumption_id=str(id or new_uuid7()), product_unit=product_unit, quantity=quantity, **fields)
        return await self.inference.unary(self.stub.Consume, request, timeout_seconds=5.0, tenant=self.context)

    async def reserve_many(self, count: int, tokens: int = 0, cost: int = 0) -> list[messages.ReserveResponse | MeshError]:
        """As many at the same time; answers and refusals in order."""

        async def one() -> messages.ReserveResponse | MeshError:
            try:
                return await self.reserve(tokens, cost)
            except MeshError as error:
                return error

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one()) for _ in range(count)]
        return [task.result() for task in tasks]

    async def commit(self, *commits: messages.Commit) -> Sequence[messages.CommitOutcome.ValueType]:
        stub = rate_limit_service_pb2_grpc.RateLimitServiceStub(self.metering.channel)
        request = messages.CommitRequest(commits=commits)
        return (await self.metering.unary(stub.Commit, request, timeout_seconds=5.0)).outcomes

    async def settled(self, reservation_id: UUID, tokens: int, cost: int = 0, *, epoch: int = 1) -> messages.CommitOutcome.ValueType:
        commit = self.commit_message(reservation_id, messages.COMMIT_KIND_SETTLED, epoch, tokens, cost)
        return (await self.commit(commit))[0]

    def commit_message(
        self, reservation_id: UUID, kind: messages.CommitKind.ValueType, epoch: int = 1, tokens: int = 0, cost: int = 0
    ) -> messages.Commit:
        ref = messages.ReservationRef(tenant_id=self.tenant_id.bytes, reservation_id=reservation_id.bytes)
        return messages.Commit(reservation=ref, epoch=epoch, kind=kind, actual=messages.Amounts(tokens=tokens, cost_nano_usd=cost))

    async def limits(self, **fields: Any) -> dict[str, messages.LimitStatus]:
        request = messages.ListLimitsRequest(**fields)
        response = await self.inference.unary(self.stub.ListLimits, request, timeout_seconds=5.0, tenant=self.context)
        return {status.rule: status for status in response.limits}


@dataclass
class Service:
    """The running service and its peers."""

    app: RatelimitApp
    peer: Peer
    stores: Stores
    link: PipelinedLink
    inference: MeshChannel
    metering: MeshChannel
    tenant: MeshChannel
    gateway: MeshChannel

    def tenant_with(self, *limit_rules: rules.LimitRule, **limits: int) -> AtService:
        """A new tenant with these rules, or a plan with these limits."""
        at_store = AtStore(self.stores, self.link, standard_terms(**limits))
        told = rules.LimitRules(rules=limit_rules) if limit_rules else None
        if told is not None:
            at_store.terms = terms_of(tenant_service_pb2.TenantConfig(limit_rules=told))
        context = self.peer.tenants.context(at_store.tenant_id, told, **limits)
        stub = rate_limit_service_pb2_grpc.RateLimitServiceStub(self.inference.channel)
        return AtService(stub, self.inference, self.metering, self.tenant, context, at_store)


@asynccontextmanager
async def running_service(redis_url: str, peer: Peer, **options: object) -> AsyncIterator[Service]:
    """The whole service on a free port, with channels that speak as its callers."""
    hashes = ",".join(f"{name}={hashlib.sha256(token.encode()).hexdigest()}" for name, token in TOKENS.items())
    values = {
        "listen_address": "127.0.0.1:0",
        "peer_token_hashes": hashes,
        "service_token": SecretStr("token-of-ratelimit"),
        "tenant_address": peer.address,
        "metering_address": peer.address,
        "redis_url": redis_url,
        "drain_seconds": 0.0,
        **options,
    }
    settings = RatelimitSettings.model_validate(values)
    app = await build(settings)
    await app.server.start()
    address = f"127.0.0.1:{app.server.bound_port}"
    link = PipelinedLink(redis_url, timeout_seconds=2.0)
    channels = [
        MeshChannel(address, settings=kind(service_token=SecretStr(TOKENS[kind.service_name])), target_service="ratelimit")
        for kind in (InferenceSettings, MeteringSettings, TenantSettings, GatewaySettings)
    ]
    try:
        yield Service(app, peer, Stores(link), link, *channels)
    finally:
        for channel in channels:
            await channel.close()
        await app.server.stop()
        await app.close()
        await link.close()


def tokens_of_day(day: date, amount: int) -> CountedSum:
    """A sum of the ledger: tokens of a UTC day."""
    return CountedSum([Family(Unit.TOKENS, Window.DAY)], microseconds(datetime(day.year, day.month, day.day, tzinfo=UTC)), amount)


def cost_of_month(year: int, month: int, amount: int) -> CountedSum:
    """A sum of the ledger: nano-USD of a UTC month."""
    return CountedSum([Family(Unit.COST, Window.MONTH)], microseconds(datetime(year, month, 1, tzinfo=UTC)), amount)


def now_us() -> int:
    """The clock of the machine, which the store on it shares."""
    return microseconds(datetime.now(UTC))


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    """Looks until it holds, for what happens in another process or by the passing of time."""
    async with asyncio.timeout(30):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.01)
