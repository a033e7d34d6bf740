"""A provider account's minute is shared by weight, lent while unused, and comes back within one window. Windows are short here."""

import asyncio
from uuid import uuid4

import pytest

from services.kernel.errors import LimitExceeded
from services.kernel.ids import TenantId, new_uuid7
from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.adapters.redis_shares import KINDS, RedisShares
from services.ratelimit.provider_share import AccountUse, ProviderShares, ShareAnswer, ShareVerdict, TakenShare, share_refusal

WINDOW_US = 1_200_000
ONE = AccountUse(1, 0, 0)


class Account:
    """One account of its own, and what was taken of it by the store's clock."""

    def __init__(self, link: PipelinedLink, requests: int, *, input_tokens: int = 0, output_tokens: int = 0) -> None:
        self.link = link
        self.store = RedisShares(link, window_us=WINDOW_US)
        self.name = f"acct-{uuid4().hex}"
        self.limits = AccountUse(requests, input_tokens, output_tokens)
        self.taken: list[tuple[int, TenantId, AccountUse]] = []

    async def take(self, tenant: TenantId, weight: int = 1, need: AccountUse = ONE) -> ShareAnswer:
        answer = await self.store.take(self.name, self.limits, tenant, weight, need)
        if answer.verdict is ShareVerdict.TAKEN:
            self.taken.append((answer.now_us, tenant, need))
        return answer

    async def takes(self, tenant: TenantId, count: int, weight: int = 1) -> int:
        """How many of `count` attempts were admitted."""
        return sum([(await self.take(tenant, weight)).verdict is ShareVerdict.TAKEN for _ in range(count)])

    def held_in_window(self, tenant: TenantId, now_us: int) -> int:
        return sum(need.requests for at, who, need in self.taken if who == tenant and at > now_us - WINDOW_US)

    def most_in_any_window(self) -> int:
        times = [at for at, _, _ in self.taken]
        return max(sum(start <= at < start + WINDOW_US for at in times) for start in times)


def tenant() -> TenantId:
    """An id nobody has used."""
    return TenantId(new_uuid7())


async def test_a_lone_tenant_may_use_the_whole_account(link: PipelinedLink) -> None:
    """Shares nobody uses are lent: one active tenant is admitted up to the account's own limit and not beyond."""
    account = Account(link, 10)
    assert await account.takes(tenant(), 15) == 10


async def test_tenants_under_load_share_by_weight(link: PipelinedLink) -> None:
    """Under steady demand of all, the heavier tenant is served more once it has asked for a window; the account's limit is kept in any."""
    account, small, large = Account(link, 40), tenant(), tenant()
    now_us, starts_us, ends_us = 0, 0, 0
    while not ends_us or now_us < ends_us:
        # Many at a time, so that both ask for more than there is however slow the machine: what is not asked for is lent.
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(account.take(small, 1))
                group.create_task(account.take(large, 3))
        now_us = (await account.take(large, 3)).now_us
        starts_us, ends_us = starts_us or now_us + WINDOW_US, ends_us or now_us + 5 * WINDOW_US
        await asyncio.sleep(0.005)
    taken = [who for at_us, who, _ in account.taken if at_us > starts_us]
    # What has just come free is lent to whoever asks first, and is back a window later: near three to one, never one to one.
    assert taken.count(large) >= 1.4 * taken.count(small) > 0
    assert account.most_in_any_window() <= 40


async def test_a_lender_has_its_share_back_within_one_window(link: PipelinedLink) -> None:
    """A tenant that comes back while another borrowed everything holds its full share one window after its first refusal."""
    account, borrower, lender = Account(link, 20), tenant(), tenant()
    assert await account.takes(borrower, 30) == 20
    first = await account.take(lender)
    assert first.verdict is ShareVerdict.ACCOUNT_FULL
    now_us, got_us = first.now_us, 0
    while not got_us and now_us < first.now_us + 3 * WINDOW_US:
        await account.take(borrower)
        now_us = (await account.take(lender)).now_us
        if account.held_in_window(lender, now_us) >= 10:
            got_us = now_us
        await asyncio.sleep(0.002)
    # A sixtieth for the bucket that must have left whole, and some for the pace of the attempts.
    assert got_us - first.now_us <= WINDOW_US * 1.1


async def test_what_was_lent_is_not_lent_again_while_its_owner_lacks_it(link: PipelinedLink) -> None:
    """While a tenant within its share is refused, one beyond its share is refused even what has come free."""
    account, borrower, lender = Account(link, 4), tenant(), tenant()
    await account.takes(borrower, 4)
    assert (await account.take(lender)).verdict is ShareVerdict.ACCOUNT_FULL
    for at_us, who, need in list(account.taken):
        await account.store.give_back(TakenShare(account.name, who, at_us, need), AccountUse(0, 0, 0))
    await account.store.give_back(TakenShare(account.name, borrower, account.taken[0][0], ONE), ONE)
    refused = await account.take(borrower)
    assert refused.verdict is ShareVerdict.SHARE_USED
    assert (refused.limit, refused.used) == (2, 3)
    assert (await account.take(lender)).verdict is ShareVerdict.TAKEN


async def test_what_is_given_back_can_be_taken_again(link: PipelinedLink) -> None:
    """Output tokens a call did not use are free at once; giving back more than was taken frees no more than that."""
    account, who = Account(link, 0, output_tokens=100), tenant()
    shares = ProviderShares(account.store, {account.name: account.limits})
    taken = await shares.take(account.name, who, 1, AccountUse(1, 0, 100))
    assert taken is not None
    assert (await account.take(who, need=AccountUse(1, 0, 1))).verdict is ShareVerdict.ACCOUNT_FULL
    await shares.give_back([(taken, AccountUse(9, 9, 60))])
    assert (await account.take(who, need=AccountUse(0, 0, 61))).verdict is ShareVerdict.ACCOUNT_FULL
    assert (await account.take(who, need=AccountUse(0, 0, 30))).verdict is ShareVerdict.TAKEN
    await shares.give_back([(TakenShare(account.name, who, taken.taken_us, AccountUse(1, 0, 40)), AccountUse(0, 0, 10**6))])
    assert (await account.take(who, need=AccountUse(0, 0, 71))).verdict is ShareVerdict.ACCOUNT_FULL
    assert (await account.take(who, need=AccountUse(0, 0, 70))).verdict is ShareVerdict.TAKEN


async def test_nothing_is_given_back_that_has_left_the_window(link: PipelinedLink) -> None:
    """A call that ends after its minute gives nothing back: what others took since stays counted."""
    account, who = Account(link, 2), tenant()
    taken = await account.take(who)
    stale = TakenShare(account.name, who, taken.now_us - 2 * WINDOW_US, ONE)
    await account.store.give_back(stale, ONE)
    assert await account.takes(who, 3) == 1


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
    account, who = Account(link, 1), tenant()
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
    assert await shares.take("unknown", tenant(), 1, AccountUse(1, 10**7, 10**7)) is None
    name = f"acct-{uuid4().hex}"
    shares = ProviderShares(RedisShares(link), {name: AccountUse(1, 0, 0)})
    assert await shares.take(name, tenant(), 1, ONE) is not None
    with pytest.raises(LimitExceeded):
        await shares.take(name, tenant(), 1, ONE)
