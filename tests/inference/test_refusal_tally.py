"""Refusals of the limits are counted by the minute and told to the ledger: whose, why, by which rule, each once."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from google.protobuf.duration_pb2 import Duration

from mesh.common.v1 import error_reason_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2 as limit_pb
from services.inference import refusal_tally
from services.inference.call import Question
from services.inference.refusal_tally import RefusalTally, RefusalTold
from services.kernel.errors import Forbidden, InvalidRequest, LimitExceeded, MeshError, Unavailable
from services.kernel.ids import TenantId, new_uuid7
from tests.inference.conftest import World, running_service, service_settings, until
from tests.inference.peers import Tenant

PLAN_LIMIT = error_reason_pb2.ERROR_REASON_PLAN_LIMIT
MINUTE = datetime(2026, 11, 28, 12, 30, tzinfo=UTC)


def refused(rule: str) -> limit_pb.Refusal:
    """What the limits answer."""
    return limit_pb.Refusal(reason="PLAN_LIMIT", message="No.", needed=7, status=limit_pb.LimitStatus(rule=rule, limit=5, used=5))


async def test_refused_calls_are_told_with_their_names(world: World, tenant: Tenant) -> None:
    """By tenant, reason, rule, model, feature and user, with the tenant's proof; one that waited too, and none that was answered."""
    world.script.heard.clear()
    world.script.hooks["reserve"] = lambda _: refused("tokens_per_minute")
    for _ in range(3):
        await world.refusal(tenant, user="u-1", feature="chat")

    def refuse_alone(_: Any) -> Any:
        raise Forbidden(error_reason_pb2.ERROR_REASON_FEATURE, "No.")

    # Whoever may wait asks by itself, and is refused by a status.
    world.script.hooks["reserve"] = refuse_alone
    await world.refusal(tenant, user="u-2", max_wait=Duration(seconds=1))
    del world.script.hooks["reserve"]
    await world.answer(tenant, user="u-3")

    def told() -> dict[tuple[str, ...], int]:
        # Of each minute the last count is the highest.
        last = {
            (count.tenant_id, count.minute_time.seconds, count.reason, count.rule, count.feature, count.user): count
            for request in world.script.all("record_refusals")
            for count in request.counts
        }
        assert all(count.context_token and count.model and len(count.tenant_id) == 16 for count in last.values())
        sums: dict[tuple[str, ...], int] = {}
        for (whose, _, *names), count in last.items():
            if whose == tenant.tenant_id.bytes:
                sums[tuple(names)] = sums.get(tuple(names), 0) + count.count
        return sums

    await until(lambda: told() == {("PLAN_LIMIT", "tokens_per_minute", "chat", "u-1"): 3, ("FEATURE", "", "", "u-2"): 1})


async def test_what_is_not_told_yet_is_told_at_the_end(world: World) -> None:
    """A process that is stopped tells its last counts first."""
    tenant = await world.new_tenant()
    settings = service_settings(world.inference_dsn, world.peers.address, world.provider_url)
    world.script.hooks["reserve"] = lambda _: refused("requests_per_minute")
    async with running_service(settings) as (_, channel):
        await world.through(channel).refusal(tenant)
    [count] = [
        count for request in world.script.all("record_refusals") for count in request.counts if count.tenant_id == tenant.tenant_id.bytes
    ][-1:]
    assert (count.rule, count.count) == ("requests_per_minute", 1)


class Book:
    """A ledger that keeps what it is told, or refuses as it was told to."""

    def __init__(self) -> None:
        self.told: list[RefusalTold] = []
        self.refusing: MeshError | None = None
        self.meanwhile: list[Any] = []

    async def record_refusals(self, counts: list[RefusalTold]) -> None:
        if self.refusing is not None:
            raise self.refusing
        for happens in self.meanwhile:
            happens()
        self.told += counts


def asked(user: str = "u", **changes: Any) -> Question:
    """Of a question what is counted."""
    tenant_id = changes.pop("tenant_id", TenantId(new_uuid7()))
    named = SimpleNamespace(tenant_id=tenant_id, tenant=SimpleNamespace(token="t"), model=SimpleNamespace(name="m"), feature="f", user=user)
    return cast("Question", named)


def limit(rule: str = "r") -> LimitExceeded:
    """A refusal by a rule."""
    return LimitExceeded(PLAN_LIMIT, "No.", rule=rule)


async def test_counts_rise_and_are_told_again_until_they_are_taken() -> None:
    """What failed is told again, what was counted meanwhile is told next, and what is told once is not told again."""
    book, question = Book(), asked()
    tally = RefusalTally(cast("Any", book), now=lambda: MINUTE)
    for error in (limit(), limit(), Unavailable("ratelimit"), InvalidRequest("x", "is bad")):
        tally.add(question, error)
    book.refusing = Unavailable("metering")
    with pytest.raises(Unavailable):
        await tally.tell()
    book.refusing = None
    book.meanwhile = [lambda: tally.add(question, limit())]
    await tally.tell()
    book.meanwhile = []
    await tally.tell()
    await tally.tell()
    assert [(told.names.rule, told.names.minute * 60, told.refusals) for told in book.told] == [
        ("r", int(MINUTE.timestamp()), 2),
        ("r", int(MINUTE.timestamp()), 3),
    ]


async def test_what_the_contract_refuses_keeps_no_other_from_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up with an error in the log."""
    monkeypatch.setattr(refusal_tally, "MOST_PER_REQUEST", 1)
    book = Book()
    tally = RefusalTally(cast("Any", book), now=lambda: MINUTE)
    tally.add(asked("one"), limit())
    book.refusing = InvalidRequest("counts[0]", "is bad")
    await tally.tell()
    book.refusing = None
    tally.add(asked("two"), limit())
    await tally.tell()
    assert [told.names.user for told in book.told] == ["two"]


async def test_names_are_bounded_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound only tenant, minute and reason are told apart; minutes that are over and told are forgotten."""
    monkeypatch.setattr(refusal_tally, "MOST_NAMES", 3)
    book, whose, now = Book(), TenantId(new_uuid7()), MINUTE
    tally = RefusalTally(cast("Any", book), now=lambda: now)
    for number in range(9):
        tally.add(asked(f"u-{number}", tenant_id=whose), limit())
    await tally.tell()
    assert sorted((told.names.user, told.refusals) for told in book.told) == [("", 6), ("u-0", 1), ("u-1", 1), ("u-2", 1)]
    now += timedelta(minutes=5)
    await tally.tell()
    assert dict(tally.counts) == {}


async def test_an_outage_ends_no_telling() -> None:
    """The loop goes on after the ledger was away, and what was counted meanwhile is told."""
    book = Book()
    book.refusing = Unavailable("metering")
    tally = RefusalTally(cast("Any", book), tell_seconds=0.001, now=lambda: MINUTE)
    tally.add(asked(), limit())
    loop = asyncio.create_task(tally.run())
    await asyncio.sleep(0)
    book.refusing = None
    await until(lambda: bool(book.told))
    loop.cancel()
    assert [told.refusals for told in book.told] == [1]
