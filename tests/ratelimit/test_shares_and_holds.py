"""Shares of an account and holds of a tenant go together, whatever callers do: repeat their ids, change their minds, ask for too much."""

import asyncio
import random
from datetime import UTC, datetime
from hashlib import sha1
from typing import Any, cast
from uuid import uuid4

import pytest

from mesh.common.v1 import limit_rule_pb2
from mesh.tenant.v1.tenant_service_pb2 import TenantConfig
from services.kernel.ids import ReservationId, new_uuid7
from services.kernel.tenant_context import TenantContext
from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.adapters.redis_shares import RedisShares
from services.ratelimit.adapters.tenant_rules import terms_of
from services.ratelimit.fencing import Fencing
from services.ratelimit.limits import Amounts, Demand
from services.ratelimit.open_allowance import OpenAllowance
from services.ratelimit.provider_share import AccountUse, ProviderShares
from services.ratelimit.ready_counters import ReadyCounters
from services.ratelimit.request import Request
from services.ratelimit.reservation import Held, Reservations
from services.ratelimit.terms import Terms
from tests.ratelimit.callers import AtStore, Stores, eventually
from tests.ratelimit.rules import rule

RULES = [rule("largest", "tokens", "request", 100), rule("at_once", "running", "running", 12)]
TERMS = terms_of(TenantConfig(version=1, limit_rules=limit_rule_pb2.LimitRules(rules=RULES)))
MOST = AccountUse(15, 0, 0)


class Calls:
    """Calls of one tenant by an account, each under one of a few ids, and what came of them."""

    def __init__(self, link: PipelinedLink, rng: random.Random) -> None:
        self.rng, self.link = rng, link
        self.account = f"main-{uuid4().hex}"
        self.at_store = AtStore(Stores(link, lease_seconds=300.0), link, TERMS)
        self.context = TenantContext(
            self.at_store.tenant_id, "free", "local", "mesh:inference", frozenset(), 1, datetime.now(UTC), False, "token"
        )
        self.ids = [ReservationId(new_uuid7()) for _ in range(20)]
        self.told: set[ReservationId] = set()
        unused = cast("Any", None)
        fencing, store = Fencing(self.at_store.store, unused), self.at_store.store
        counters = ReadyCounters(self._terms_of, unused, fencing, OpenAllowance(store))
        shares = ProviderShares(RedisShares(link), {self.account: MOST})
        self.reservations = Reservations(store, counters, fencing, shares=shares)

    async def some(self) -> None:
        """One message with calls of which a rule refuses some, whose sender may leave at any moment."""
        tokens = [self.rng.choice((1, 1, 101)) for _ in range(self.rng.randrange(1, 4))]
        requests = [Request(self.rng.choice(self.ids), Demand(Amounts(amount, 0)), account=self.account) for amount in tokens]
        try:
            async with asyncio.timeout(self.rng.choice((0.0005, 0.001, 0.002, 0.004, 60))):
                outcomes = await self.reservations.decide(self.context, requests)
        except TimeoutError:
            return
        self.told |= {request.reservation_id for request, outcome in zip(requests, outcomes, strict=True) if isinstance(outcome, Held)}

    async def held(self) -> set[ReservationId]:
        """Who has a hold in the store."""
        return {each for each in self.ids if await self.at_store.state(each) == "held"}

    async def counted(self) -> set[ReservationId]:
        """Who has a share in the store."""
        names = {sha1(str(self.at_store.tenant_id).encode() + each.bytes).hexdigest().encode(): each for each in self.ids}  # noqa: S324
        return {names[name] for name in cast("list[bytes]", await self.link.send("HKEYS", f"{{acct:{self.account}}}:calls"))}

    async def _terms_of(self, context: TenantContext, at_least: int = 0) -> Terms:
        return self.at_store.terms


@pytest.mark.parametrize("seed", range(4))
async def test_there_is_no_share_without_a_hold_and_no_answer_without_both(link: PipelinedLink, seed: int) -> None:
    """Many callers at once, of whom a rule or the account refuses some and many leave: what is left has both, and each who was held has."""
    calls = Calls(link, random.Random(seed))
    await calls.at_store.loaded()
    for _ in range(25):
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(calls.some())

    async def no_share_is_left_over() -> bool:
        return await calls.counted() <= await calls.held()

    # Who left while shares were given back did not wait for it.
    await eventually(no_share_is_left_over)
    assert calls.told <= await calls.held()
    assert calls.told <= await calls.counted()
