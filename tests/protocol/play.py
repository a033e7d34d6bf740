"""Plays a run of the model on real services: each step of the run is attempted there, then everything is brought to rest and compared.

What a step asks for may not be possible: where the rule is in force that the run does without, the services refuse it. Such a step is
passed over, as a message is that nobody ever sent.
"""

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg
import grpc
import redis.asyncio

from devstack.state import DemoTenant
from mesh.inference.v1 import inference_service_pb2
from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from services.ratelimit.packing import unpacked
from tests.chaos.agreement import Books, differences
from tests.chaos.callers import Diary, Told
from tests.protocol.theatre import OUTPUT_TOKENS, ProviderGate, Theatre
from tests.protocol.wire import Answer, Letter

LETTER_SECONDS = 20.0
# For what a service in which the rule is in force never does.
FORBIDDEN_SECONDS = 1.5
REST_SECONDS = 60.0
_LOOK_SECONDS = 0.05
# Limits that have their data are in the model's epoch 0: here the first one they asked for.
_FIRST_EPOCH = 1
_HELD = 1

END_LEASE = "UPDATE metering.call_leases SET lease_until = now() - interval '1 second' WHERE tenant_id = $1"
SWEEP = "SELECT count(*) FROM metering.sweep_leases(1000)"
TELL_NOW = "UPDATE metering.outbox SET due_time = now() WHERE tenant_id = $1"


@dataclass
class Call:
    """A call of the run: whose replica has it, and what its caller heard."""

    number: int
    call_id: UUID
    reservation_id: UUID | None = None
    asking: asyncio.Task[None] | None = None
    told: Told | None = None
    expired: bool = False
    fence_answers: list[tuple[int, int]] = field(default_factory=list)


