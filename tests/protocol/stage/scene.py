"""Where a run has got to: its calls, their messages on the wire, and the ways in which every step deals with them."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg
import redis.asyncio

from devstack.state import DemoTenant
from services.ratelimit.packing import unpacked
from tests.chaos.callers import Told
from tests.protocol.stage.provider_gate import ProviderGate
from tests.protocol.stage.theatre import Theatre
from tests.protocol.stage.wire import Letter, Wire

LETTER_SECONDS = 20.0
# For what a service in which the rule is in force never does.
FORBIDDEN_SECONDS = 1.5
LOOK_SECONDS = 0.05

END_LEASES = "UPDATE metering.call_leases SET lease_until = now() - interval '1 second' WHERE tenant_id = $1"
SWEEP = "SELECT count(*) FROM metering.sweep_leases(1000)"
TELL_NOW = "UPDATE metering.outbox SET due_time = now() WHERE tenant_id = $1"
WAITING = "SELECT reservation_id, kind, epoch FROM metering.outbox WHERE tenant_id = $1"
_PIN = 3


@dataclass
class Call:
    """A call of the run: whose replica has it, and what its caller heard.

    `heard`: the answer's text so far. `asked_for_more`, `goes_on`: it has come to ask, and it takes more of the answer than it first held.
    """

    number: int
    call_id: UUID
    reservation_id: UUID | None = None
    asking: asyncio.Task[None] | None = None
    told: Told | None = None
    heard: str = ""
    asked_for_more: bool = False
    goes_on: bool = False
    expired: bool = False
    fence_answers: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Scene:
    """One run, with a tenant of its own. `rebuilds`: requests for snapshots, each with who waits for the limits meanwhile."""

    theatre: Theatre
    gate: ProviderGate
    tenant: DemoTenant
    budget: int
    admin: asyncpg.Connection
    calls: dict[int, Call] = field(default_factory=dict)
    rebuilds: list[tuple[Letter, asyncio.Task[None]]] = field(default_factory=list)

    @property
    def wire(self) -> Wire:
        """The wire."""
        return self.theatre.wire

    def reservation_id(self, c: int) -> UUID:
        """The reservation of a call."""
        reservation_id = self.calls[c].reservation_id
        assert reservation_id is not None
        return reservation_id

    def ids(self, c: int) -> tuple[UUID, UUID]:
        """What messages about a call name: its reservation, or at the provider the call itself."""
        return self.reservation_id(c), self.calls[c].call_id

    def letter(self, c: int, kind: str) -> Letter | None:
        """The first message of a kind about a call."""
        return next(iter(self.wire.find(kind, self.ids(c))), None)

    async def deliver(self, c: int, kind: str) -> bool:
        """Brings the message to whom it is for; the answer stays on the wire."""
        letter = self.letter(c, kind)
        if letter is None:
            return False
        answer = await letter.deliver()
        if kind == "release":
            letter.give(answer)
        return True

    def give(self, c: int, kind: str) -> bool:
        """Gives the sender the last answer to its message."""
        letter = self.letter(c, kind)
        if letter is None or not letter.answers:
            return False
        letter.give(letter.answers[-1])
        return True

    async def sees(self, c: int, *kinds: str) -> bool:
        """Returns once the replica has sent one of these, or its caller has heard the end; without kinds, the end alone."""

        def happened() -> bool:
            asking = self.calls[c].asking
            # A caller that went away has heard its end; what its replica does about it is still to come.
            over = asking is None or (asking.done() and not (kinds and asking.cancelled()))
            return over or any(self.letter(c, kind) for kind in kinds)

        self._refuse_second_tries()
        return await self.wire.wait_until(happened, LETTER_SECONDS)

    def _refuse_second_tries(self) -> None:
        # A replica that was told to start again does so with another reservation: in the model that is another call.
        for letter in self.wire.find("reserve"):
            if not any(letter.reservation_ids[0] == call.reservation_id for call in self.calls.values()):
                letter.lose()

    async def tell_now(self) -> bool:
        """Has the ledger's outbox sent now, so that its messages are on the wire."""
        tenant_id = UUID(self.tenant.tenant_id)
        await self.admin.execute(TELL_NOW, tenant_id)
        rows = await self.admin.fetch(WAITING, tenant_id)
        wanted = {("pin" if row["kind"] == _PIN else "commit", row["reservation_id"], row["epoch"]) for row in rows}

        def all_came() -> bool:
            return wanted <= {
                (letter.kind, letter.reservation_ids[0], letter.epoch) for letter in self.wire.letters if letter.reservation_ids
            }

        return await self.wire.wait_until(all_came, LETTER_SECONDS)

    async def record_state(self, c: int) -> int | None:
        """The state of the call's record at the limits; None without one."""
        async with redis.asyncio.from_url(self.theatre.stack.redis.url) as client:
            packed = await client.hget(f"{{{self.tenant.tenant_id}}}:reservations", self.reservation_id(c).bytes)
        return None if packed is None else unpacked(packed)[0]  # type: ignore[index, return-value]

    async def limits_have_data(self) -> bool:
        """Whether the limits have counters of the tenant."""
        async with redis.asyncio.from_url(self.theatre.stack.redis.url) as client:
            return bool(await client.hexists(f"{{{self.tenant.tenant_id}}}:meta", "epoch"))

    def cancel(self, c: int) -> None:
        """Its caller goes away."""
        asking = self.calls[c].asking
        if asking is not None:
            asking.cancel()


async def soon(true: Callable[[], Awaitable[bool]], within_seconds: float) -> bool:
    """Returns whether it became true in time, looking again and again."""
    until = asyncio.get_running_loop().time() + within_seconds
    while not await true():
        if asyncio.get_running_loop().time() > until:
            return False
        await asyncio.sleep(LOOK_SECONDS)
    return True
