"""How long conversations are kept, and that each tenant's are purged by that term once a day."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from services.kernel.ids import TenantId
from services.tenant.adapters.postgres_life import PostgresRetention
from services.tenant.app.parts import Parts, build_parts
from services.tenant.retention import RetentionRunner
from tests.tenant.harness import Harness, refusal, update, with_key

FIELD = ["data_retention_days"]


@pytest.fixture
async def parts(harness: Harness) -> AsyncIterator[Parts]:
    """What the service is built from, once more, on the same stores."""
    async with AsyncExitStack() as stack:
        yield await build_parts(harness.settings, stack)


@pytest.mark.parametrize(("plan", "days"), [("free", 30), ("starter", 90), ("professional", 365), ("enterprise", 0)])
async def test_the_term_is_the_plans_unless_somebody_said_otherwise(harness: Harness, parts: Parts, plan: str, days: int) -> None:
    """Each plan's own days hold for a tenant without a setting; 0 keeps conversations for ever."""
    tenant_id = TenantId(UUID((await harness.create(plan=plan)).tenant.tenant_id))
    assert await PostgresRetention(parts.database, parts.jobs).days(tenant_id) == days


async def test_a_tenant_shortens_its_term_and_an_operator_sets_it(harness: Harness, parts: Parts) -> None:
    """The tenant's word counts as long as it is shorter than the plan's, the operator's always; without either the plan's is back."""
    created = await harness.create()
    tenant_id, key, operator = created.tenant.tenant_id, with_key(created.api_key), harness.as_operator(created.tenant.tenant_id)
    terms = PostgresRetention(parts.database, parts.jobs)

    async def days() -> int:
        return await terms.days(TenantId(UUID(tenant_id)))

    await update(harness, key, FIELD, data_retention_days=7)
    assert await days() == 7
    for longer in (366, 0):
        await refusal(update(harness, key, FIELD, data_retention_days=longer))
        assert await days() == 7
    # A smaller plan holds what the tenant chose under a larger one, and a larger one gives it back.
    await update(harness, key, FIELD, data_retention_days=300)
    for plan, held in (("free", 30), ("professional", 300), ("enterprise", 300)):
        await harness.execute("UPDATE tenant.tenants SET plan = $2 WHERE tenant_id = $1", UUID(tenant_id), plan)
        assert await days() == held
    await harness.execute("UPDATE tenant.tenants SET plan = 'professional' WHERE tenant_id = $1", UUID(tenant_id))
    for word in (4_000, 0, 3):
        await update(harness, operator, FIELD, data_retention_days=word)
        assert await days() == word
    await update(harness, operator, FIELD)
    assert await days() == 365


async def test_each_tenant_is_purged_once_a_day_by_its_term(harness: Harness, parts: Parts) -> None:
    """With a term of 30 days services are asked for what is older until nothing is left, with 0 nobody is; once a day either way."""
    created = await harness.create()
    tenant_id, operator = UUID(created.tenant.tenant_id), harness.as_operator(created.tenant.tenant_id)
    calendar, now, inference = PostgresRetention(parts.database, parts.jobs), datetime.now(UTC), harness.peers["inference"]
    peers = {"inference": parts.peers["inference"]}
    runner = RetentionRunner(calendar, calendar, peers, parts.minter, clock=lambda: now, poll_seconds=1.0)
    for days, calls in ((0, []), (30, [tenant_id] * 2)):
        await update(harness, operator, FIELD, data_retention_days=days)
        await harness.execute("DELETE FROM tenant.purges WHERE tenant_id = $1", tenant_id)
        while await runner.purge_due():
            continue
        assert [item for item, _ in inference.purged if item == tenant_id] == calls
    times = {older_than for item, older_than in inference.purged if item == tenant_id}
    assert all(abs(older_than - (now - timedelta(days=30))) < timedelta(seconds=1) for older_than in times)
    assert await harness.value("SELECT removed_count FROM tenant.purges WHERE tenant_id = $1", tenant_id) == 6
    assert not await calendar.take(TenantId(tenant_id))
