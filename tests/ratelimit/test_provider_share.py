"""A provider account's minute is shared by weight, lent while unused, and back within one window. Windows that must pass are short here."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import cast
from uuid import uuid4

import pytest

from services.kernel.errors import ContentConflict, LimitExceeded
from services.kernel.ids import ReservationId, TenantId, new_uuid7
from services.ratelimit.adapters.redis_link import Command, PipelinedLink
from services.ratelimit.adapters.redis_shares import KINDS, RedisShares
from services.ratelimit.packing import packed, unpacked
from services.ratelimit.provider_share import AccountUse, CountedCall, ProviderShares, ShareAnswer, ShareVerdict, TakenShare, share_refusal
from tests.ratelimit.callers import eventually
from tests.support.stores import RedisStore as RedisServer

# Where none may pass, however long the machine stands still.
WINDOW_US = 60_000_000
# Where one must pass, and where several.
PASSING_US = 1_200_000
SHORT_US = 600_000
ONE = AccountUse(1, 0, 0)
NONE = AccountUse(0, 0, 0)
# However slow the machine.
MOST_SECONDS = 60.0


class Account:
    """One account of its own, and what was taken of it by the store's clock."""

    def __init__(
        self, link: PipelinedLink, requests: int, *, input_tokens: int = 0, output_tokens: int = 0, window_us: int = WINDOW_US
    ) -> None:
        self.link = link
        self.window_us = window_us
        self.store = RedisShares(link, window_us=window_us)
        self.name = f"acct-{uuid4().hex}"
        self.limits = AccountUse(requests, input_tokens, output_tokens)
        self.taken: list[tuple[int, TenantId, AccountUse]] = []
        self.asked: list[int] = []

    async def take(self, tenant: TenantId, weight: int = 1, need: AccountUse = ONE, id: ReservationId | None = None) -> ShareAnswer:
        answer = await self.store.take(self.name, self.limits, tenant, weight, id or call_id(), need)
        self.asked.append(answer.now_us)
        if answer.verdict is ShareVerdict.TAKEN:
            self.taken.append((answer.now_us, tenant, need))
        return answer

    async def takes(self, tenant: TenantId, count: int, weight: int = 1) -> int:
        """How many of `count` attempts were admitted."""
        return sum([(await self.take(tenant, weight)).verdict is ShareVerdict.TAKEN for _ in range(count)])

    async def demand(self, weights: Mapping[TenantId, int], need: AccountUse = ONE) -> int:
        """Each asks, in turns, for more than the account has; returns the store's time of the last answer."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self.take(tenant, weight, need))
                for _ in range(self.limits.requests)
                for tenant, weight in weights.items()
            ]
        await asyncio.sleep(0.01)
        return max(task.result().now_us for task in tasks)

    async def count(self, tenant: TenantId, id: ReservationId, use: AccountUse) -> None:
        await self.store.count(self.name, [CountedCall(tenant, id, use)])

    def taken_since(self, tenant: TenantId, since_us: int) -> int:
        return sum(need.requests for at, who, need in self.taken if who == tenant and at >= since_us)

    def held_in_window(self, tenant: TenantId, now_us: int) -> int:
        return self.taken_since(tenant, now_us - self.window_us + 1)

    def full_windows(self, since_us: int, until_us: int) -> list[Counter[TenantId]]:
        """What each took in windows that are over, where the account was full and demand was steady; a machine that stood still has none.

        Each begins with the first grant after the one before.
        """
        windows: list[tuple[int, Counter[TenantId]]] = []
        begins_us = 0
        for at_us, who, _ in sorted(item for item in self.taken if item[0] >= since_us):
            if at_us >= begins_us + self.window_us:
                begins_us = at_us
                windows.append((begins_us, Counter()))
            windows[-1][1][who] += 1
        if begins_us + self.window_us > until_us:
            windows = windows[:-1]
        return [window for at_us, window in windows if window.total() == self.limits.requests and self.steady(at_us)]

    def steady(self, at_us: int) -> bool:
        """Whether somebody asked all the time, in the window that begins then and in the one before it."""
        return self.asked_on(at_us - self.window_us, at_us + self.window_us)

    def asked_on(self, begins_us: int, ends_us: int) -> bool:
        """Whether somebody asked all the time between the two."""
        asked = sorted((begins_us, *(item for item in self.asked if begins_us < item < ends_us), ends_us))
        return all(later - earlier < self.window_us / 3 for earlier, later in pairwise(asked))

    async def shared(self, weights: Mapping[TenantId, int], *, windows: int) -> list[Counter[TenantId]]:
        """Full windows after the first, under steady demand."""
        began_us = await self.demand(weights)
        found: list[Counter[TenantId]] = []
        ends = time.monotonic() + MOST_SECONDS
        while len(found) < windows and time.monotonic() < ends:
            found = self.full_windows(began_us + self.window_us, await self.demand(weights))
        assert len(found) >= windows
        return found

    def most_in_any_window(self) -> int:
        """The oracle: the most requests in any window, by the log of decisions."""
        taken = sorted(self.taken)
        most = held = oldest = 0
        for at_us, _, need in taken:
            held += need.requests
            while taken[oldest][0] <= at_us - self.window_us:
                held -= taken[oldest][2].requests
                oldest += 1
            most = max(most, held)
        return most


def call_id() -> ReservationId:
    """An id nobody has used."""
    return ReservationId(new_uuid7())


def tenant() -> TenantId:
    """An id nobody has used."""
    return TenantId(new_uuid7())


async def test_a_lone_tenant_may_use_the_whole_account(link: PipelinedLink) -> None:
    """Shares nobody uses are lent: one active tenant is admitted up to the account's own limit and not beyond."""
    account = Account(link, 10)
    assert await account.takes(tenant(), 15) == 10


