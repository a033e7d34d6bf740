"""Demands of many tenants at the store itself, in one exchange."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, tzinfo

import pytest

from services.kernel.ids import TenantId, new_uuid7
from services.ratelimit.adapters import redis_store
from services.ratelimit.limits import Amounts, Demand
from services.ratelimit.request import Question
from services.ratelimit.standing import Verdict
from tests.ratelimit.callers import AtStore


async def test_more_of_one_tenant_than_a_script_takes_are_decided_in_their_order(at_store: Callable[..., AtStore]) -> None:
    """The first fifty go with the other tenants, the rest after them."""
    many, few = await at_store(tokens_per_day=70).loaded(), await at_store(tokens_per_day=70).loaded()
    questions = [question_of(many, 80), question_of(few, 2)]
    first, second = await many.store.reserve_each(questions)
    assert not isinstance(first, Exception)
    assert not isinstance(second, Exception)
    assert [answer.verdict for answer in first] == [Verdict.HELD] * 70 + [Verdict.REFUSED] * 10
    assert [answer.verdict for answer in second] == [Verdict.HELD] * 2


async def test_a_clock_that_is_days_off_is_put_right_in_a_batch(at_store: Callable[..., AtStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tenant is decided by the store's day, also by a process that does not know which it is."""

    class DaysAhead(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override] # a plain datetime is what callers want
            return datetime.now(tz) + timedelta(days=3)

    maker = await at_store(tokens_per_day=100).loaded()
    tenants = [await replace(maker, tenant_id=TenantId(new_uuid7())).loaded() for _ in range(4)]
    monkeypatch.setattr(redis_store, "datetime", DaysAhead)
    found = await maker.store.reserve_each([question_of(tenant, 2) for tenant in tenants])
    assert [[answer.verdict for answer in answers] for answers in found] == [[Verdict.HELD] * 2] * 4  # type: ignore[union-attr] # nothing failed
    assert abs(maker.store._ahead_us + 3 * 86_400 * 10**6) < 60 * 10**6


def question_of(tenant: AtStore, count: int) -> Question:
    """So many demands of a token each."""
    return Question(tenant.tenant_id, tenant.terms, [tenant.ask(new_uuid7(), Demand(Amounts(1, 0))) for _ in range(count)])