class Play:
    """One run, with a tenant of its own."""

    def __init__(self, theatre: Theatre, gate: ProviderGate, tenant: DemoTenant, budget: int, admin: asyncpg.Connection) -> None:
        self._theatre, self._gate, self._tenant, self._budget, self._admin = theatre, gate, tenant, budget, admin
        self._wire = theatre.wire
        self._calls: dict[int, Call] = {}
        self._rebuilds: list[tuple[Letter, asyncio.Task[None]]] = []
        self.taken: list[str] = []
        self.passed_over: list[str] = []

    async def step(self, label: str) -> None:
        """Attempts one step of the run."""
        for pattern, attempt in _ATTEMPTS:
            if match := pattern.fullmatch(label):
                done = await attempt(self, *(int(number) for number in match.groups()))
                (self.taken if done else self.passed_over).append(label)
                return
        msg = f"no attempt for the step {label!r}"
        raise AssertionError(msg)

    # -- the replica -----------------------------------------------------------------------------------------------------------------

    async def sends_reserve(self, c: int) -> bool:
        call = self._calls[c] = Call(c, uuid.uuid4())
        before = len(self._wire.find("reserve"))
        call.asking = asyncio.get_running_loop().create_task(self._ask(call))
        if not await self._wire.wait_until(lambda: len(self._wire.find("reserve")) > before, LETTER_SECONDS):
            return False
        (call.reservation_id,) = self._wire.find("reserve")[-1].reservation_ids
        return True

    async def _ask(self, call: Call) -> None:
        try:
            async for event in self._theatre.question(call.number, self._tenant, call.call_id):
                if event.WhichOneof("event") == "final":
                    call.told = _told(event.final)
        except grpc.aio.AioRpcError:
            pass
        finally:
            await self._wire.stir()

    async def hears_reserve(self, c: int) -> bool:
        """Gives the last answer to the Reserve; the replica opens, or is refused."""
        if not self._give(c, "reserve"):
            return False
        return await self._sees(c, "open")

    async def cancels_before_open(self, c: int) -> bool:
        if (letter := self._letter(c, "reserve")) is None or not letter.answers:
            return False
        self._cancel(c)
        await asyncio.sleep(_LOOK_SECONDS)
        letter.give(letter.answers[-1])
        return await self._sees(c, "release", "open")

    async def gives_up(self, c: int) -> bool:
        self._cancel(c)
        return await self._sees(c, "void", "release", "interrupt")

    async def hears_void(self, c: int) -> bool:
        return self._give(c, "void") and await self._sees(c, "release")

    async def hears_open(self, c: int) -> bool:
        if not self._give(c, "open"):
            return False
        await self._sees(c, "dispatch", "void", "release")
        if (void := self._letter(c, "void")) is not None and not void.answers:
            # Refused, it makes sure before it lets go: another call than this may have the hold by now.
            void.give(await void.deliver())
            await self._sees(c, "release")
        return True

    async def dispatches(self, c: int) -> bool:
        return self._letter(c, "dispatch") is not None

    async def dispatches_without_open(self, c: int) -> bool:
        if not self._give(c, "reserve"):
            return False
        await self._sees(c, "open", "dispatch")
        return await self._wire.wait_until(lambda: self._letter(c, "dispatch") is not None, FORBIDDEN_SECONDS)

    async def hears_reply(self, c: int) -> bool:
        return self._give(c, "dispatch") and await self._sees(c, "settle")

    async def hears_settled(self, c: int) -> bool:
        return self._give(c, "settle") and await self._sees(c)

    async def interrupts(self, c: int) -> bool:
        self._cancel(c)
        return await self._sees(c, "interrupt", "void", "release")

    async def hears_interrupt(self, c: int) -> bool:
        return self._give(c, "interrupt") and await self._sees(c)

    async def is_killed(self, c: int) -> bool:
        replica = self._theatre.replicas[c]
        replica.process.kill()
        await replica.process.wait()
        replica.alive = False
        return True

    def _cancel(self, c: int) -> None:
        asking = self._calls[c].asking
        if asking is not None:
            asking.cancel()

    # -- the provider ----------------------------------------------------------------------------------------------------------------

    async def bills(self, amount: int, c: int) -> bool:
        letter = self._letter(c, "dispatch")
        if letter is None or letter.answers:
            return False
        self._gate.output_tokens[str(self._calls[c].call_id)] = OUTPUT_TOKENS[amount]
        await letter.deliver()
        return True

    # -- the ledger ------------------------------------------------------------------------------------------------------------------

    async def opens(self, c: int) -> bool:
        return await self._deliver(c, "open")

    async def voids(self, c: int) -> bool:
        return await self._deliver(c, "void") and await self._told(c)

    async def settles(self, c: int) -> bool:
        return await self._deliver(c, "settle") and await self._told(c)

    async def marks_interrupted(self, c: int) -> bool:
        return await self._deliver(c, "interrupt") and await self._told(c)

    async def lease_ends_at_ledger(self, c: int) -> bool:
        tenant_id = UUID(self._tenant.tenant_id)
        await self._admin.execute(END_LEASE + " AND reservation_id = $2", tenant_id, self._id(c))
        return bool(await self._admin.fetchval(SWEEP)) and await self._told(c)

    async def answers_fence(self, c: int) -> bool:
        fences = self._wire.find("fence", self._ids(c))
        if not fences:
            return False
        # The last one asked for: an older one is of an epoch that is over.
        answer = await fences[-1].deliver()
        if isinstance(answer, bytes):
            (outcome,) = ledger_pb.FenceCallsResponse.FromString(answer).outcomes
            self._calls[c].fence_answers.append((fences[-1].epoch, outcome))
        return await self._told(c)

    async def _told(self, c: int) -> bool:
        """Has the ledger's outbox sent now, so that its messages are on the wire."""
        await self._admin.execute(TELL_NOW, UUID(self._tenant.tenant_id))
        rows = await self._admin.fetch("SELECT kind, epoch FROM metering.outbox WHERE tenant_id = $1", UUID(self._tenant.tenant_id))
        wanted = {("pin" if row["kind"] == 3 else "commit", row["epoch"]) for row in rows}

        def all_came() -> bool:
            return wanted <= {(letter.kind, letter.epoch) for letter in self._wire.letters}

        return await self._wire.wait_until(all_came, LETTER_SECONDS)

    async def begins_epoch(self) -> bool:
        """Answers the newest request for a snapshot that has none: an older one is late."""
        waiting = [letter for letter, _ in self._rebuilds if not letter.answers]
        if not waiting:
            return False
        await waiting[-1].deliver()
        return True

    # -- the limits ------------------------------------------------------------------------------------------------------------------

    async def holds(self, c: int) -> bool:
        # Without their data the limits decide nothing: the message waits for them.
        return not self._calls[c].expired and await self._limits_have_data() and await self._deliver(c, "reserve")

    async def _limits_have_data(self) -> bool:
        async with redis.asyncio.from_url(self._theatre.stack.redis.url) as client:
            return bool(await client.hexists(f"{{{self._tenant.tenant_id}}}:meta", "epoch"))

    async def releases(self, c: int) -> bool:
        return await self._deliver(c, "release")

    async def lease_ends_at_limits(self, c: int) -> bool:
        """Ends the lease in the store; the limits ask, or have let go."""
        reservation_id = self._id(c)
        async with redis.asyncio.from_url(self._theatre.stack.redis.url) as client:
            now_s, now_us = await client.time()
            key = f"{{{self._tenant.tenant_id}}}:leases"
            if not await client.zadd(key, {reservation_id.bytes: now_s * 1_000_000 + now_us - 1}, xx=True, ch=True):
                return False
        before = len(self._wire.find("fence", (reservation_id,)))

        async def happened() -> bool:
            return len(self._wire.find("fence", (reservation_id,))) > before or await self._state(c) != _HELD

        return await _soon(happened, LETTER_SECONDS)

    async def hears_void_or_settled(self, c: int) -> bool:
        return await self._hears_fence(c, {ledger_pb.FENCE_OUTCOME_VOID, ledger_pb.FENCE_OUTCOME_SETTLED_BEFORE})

    async def hears_unresolved(self, c: int) -> bool:
        return await self._hears_fence(c, {ledger_pb.FENCE_OUTCOME_UNRESOLVED})

    async def _hears_fence(self, c: int, outcomes: set[int]) -> bool:
        """Lets an answer through that the ledger gave to a fence of the newest epoch: one of these, if it gave one."""
        if not self._calls[c].fence_answers:
            return False
        newest = max(epoch for epoch, _ in self._calls[c].fence_answers)
        answers = [answer for answer in self._calls[c].fence_answers if answer[0] == newest]
        reservation_id = self._id(c)
        self._wire.heard[reservation_id] = 0
        self._wire.fenced[reservation_id] = next((answer for answer in answers if answer[1] in outcomes), answers[-1])
        heard = await self._wire.wait_until(lambda: self._wire.heard[reservation_id] > 0, FORBIDDEN_SECONDS)
        if heard:
            await _soon(lambda: self._is_no_longer_held(c), FORBIDDEN_SECONDS)
        return heard

    async def _is_no_longer_held(self, c: int) -> bool:
        return await self._state(c) != _HELD

    async def hears_end(self, c: int) -> bool:
        commits = self._wire.find("commit", self._ids(c))
        return bool(commits) and await self._wire.commit(commits[-1])

    async def hears_pin(self, c: int) -> bool:
        pins = self._wire.find("pin", self._ids(c))
        return bool(pins) and await self._wire.commit(pins[-1])

    async def meets_newer_epoch(self) -> bool:
        told = [letter for letter in self._wire.letters if letter.kind in ("commit", "pin")]
        return bool(told) and await self._wire.commit(max(told, key=lambda letter: letter.epoch))

    async def loses_data(self) -> bool:
        await self._theatre.lose_limits_data()
        return True

    async def asks_for_snapshot(self) -> bool:
        """Has a replica of the limits asked by a caller that waits for no other answer; it asks the ledger."""
        if await self._limits_have_data():
            return False
        waiting = [letter for letter, asker in self._rebuilds if not asker.done()]
        if len(waiting) == len(self._theatre.limiters):
            waiting[0].lose()
        free = len(waiting) % len(self._theatre.limiters)
        before = len(self._wire.find("rebuild"))
        asker = asyncio.get_running_loop().create_task(self._ask_limits(free))
        if not await self._wire.wait_until(lambda: len(self._wire.find("rebuild")) > before, LETTER_SECONDS):
            return False
        self._rebuilds.append((self._wire.find("rebuild")[-1], asker))
        return True

    async def _ask_limits(self, limiter: int) -> None:
        try:
            await self._theatre.ask_limits(self._tenant, limiter)
        except grpc.aio.AioRpcError:
            # Nobody answered the limits: they say so, and whoever asks next has them ask again.
            return

    async def loads_snapshot(self, epoch: int) -> bool:
        """Gives the limits the snapshot of an epoch: they load it, or ask for another. One that was loaded before is loaded again."""
        for letter, asker in self._rebuilds:
            if letter.answers and _epoch(letter.answers[-1]) == epoch + _FIRST_EPOCH and not asker.done():
                letter.give(letter.answers[-1])
                return await self._went_on(asker)
        return await self._theatre.tap.repeat(self._theatre.stack.redis.url, self._tenant.tenant_id, epoch + _FIRST_EPOCH)

    async def _went_on(self, asker: "asyncio.Task[None]") -> bool:
        before = len(self._wire.find("rebuild"))

        async def happened() -> bool:
            return asker.done() or len(self._wire.find("rebuild")) > before

        return await _soon(happened, LETTER_SECONDS)

    async def reserve_expires(self, c: int) -> bool:
        self._calls[c].expired = True
        return True

    async def forgets(self, c: int) -> bool:
        """Drops the record, as the limits may once its Reserve is too old; before that it is for them to keep it."""
        if not self._calls[c].expired:
            await asyncio.sleep(4 * _LOOK_SECONDS)
            return await self._state(c) is None
        async with redis.asyncio.from_url(self._theatre.stack.redis.url) as client:
            prefix, key = f"{{{self._tenant.tenant_id}}}:", self._id(c).bytes
            await client.hdel(f"{prefix}reservations", key)
            await client.zrem(f"{prefix}ended", key)
        return True

    async def _state(self, c: int) -> int | None:
        async with redis.asyncio.from_url(self._theatre.stack.redis.url) as client:
            packed = await client.hget(f"{{{self._tenant.tenant_id}}}:reservations", self._id(c).bytes)
        return None if packed is None else unpacked(packed)[0]  # type: ignore[index, return-value]

    # -- messages --------------------------------------------------------------------------------------------------------------------

    def _id(self, c: int) -> UUID:
        reservation_id = self._calls[c].reservation_id
        assert reservation_id is not None
        return reservation_id

    def _ids(self, c: int) -> tuple[UUID, UUID]:
        """What messages about a call name: its reservation, or at the provider the call itself."""
        return self._id(c), self._calls[c].call_id

    def _letter(self, c: int, kind: str) -> Letter | None:
        return next(iter(self._wire.find(kind, self._ids(c))), None)

    async def _deliver(self, c: int, kind: str) -> bool:
        letter = self._letter(c, kind)
        if letter is None:
            return False
        answer = await letter.deliver()
        if kind == "release":
            letter.give(answer)
        return True

    def _give(self, c: int, kind: str) -> bool:
        letter = self._letter(c, kind)
        if letter is None or not letter.answers:
            return False
        letter.give(letter.answers[-1])
        return True

    async def _sees(self, c: int, *kinds: str) -> bool:
        """Returns once the replica has sent one of these, or its caller has heard the end; without kinds, the end alone."""

        def happened() -> bool:
            asking = self._calls[c].asking
            over = asking is None or (asking.done() and not asking.cancelled())
            return over or any(self._letter(c, kind) for kind in kinds)

        self._refuse_second_tries(c)
        return await self._wire.wait_until(happened, LETTER_SECONDS)

    def _refuse_second_tries(self, c: int) -> None:
        # A replica that was told to start again does so with another reservation: in the model that is another call.
        for letter in self._wire.find("reserve"):
            if not any(letter.reservation_ids[0] == call.reservation_id for call in self._calls.values()):
                letter.lose()

    # -- the end ---------------------------------------------------------------------------------------------------------------------

    async def rest(self, rest_seconds: float) -> list[str]:
        """Brings everything to its end, as time and a wire that loses nothing would, and returns what then differs."""
        self._wire.open = True
        for letter in list(self._wire.letters):
            if letter.reader is not None and not letter.reader.done():
                letter.give(letter.answers[-1] if letter.answers else await letter.deliver())
        await self._callers_hear_the_end()
        found = ["nothing was compared"]

        async def agrees() -> bool:
            nonlocal found
            await self._pass_time()
            found = await self._compare()
            return not found

        await _soon(agrees, rest_seconds)
        return found

    async def _callers_hear_the_end(self) -> None:
        asking = [call.asking for call in self._calls.values() if call.asking and self._theatre.replicas[call.number].alive]
        if asking:
            await asyncio.wait(asking, timeout=REST_SECONDS)

    async def _pass_time(self) -> None:
        """Every lease is over, and whatever waits in the ledger's outbox is due."""
        tenant_id = UUID(self._tenant.tenant_id)
        await self._admin.execute(END_LEASE, tenant_id)
        await self._admin.fetchval(SWEEP)
        await self._admin.execute(TELL_NOW, tenant_id)
        async with redis.asyncio.from_url(self._theatre.stack.redis.url) as client:
            key = f"{{{self._tenant.tenant_id}}}:leases"
            for member in await client.zrange(key, 0, -1):
                now_s, now_us = await client.time()
                await client.zadd(key, {member: now_s * 1_000_000 + now_us - 1}, xx=True)

    async def _compare(self) -> list[str]:
        call_ids = {str(call.call_id) for call in self._calls.values()}
        limits = await self._theatre.limits(self._tenant)
        ledger = await self._theatre.ledger(self._tenant)
        answered = {str(call.call_id): call.told for call in self._calls.values() if call.told}
        diary = Diary(asked=call_ids, answered=answered)
        tenant_id = self._tenant.tenant_id
        return differences(
            Books(self._theatre.billed(call_ids), ledger, {tenant_id: limits}, {}, {tenant_id: diary}, {tenant_id: self._budget})
        )