async def test_tenants_under_load_share_by_weight(link: PipelinedLink) -> None:
    """Under steady demand of all, each tenant has its weighted share in every window but the first; the account's limit is kept in any."""
    account, small, large = Account(link, 40, window_us=SHORT_US), tenant(), tenant()
    for window in await account.shared({small: 1, large: 3}, windows=3):
        assert window[small] in range(8, 12)
        assert window[large] in range(27, 32)
    assert account.most_in_any_window() <= 40


async def test_three_tenants_share_whatever_their_weights(link: PipelinedLink) -> None:
    """Each is within one grant of its weighted share in every window but the first, though shares are no whole numbers."""
    weights = {tenant(): random.randint(1, 9) for _ in range(3)}
    account = Account(link, 40, window_us=SHORT_US)
    for window in await account.shared(weights, windows=2):
        for who, weight in weights.items():
            assert abs(window[who] - 40 * weight / sum(weights.values())) <= 1, (sorted(weights.values()), sorted(window.values()))
    assert account.most_in_any_window() <= 40


async def test_an_idle_tenants_share_is_lent_in_full_and_back_within_one_window(link: PipelinedLink) -> None:
    """Two that want more share by weight what a third leaves; a window after it was first refused, the third has had its whole share."""
    ends = time.monotonic() + MOST_SECONDS
    steady = False
    while not steady and time.monotonic() < ends:
        account = Account(link, 40, window_us=SHORT_US)
        small, large, idle = tenant(), tenant(), tenant()
        borrowers = {small: 1, large: 3}
        await account.take(idle, 4)
        for window in await account.shared(borrowers, windows=2):
            assert window[small] in range(8, 12)
            assert window[large] in range(27, 32)
        now_us = began_us = await account.demand(borrowers)
        while (first := await account.take(idle, 4)).verdict is ShareVerdict.TAKEN:
            await account.demand(borrowers)
        # A sixtieth for the bucket that must have left whole, and one for the bucket it was in.
        while now_us < first.now_us + SHORT_US * 62 // 60:
            now_us = await account.demand({**borrowers, idle: 4})
        await account.demand({**borrowers, idle: 4})
        assert account.most_in_any_window() <= 40
        # Who asks for nothing for a window, because the machine stood still, is owed nothing either.
        if steady := account.asked_on(began_us, now_us):
            assert account.taken_since(idle, began_us) >= 20
    assert steady


