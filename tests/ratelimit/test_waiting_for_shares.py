"""Who waits for a provider account's room stands in one line a tenant, whichever replica it asked. The minute is short here."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import cast
from uuid import uuid4

import pytest

from services.kernel.background import BackgroundTasks
from services.kernel.errors import LimitExceeded
from services.kernel.ids import ReservationId, TenantId, new_uuid7
from services.kernel.tenant_context import TenantContext
from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.adapters.redis_shares import RedisShares
from services.ratelimit.adapters.redis_tickets import RedisTickets, WakeListener
from services.ratelimit.fencing import Fencing
from services.ratelimit.limits import Amounts, Demand, Shortening
from services.ratelimit.open_allowance import OpenAllowance
from services.ratelimit.packing import unpacked
from services.ratelimit.provider_share import AccountUse, CountedCall, ProviderShares, ShareAnswer, ShareVerdict
from services.ratelimit.ready_counters import ReadyCounters
from services.ratelimit.rebuild import Rebuilder
from services.ratelimit.request import Request
from services.ratelimit.reservation import Held, Reservations
from services.ratelimit.terms import Terms
from services.ratelimit.turn import Stand
from services.ratelimit.waiting_room import TICKET_SECONDS, WaitingRoom
from tests.ratelimit.callers import AtStore, Stores, standard_terms
from tests.ratelimit.scripted_peer import Peer, running_peer
from tests.support.stores import RedisStore as RedisServer

# Of no test's own pace.
LONG_US = 30_000_000
OUTPUT = 10


@dataclass
class Room:
    """One account and one tenant, asked through two replicas."""

    tenant: AtStore
    context: TenantContext
    account: str
    limits: AccountUse
    store: RedisShares
    replicas: list[Reservations] = field(default_factory=list)

    async def reserve(self, max_wait_seconds: float = 0.0, *, replica: int = 0, id: ReservationId | None = None) -> Held:
        request = Request(
            id or ReservationId(new_uuid7()),
            Demand(Amounts(OUTPUT, 0), shortening=Shortening(OUTPUT, OUTPUT, 0)),
            account=self.account,
            max_wait_seconds=max_wait_seconds,
        )
        return await self.replicas[replica].reserve(self.context, request)

    async def counted(self, id: ReservationId, output_tokens: int) -> None:
        """Tells what a call used."""
        await self.store.count(self.account, [CountedCall(TenantId(self.tenant.tenant_id), id, AccountUse(1, 0, output_tokens))])

    async def line(self) -> list[bytes]:
        """The ids of those who stand in line."""
        packed = await self.tenant.link.send("HGET", f"{{acct:{self.account}}}:lines", str(self.tenant.tenant_id))
        tickets = unpacked(packed) if isinstance(packed, bytes) else ()
        assert isinstance(tickets, list | tuple)
        return [item for item in tickets[::3] if isinstance(item, bytes)]

    async def in_line(self, count: int) -> None:
        """Returns when so many stand there."""
        async with asyncio.timeout(30):
            while len(await self.line()) != count:  # noqa: ASYNC110 - a place in the store has no event
                await asyncio.sleep(0.01)


@asynccontextmanager
async def room(redis_url: str, link: PipelinedLink, peer: Peer, limits: AccountUse, window_us: int) -> AsyncIterator[Room]:
    """Two replicas that share a store and an account with these limits."""
    stores = Stores(link)
    tenant = await AtStore(stores, link, standard_terms(tokens_per_minute=1000)).loaded()

    async def terms_of(context: TenantContext, at_least: int = 0) -> Terms:
        return tenant.terms

    fencing = Fencing(stores.decisions, None)  # type: ignore[arg-type] # no lease ends here
    rebuilder = Rebuilder(stores.snapshots, None)  # type: ignore[arg-type] # it is loaded already
    counters = ReadyCounters(terms_of, rebuilder, fencing, OpenAllowance(stores.decisions))
    share_store, account = RedisShares(link, window_us=window_us), f"main-{uuid4().hex}"
    made = Room(tenant, peer.tenants.context(tenant.tenant_id), account, limits, share_store)
    async with AsyncExitStack() as stack:
        for name in ("one", "other"):
            waiting, background = WaitingRoom(RedisTickets(stores.scripts, share_store)), BackgroundTasks()
            stack.push_async_callback(background.close)
            background.start(f"tickets of {name}", waiting.run)
            background.start(f"wakes of {name}", WakeListener(redis_url, waiting).run)
            shares = ProviderShares(share_store, {account: limits})
            made.replicas.append(Reservations(stores.decisions, counters, fencing, shares=shares, room=waiting))
        yield made


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    """The service's peers."""
    async with running_peer() as running:
        yield running


async def test_a_share_is_waited_for(redis_server: RedisServer, link: PipelinedLink, peer: Peer) -> None:
    """A call that may wait waits until the account has room, and is admitted then; one that cannot wait so long is refused at once."""
    window_us = 1_200_000
    async with room(redis_server.url, link, peer, AccountUse(1, 0, 0), window_us) as waiting:
        seconds, us = cast("list[bytes]", await link.send("TIME"))
        await waiting.reserve()
        for max_wait_seconds in (0, 0.2):
            with pytest.raises(LimitExceeded):
                await waiting.reserve(max_wait_seconds)
        began = time.monotonic()
        held = await waiting.reserve(20)
        assert held.answer.reserve_us - (int(seconds) * 1_000_000 + int(us)) >= window_us
        assert 0 < held.waited_seconds <= time.monotonic() - began
        assert await waiting.line() == []
        assert await link.send("EXISTS", f"{{{waiting.tenant.tenant_id}}}:waiters") == 0