def _told(final: inference_service_pb2.CallSummary) -> Told:
    return Told(final.usage.input_tokens, final.usage.output_tokens, final.cost.nano_usd)


def _epoch(answer: Answer) -> int:
    return ledger_pb.BeginEpochResponse.FromString(answer).epoch if isinstance(answer, bytes) else -1


async def _soon(true: Callable[[], Awaitable[bool]], within_seconds: float) -> bool:
    until = asyncio.get_running_loop().time() + within_seconds
    while not await true():
        if asyncio.get_running_loop().time() > until:
            return False
        await asyncio.sleep(_LOOK_SECONDS)
    return True


Attempt = Callable[..., Awaitable[bool]]
_ATTEMPTS: Sequence[tuple[re.Pattern[str], Attempt]] = [
    (re.compile(pattern), attempt)
    for pattern, attempt in (
        (r"I(\d) sends Reserve", Play.sends_reserve),
        (r"R (?:holds|repeats its answer) for call (\d)", Play.holds),
        (r"R refuses call (\d)", Play.holds),
        (r"R refuses Reserve of call (\d).*", Play.holds),
        (r"I(\d) is refused", Play.hears_reserve),
        (r"I(\d) sends Open", Play.hears_reserve),
        (r"I(\d) cancels before Open", Play.cancels_before_open),
        (r"I(\d) gives up, sends (?:Void|Release)", Play.gives_up),
        (r"I(\d) releases after Void", Play.hears_void),
        (r"I(\d) sees Open (?:acknowledged|refused)", Play.hears_open),
        (r"I(\d) dispatches", Play.dispatches),
        (r"I(\d) dispatches without Open", Play.dispatches_without_open),
        (r"I(\d) receives the reply", Play.hears_reply),
        (r"I(\d) sees Settle acknowledged", Play.hears_settled),
        (r"I(\d) cannot learn the usage, sends Interrupt", Play.interrupts),
        (r"I(\d) sees Interrupt acknowledged", Play.hears_interrupt),
        (r"I(\d) is killed", Play.is_killed),
        (r"P bills (\d) for call (\d)", Play.bills),
        (r"M (?:opens|refuses Open of) call (\d)", Play.opens),
        (r"M voids call (\d)", Play.voids),
        (r"M repeats that call (\d) is void", Play.voids),
        (r"M marks call (\d) unresolved", Play.marks_interrupted),
        (r"M acknowledges Interrupt of call (\d).*", Play.marks_interrupted),
        (r"M settles call (\d)", Play.settles),
        (r"M: lease of call (\d) ends, unresolved", Play.lease_ends_at_ledger),
        (r"M answers: call (\d) is .*", Play.answers_fence),
        (r"M begins an epoch, sends a snapshot", Play.begins_epoch),
        (r"R releases call (\d)", Play.releases),
        (r"R: lease of call (\d) ends, (?:asks M|lets go)", Play.lease_ends_at_limits),
        (r"R lets go of call (\d)", Play.hears_void_or_settled),
        (r"R pins call (\d)", Play.hears_unresolved),
        (r"R commits \d for call (\d)", Play.hears_end),
        (r"R commits call (\d) without looking at the epoch", Play.hears_end),
        (r"R is told, pins call (\d)", Play.hears_pin),
        (r"R meets a newer epoch, starts over", Play.meets_newer_epoch),
        (r"R loses its data", Play.loses_data),
        (r"R asks M for a snapshot", Play.asks_for_snapshot),
        (r"R loads the snapshot of epoch (\d+)", Play.loads_snapshot),
        (r"Reserve of call (\d) expires", Play.reserve_expires),
        (r"R forgets call (\d)", Play.forgets),
    )
]


async def play(theatre: Theatre, gate: ProviderGate, labels: Sequence[str], rest_seconds: float = REST_SECONDS) -> tuple[Play, list[str]]:
    """Plays a run with a new tenant, and returns it with what differs at rest."""
    await theatre.revive()
    theatre.wire.clear()
    theatre.wire.open = True
    budget = theatre.hold + (theatre.bills[1] + theatre.bills[2]) // 2
    tenant = await theatre.tenant(budget)
    # In the model the limits have their data to begin with.
    await theatre.ask_limits(tenant)
    admin = await asyncpg.connect(theatre.stack.postgres.dsn("tenantry"))
    try:
        played = Play(theatre, gate, tenant, budget, admin)
        theatre.wire.open = False
        for label in labels:
            await played.step(label)
        return played, await played.rest(rest_seconds)
    finally:
        await admin.close()