async def test_a_tenant_that_uses_little_lends_the_rest_while_it_asks(link: PipelinedLink) -> None:
    """What a tenant leaves of its share is lent although it goes on asking: the account is not idle where others want more."""
    account = Account(link, 40, window_us=SHORT_US)
    modest, greedy, other = tenant(), tenant(), tenant()
    began_us, now_us, full = 0, 0, 0
    ends = time.monotonic() + MOST_SECONDS
    while full < 2 and time.monotonic() < ends:
        if account.held_in_window(modest, now_us) < 4:
            await account.take(modest)
        now_us = await account.demand({greedy: 1, other: 1})
        began_us = began_us or now_us
        windows = account.full_windows(began_us + SHORT_US, now_us)
        full = len(windows)
        for window in windows:
            assert window[modest] in range(1, 5)
            assert abs(window[greedy] - window[other]) <= 2
    assert full >= 2
    assert account.most_in_any_window() <= 40


async def test_a_tenant_that_leaves_leaves_its_share(link: PipelinedLink) -> None:
    """A window after a tenant has asked last, the account is the others' alone."""
    account, leaves, stays = Account(link, 40, window_us=SHORT_US), tenant(), tenant()
    for window in await account.shared({leaves: 3, stays: 1}, windows=1):
        assert window[stays] in range(8, 12)
    left_us = await account.demand({leaves: 3, stays: 1})
    alone: list[Counter[TenantId]] = []
    ends = time.monotonic() + MOST_SECONDS
    while not alone and time.monotonic() < ends:
        now_us = await account.demand({stays: 1})
        alone = account.full_windows(left_us + SHORT_US * 62 // 60, now_us)
    assert alone
    assert all(window[stays] == 40 for window in alone)
    assert account.most_in_any_window() <= 40


async def test_a_rest_that_fits_no_call_is_lent(link: PipelinedLink) -> None:
    """Where shares hold one call and a half, the halves together are calls too: what is kept for a tenant is whole calls of its own."""
    account, need = Account(link, 8, output_tokens=60), AccountUse(1, 0, 10)
    await account.demand({tenant(): 1, tenant(): 1, tenant(): 1, tenant(): 1}, need)
    assert sum(item.output_tokens for _, _, item in account.taken) == 60


async def test_calls_larger_than_a_share_are_made_in_turns(link: PipelinedLink) -> None:
    """However small its share, a tenant that has nothing in the window comes before those who have."""
    account, need = Account(link, 0, output_tokens=30, window_us=PASSING_US), AccountUse(1, 0, 10)
    tenants = [tenant() for _ in range(5)]
    for who in tenants:
        await account.take(who, need=need)
    assert [who for _, who, _ in account.taken] == tenants[:3]
    ends = time.monotonic() + MOST_SECONDS
    while len(account.taken) < 6 and time.monotonic() < ends:
        # Those who have had a call ask first each time.
        for who in tenants:
            await account.take(who, need=need)
        await asyncio.sleep(0.005)
    assert {who for _, who, _ in account.taken[3:6]} >= set(tenants[3:])


async def test_a_lender_has_its_share_back_within_one_window(link: PipelinedLink) -> None:
    """A tenant that comes back while another borrowed everything holds its full share one window after its first refusal."""
    ends = time.monotonic() + MOST_SECONDS
    steady = False
    while not steady and time.monotonic() < ends:
        account, borrower, lender = Account(link, 20, window_us=PASSING_US), tenant(), tenant()
        borrowed = await account.takes(borrower, 30)
        first = await account.take(lender)
        now_us = first.now_us
        # A sixtieth for the bucket that must have left whole, and one for the bucket it was in.
        while now_us < first.now_us + PASSING_US * 62 // 60:
            await account.take(borrower)
            now_us = (await account.take(lender)).now_us
            await asyncio.sleep(0.002)
        # However slow the attempts were until then.
        await account.takes(borrower, 20)
        await account.takes(lender, 10)
        assert account.most_in_any_window() <= 20
        if steady := account.asked_on(account.asked[0], now_us):
            assert borrowed == 20
            assert first.verdict is ShareVerdict.ACCOUNT_FULL
            assert account.taken_since(lender, first.now_us) >= 10
    assert steady


async def test_what_was_lent_is_not_lent_again_while_its_owner_lacks_it(link: PipelinedLink) -> None:
    """While a tenant within its share is refused, one beyond its share is refused even what has come free."""
    account, borrower, lender, first = Account(link, 4), tenant(), tenant(), call_id()
    await account.take(borrower, id=first)
    await account.takes(borrower, 3)
    assert (await account.take(lender)).verdict is ShareVerdict.ACCOUNT_FULL
    await account.count(borrower, first, NONE)
    refused = await account.take(borrower)
    assert refused.verdict is ShareVerdict.SHARE_USED
    assert (refused.limit, refused.used) == (2, 3)
    assert (await account.take(lender)).verdict is ShareVerdict.TAKEN


async def test_what_is_given_back_can_be_taken_again(link: PipelinedLink) -> None:
    """Output tokens a call did not use are free at once, and once, however often it is told."""
    account, who, first = Account(link, 0, output_tokens=100), tenant(), call_id()
    assert (await account.take(who, need=AccountUse(1, 0, 100), id=first)).verdict is ShareVerdict.TAKEN
    assert (await account.take(who, need=AccountUse(1, 0, 1))).verdict is ShareVerdict.ACCOUNT_FULL
    for _ in range(3):
        await account.count(who, first, AccountUse(1, 0, 40))
    assert (await account.take(who, need=AccountUse(0, 0, 61))).verdict is ShareVerdict.ACCOUNT_FULL
    assert (await account.take(who, need=AccountUse(0, 0, 30))).verdict is ShareVerdict.TAKEN
    await account.count(who, call_id(), NONE)
    await account.count(who, first, AccountUse(1, 0, 40))
    assert (await account.take(who, need=AccountUse(0, 0, 31))).verdict is ShareVerdict.ACCOUNT_FULL
    assert (await account.take(who, need=AccountUse(0, 0, 30))).verdict is ShareVerdict.TAKEN


async def test_what_was_used_beyond_what_was_taken_counts(link: PipelinedLink) -> None:
    """A provider that wrote past what it was told has used the account's minute all the same."""
    account, who, first = Account(link, 0, output_tokens=100), tenant(), call_id()
    await account.take(who, need=AccountUse(1, 0, 50), id=first)
    await account.count(who, first, AccountUse(1, 0, 70))
    assert (await account.take(who, need=AccountUse(1, 0, 31))).verdict is ShareVerdict.ACCOUNT_FULL
    assert (await account.take(who, need=AccountUse(1, 0, 30))).verdict is ShareVerdict.TAKEN


async def test_a_call_takes_its_share_once(link: PipelinedLink) -> None:
    """Repeated it takes nothing more, settled or not; one that was given back whole may take again."""
    account, who, id = Account(link, 2), tenant(), call_id()
    assert (await account.take(who, id=id)).verdict is ShareVerdict.TAKEN
    assert (await account.take(who, id=id)).verdict is ShareVerdict.TAKEN_BEFORE
    await account.count(who, id, ONE)
    assert (await account.take(who, id=id)).verdict is ShareVerdict.TAKEN_BEFORE
    await account.count(who, id, NONE)
    assert (await account.take(who, id=id)).verdict is ShareVerdict.TAKEN
    assert await account.takes(who, 3) == 1


async def test_what_two_attempts_have_stays_until_both_gave_it_back(link: PipelinedLink) -> None:
    """Whoever is refused what it asked for gives nothing back that another attempt under the same id holds, however often it says so."""
    account, who, id = Account(link, 1), tenant(), call_id()
    shares = ProviderShares(account.store, {account.name: account.limits})
    attempts = [await shares.take(account.name, who, 1, id, ONE) for _ in range(2)]
    first, second = [share for share in attempts if isinstance(share, TakenShare)]
    for _ in range(2):
        await shares.give_back([first])
    assert await account.takes(who, 1) == 0
    await shares.give_back([second])
    assert await account.takes(who, 2) == 1


async def test_what_a_caller_took_that_went_away_is_given_back(redis_server: RedisServer) -> None:
    """Its taking was on the way already; it is followed by its giving back."""
    link = PipelinedLink(redis_server.url, connections=1, timeout_seconds=5.0)
    account, who = Account(link, 1), tenant()
    shares = ProviderShares(account.store, {account.name: account.limits})
    taking = asyncio.ensure_future(shares.take(account.name, who, 1, call_id(), ONE))
    await asyncio.sleep(0)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert await link.send("EXISTS", f"{{acct:{account.name}}}:totals") == 1
    assert await account.takes(who, 2) == 1
    await link.close()


class HeldUp(PipelinedLink):
    """A link that may be told to let its next batch reach the store later than what is sent over its other connection."""

    holds_up = False

    def __init__(self, url: str) -> None:
        super().__init__(url, connections=2, timeout_seconds=5.0)
        self.begun, self.ended = asyncio.Event(), asyncio.Event()

    async def _flush(self, commands: list[Command]) -> Sequence[object | Exception]:
        if not self.holds_up:
            return await super()._flush(commands)
        self.holds_up = False
        self.begun.set()
        await asyncio.sleep(0.2)
        try:
            return await super()._flush(commands)
        finally:
            self.ended.set()


async def test_what_a_caller_took_that_went_away_is_not_given_back_before_it_came(redis_server: RedisServer) -> None:
    """Of two connections the second may be the faster one: what is given back follows what was taken all the same."""
    link = HeldUp(redis_server.url)
    account, who = Account(link, 2), tenant()
    shares = ProviderShares(account.store, {account.name: account.limits})
    # The script is there from then on.
    assert await account.takes(who, 1) == 1
    link.holds_up = True
    taking = asyncio.ensure_future(shares.take(account.name, who, 1, call_id(), ONE))
    await link.begun.wait()
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    await link.ended.wait()
    assert await account.takes(who, 2) == 1
    await link.close()


async def test_who_is_cancelled_twice_leaves_no_share_of_any_account(link: PipelinedLink) -> None:
    """The giving back that the first began goes on without its caller, of all accounts."""
    accounts, who, id = [Account(link, 1) for _ in range(3)], tenant(), call_id()
    store = Slow(link)
    shares = ProviderShares(store, {account.name: account.limits for account in accounts})
    taken = [await shares.take(account.name, who, 1, id, ONE) for account in accounts]
    giving = asyncio.ensure_future(shares.give_back([share for share in taken if isinstance(share, TakenShare)]))
    await store.begun.wait()
    for _ in range(2):
        giving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await giving
    store.goes_on.set()

    async def all_are_free() -> bool:
        return await link.send("EXISTS", *(f"{{acct:{account.name}}}:calls" for account in accounts)) == 0

    await eventually(all_are_free)
    assert [await account.takes(who, 2) for account in accounts] == [1] * 3


class Slow(RedisShares):
    """Gives nothing back before it is told to go on."""

    def __init__(self, link: PipelinedLink) -> None:
        super().__init__(link)
        self.begun, self.goes_on = asyncio.Event(), asyncio.Event()

    async def give_back(self, shares: Sequence[TakenShare]) -> None:
        self.begun.set()
        await self.goes_on.wait()
        await super().give_back(shares)


async def test_attempts_are_told_apart_by_their_last_digit(link: PipelinedLink) -> None:
    """The largest numbers that attempts have are kept as they are: one gives back what is its own alone."""
    account, who, id = Account(link, 1), tenant(), call_id()
    attempts = [TakenShare(account.name, who, id, 2**53 - place) for place in range(1, 9)]
    for share in attempts:
        await account.store.take(account.name, account.limits, who, 1, id, ONE, None, share.attempt)
    for share in attempts:
        assert await account.takes(who, 1) == 0
        for _ in range(2):
            await account.store.give_back([share])
    assert await account.takes(who, 2) == 1


async def test_an_id_that_more_attempts_have_than_are_told_apart_keeps_its_share(link: PipelinedLink) -> None:
    """What is kept of a call is bounded, however often it is repeated; too much is counted then, never too little."""
    account, who, id = Account(link, 1), tenant(), call_id()
    shares = ProviderShares(account.store, {account.name: account.limits})
    attempts = [await shares.take(account.name, who, 1, id, ONE) for _ in range(12)]
    entries = cast("list[bytes]", await link.send("HVALS", f"{{acct:{account.name}}}:calls"))
    assert [len(cast("list[int]", unpacked(entry))) for entry in entries] == [15]
    await shares.give_back([share for share in attempts if isinstance(share, TakenShare)])
    assert await account.takes(who, 1) == 0


async def test_more_than_was_taken_under_an_id_is_other_amounts(link: PipelinedLink) -> None:
    """A second attempt may need less than the first took, and not more: that would be taken by nobody."""
    account, who, id = Account(link, 2, input_tokens=100, output_tokens=100), tenant(), call_id()
    shares = ProviderShares(account.store, {account.name: account.limits})
    await shares.take(account.name, who, 1, id, AccountUse(1, 20, 10))
    for need in (AccountUse(1, 20, 10), AccountUse(1, 3, 0)):
        assert isinstance(await shares.take(account.name, who, 1, id, need), TakenShare)
    for need in (AccountUse(1, 21, 10), AccountUse(1, 0, 11)):
        with pytest.raises(ContentConflict):
            await shares.take(account.name, who, 1, id, need)
    await account.count(who, id, AccountUse(1, 1, 1))
    assert isinstance(await shares.take(account.name, who, 1, id, AccountUse(1, 20, 10)), TakenShare)


async def test_what_a_replica_of_before_took_is_left_to_it(link: PipelinedLink) -> None:
    """While replicas are renewed, entries of the older ones name no attempt: the newer ones count them and give nothing of them back."""
    account, who, id = Account(link, 1), tenant(), call_id()
    await account.take(who, id=id)
    key = f"{{acct:{account.name}}}:calls"
    ((name, entry),) = pairs(cast("list[bytes]", await link.send("HGETALL", key)))
    await link.send("HSET", key, name, packed(cast("list[int]", unpacked(entry))[:4]))
    shares = ProviderShares(account.store, {account.name: account.limits})
    attempts = [await shares.take(account.name, who, 1, id, AccountUse(1, 9, 9)) for _ in range(4)]
    given = [share for share in attempts if isinstance(share, TakenShare)]
    assert len(given) == 4
    await shares.give_back(given)
    assert await account.takes(who, 1) == 0


def pairs(reply: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Fields and values of a hash."""
    return list(zip(reply[::2], reply[1::2], strict=True))


async def test_nothing_is_given_back_that_has_left_the_window(link: PipelinedLink) -> None:
    """A call that ends after its minute gives nothing back: what others took since stays counted."""
    account, who, first = Account(link, 2, window_us=SHORT_US), tenant(), call_id()
    answer = await account.take(who, id=first)
    now_us = answer.now_us
    while now_us < answer.now_us + SHORT_US * 62 // 60:
        now_us = (await account.take(who)).now_us
        await asyncio.sleep(0.01)
    await account.takes(who, 2)
    await account.count(who, first, NONE)
    assert await account.takes(who, 3) == 0


async def test_no_window_holds_more_than_the_limits_whatever_is_asked(link: PipelinedLink) -> None:
    """The oracle: calls of any size, settled for any part of it, in any order; and what is kept of claims is the sum of its parts."""
    account = Account(link, 30, input_tokens=200, output_tokens=100, window_us=SHORT_US)
    weights = {tenant(): random.randint(1, 5) for _ in range(4)}
    calls: dict[ReservationId, tuple[int, TenantId, AccountUse]] = {}
    began_us = now_us = (await account.take(tenant())).now_us
    while now_us < began_us + 2 * SHORT_US:
        who, id = random.choice(list(weights)), call_id()
        need = AccountUse(1, random.randint(0, 60), random.randint(0, 30))
        answer = await account.take(who, weights[who], need, id)
        now_us = answer.now_us
        if answer.verdict is ShareVerdict.TAKEN:
            calls[id] = (now_us, who, need)
            recent = [use.in_order() for at_us, _, use in calls.values() if at_us > now_us - SHORT_US]
            assert all(sum(used) <= limit for used, limit in zip(zip(*recent, strict=True), (30, 200, 100), strict=True))
        if calls and random.random() < 0.3:
            settled, (at_us, owner, took) = random.choice(list(calls.items()))
            calls[settled] = (at_us, owner, AccountUse(1, random.randint(0, took.input_tokens), random.randint(0, took.output_tokens)))
            await account.count(owner, settled, calls[settled][2])
    weights_sum, claimed, members = await kept(account)
    assert weights_sum == sum(weight for weight, _ in members)
    assert claimed == tuple(map(sum, zip(*(parts for _, parts in members), strict=True)))


async def kept(account: Account) -> tuple[int, tuple[int, ...], list[tuple[int, tuple[int, ...]]]]:
    """The sum of weights and of claims, and of each member its own; a claim's first two figures are no sums."""
    key = f"{{acct:{account.name}}}:"
    members = cast("list[bytes]", await account.link.send("HVALS", f"{key}members"))
    sums = cast("list[bytes]", await account.link.send("HMGET", f"{key}totals", "weights", "claimed"))
    packed = [cast("tuple[int, object, tuple[int, ...]]", unpacked(member)) for member in members]
    return int(sums[0]), parts_of(cast("tuple[int, ...]", unpacked(sums[1]))), [(weight, parts_of(claim)) for weight, _, claim in packed]


def parts_of(claim: tuple[int, ...]) -> tuple[int, ...]:
    """Weight, use and what is kept, a dimension."""
    return tuple(figure for place, figure in enumerate(claim) if place % 5 >= 2)


async def test_a_call_larger_than_the_account_is_told_so(link: PipelinedLink) -> None:
    """What no waiting can admit is refused without a time to try again."""
    account, who = Account(link, 0, input_tokens=50), tenant()
    need = AccountUse(1, 51, 0)
    answer = await account.take(who, need=need)
    assert answer.verdict is ShareVerdict.TOO_LARGE
    refusal = share_refusal(account.name, who, answer, need)
    assert refusal.retry_after_seconds is None
    assert refusal.message == "This call needs 51 input tokens and the provider's account has 50 a minute: make the call smaller."


async def test_who_waits_as_told_is_admitted(link: PipelinedLink) -> None:
    """The refusal says when the account has room, and then it has."""
    account, who = Account(link, 1, window_us=PASSING_US), tenant()
    await account.take(who)
    answer = await account.take(who)
    refusal = share_refusal(account.name, who, answer, ONE)
    assert refusal.retry_after_seconds is not None
    await asyncio.sleep(refusal.retry_after_seconds)
    assert (await account.take(who)).verdict is ShareVerdict.TAKEN


async def test_an_erased_tenant_is_no_member_any_more(link: PipelinedLink) -> None:
    """Forgetting a tenant removes its id from every key of the account and its weight from the others' shares."""
    account, gone, stays = Account(link, 10), tenant(), tenant()
    await account.take(gone, 9)
    await account.take(stays, 1)
    assert await account.store.holds(account.name, gone)
    assert await account.store.forget(account.name, gone) == 1
    assert not await account.store.holds(account.name, gone)
    for kind in KINDS:
        dump = await link.send("DUMP", f"{{acct:{account.name}}}:{kind}")
        assert str(gone).encode() not in (dump if isinstance(dump, bytes) else b"")
    assert await account.takes(stays, 20) == 8


async def test_an_account_nobody_knows_has_no_limits(link: PipelinedLink) -> None:
    """A call on an account without configured limits takes nothing and is never refused."""
    shares = ProviderShares(RedisShares(link), {"known": AccountUse(1, 0, 0)})
    assert await shares.take("unknown", tenant(), 1, call_id(), AccountUse(1, 10**7, 10**7)) is None
    name = f"acct-{uuid4().hex}"
    shares = ProviderShares(RedisShares(link), {name: AccountUse(1, 0, 0)})
    assert await shares.take(name, tenant(), 1, call_id(), ONE) is not None
    with pytest.raises(LimitExceeded):
        await shares.take(name, tenant(), 1, call_id(), ONE)