async def test_who_came_first_is_called_first_whichever_replica_it_asked(
    redis_server: RedisServer, link: PipelinedLink, peer: Peer
) -> None:
    """What a settled call did not use calls the first in line at once, long before the minute ends, and nobody else."""
    async with room(redis_server.url, link, peer, AccountUse(0, 0, OUTPUT), LONG_US) as waiting:
        ids = [ReservationId(new_uuid7()) for _ in range(5)]
        first = await waiting.reserve(id=ids[0])
        calls: list[asyncio.Task[Held]] = []
        async with asyncio.TaskGroup() as group:
            for number, id in enumerate(ids[1:]):
                calls.append(group.create_task(waiting.reserve(59, replica=number % 2, id=id)))
                await waiting.in_line(number + 1)
            for number, call in enumerate(calls):
                assert await waiting.line() == [id.bytes for id in ids[number + 1 :]]
                await waiting.counted(ids[number], 0)
                held = await call
                assert held.answer.reserve_us < first.answer.reserve_us + LONG_US
                assert not any(later.done() for later in calls[number + 1 :])
                await waiting.in_line(len(calls) - number - 1)


async def test_who_goes_away_leaves_its_place_to_the_next(redis_server: RedisServer, link: PipelinedLink, peer: Peer) -> None:
    """A cancelled caller, and one whose process died, keep nobody waiting behind them."""
    async with room(redis_server.url, link, peer, AccountUse(0, 0, OUTPUT), LONG_US) as waiting:
        taken = ReservationId(new_uuid7())
        await waiting.reserve(id=taken)
        # Nobody renews this one.
        need, tenant_id = AccountUse(1, 0, OUTPUT), TenantId(waiting.tenant.tenant_id)
        await waiting.store.take(waiting.account, waiting.limits, tenant_id, 1, ReservationId(new_uuid7()), need, Stand(keep=True))
        cancelled = asyncio.create_task(waiting.reserve(59))
        await waiting.in_line(2)
        last = asyncio.create_task(waiting.reserve(59, replica=1))
        await waiting.in_line(3)
        cancelled.cancel()
        await waiting.counted(taken, 0)
        async with asyncio.timeout(LONG_US / 1_000_000):
            held = await last
        assert held.waited_seconds > 0
        assert await waiting.line() == []


async def test_who_comes_later_stays_behind_though_there_is_room(link: PipelinedLink) -> None:
    """Room that came back is the first's in line until it goes; who does not wait may pass, and another tenant has a line of its own."""
    store, account, limits, need = (
        RedisShares(link, window_us=LONG_US),
        f"main-{uuid4().hex}",
        AccountUse(0, 0, OUTPUT),
        AccountUse(1, 0, 6),
    )
    tenant, stranger = TenantId(new_uuid7()), TenantId(new_uuid7())
    taken, first, second, hasty = (ReservationId(new_uuid7()) for _ in range(4))

    async def take(who: TenantId, id: ReservationId, stand: Stand | None = None) -> ShareAnswer:
        return await store.take(account, limits, who, 1, id, need, stand)

    assert (await take(tenant, taken)).verdict is ShareVerdict.TAKEN
    waits = await take(tenant, first, Stand(keep=True))
    assert (waits.verdict, waits.ahead) == (ShareVerdict.ACCOUNT_FULL, 0)
    later = await take(tenant, second, Stand(keep=True))
    assert (later.verdict, later.ahead) == (ShareVerdict.QUEUED, 1)
    assert 0 < waits.since_us < later.since_us
    await store.count(account, [CountedCall(tenant, taken, AccountUse(0, 0, 0))])
    assert (await take(tenant, second, Stand(keep=True, since_us=later.since_us))).verdict is ShareVerdict.QUEUED
    for passing, who in ((hasty, tenant), (taken, stranger)):
        assert (await take(who, passing, Stand() if who is stranger else None)).verdict is ShareVerdict.TAKEN
        await store.count(account, [CountedCall(who, passing, AccountUse(0, 0, 0))])
    assert (await take(tenant, first, Stand(keep=True, since_us=waits.since_us))).verdict is ShareVerdict.TAKEN
    await store.count(account, [CountedCall(tenant, first, AccountUse(0, 0, 0))])
    assert await store.keep_places(account, tenant, [first, second]) == [False, True]
    assert (await take(tenant, second, Stand(keep=True, since_us=later.since_us))).verdict is ShareVerdict.TAKEN
    assert await link.send("HLEN", f"{{acct:{account}}}:lines") == 0


async def test_the_dead_do_not_keep_the_living_from_being_called(redis_server: RedisServer, link: PipelinedLink, peer: Peer) -> None:
    """Tickets that nobody renews are passed over, of however many tenants: what comes back calls one that waits."""
    # A share is one call: ten tenants.
    limits, need = AccountUse(0, 0, 10 * OUTPUT), AccountUse(1, 0, OUTPUT)
    async with room(redis_server.url, link, peer, limits, LONG_US) as waiting:
        taken, stranger = ReservationId(new_uuid7()), TenantId(new_uuid7())
        await waiting.store.take(waiting.account, limits, stranger, 1, taken, AccountUse(1, 0, 10 * OUTPUT))
        for dead in [TenantId(new_uuid7()) for _ in range(8)]:
            await waiting.store.take(waiting.account, limits, dead, 1, ReservationId(new_uuid7()), need, Stand(keep=True))
        # As the death of their processes would leave them, after their leases.
        await asyncio.sleep(TICKET_SECONDS + 0.1)
        last = asyncio.create_task(waiting.reserve(59))
        await waiting.in_line(1)
        for output_tokens in (99, 98, 97, 0):
            await waiting.store.count(waiting.account, [CountedCall(stranger, taken, AccountUse(1, 0, output_tokens))])
        async with asyncio.timeout(LONG_US / 2_000_000):
            held = await last
        assert held.waited_seconds > 0
