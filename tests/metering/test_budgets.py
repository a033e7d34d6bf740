"""Budgets through the service: what they count, when their thresholds fire, and what they are heading for."""

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID
from zoneinfo import ZoneInfo

import grpc
import pytest
import structlog

from mesh.common.v1 import error_reason_pb2 as reasons
from mesh.common.v1 import limit_rule_pb2 as rules_pb
from mesh.metering.v1 import budget_service_pb2 as pb
from mesh.metering.v1.event_service_pb2 import AGGREGATION_MAX
from services.kernel.errors import MeshError
from services.metering.budgets.ports import MOST_MARKS
from tests.metering import budgets, events
from tests.metering.budgets import COST, CYCLE, DAY, MONTH, TOKENS, UNIT, ask, fired, looked_at, new_tenant, put, stands, use, wait_fired
from tests.metering.mesh import Mesh, bill, unknown
from tests.metering.peers import OPERATOR
from tests.metering.usage import fold
from tests.support.waiting import eventually


async def test_each_threshold_fires_once_as_use_rises(mesh: Mesh) -> None:
    """50, 80 and 100 by default; each in the moment it is reached, folded or not; whatever follows fires nothing again."""
    tenant = new_tenant(mesh)
    budget = await put(mesh, tenant)
    assert list(budget.thresholds_percent) == [50, 80, 100]
    await use(mesh, tenant, 499)
    await looked_at(mesh, tenant)
    assert await fired(mesh, tenant) == []
    await use(mesh, tenant, 1)
    await wait_fired(mesh, tenant, [50])
    await fold(mesh)
    await use(mesh, tenant, 500)
    await wait_fired(mesh, tenant, [50, 80, 100])
    await use(mesh, tenant, 5_000)
    await looked_at(mesh, tenant)
    assert await fired(mesh, tenant) == [50, 80, 100]
    standing = await stands(mesh, tenant)
    assert (standing.used, standing.remaining, standing.overage, list(standing.fired_percent)) == (6_000, 0, 5_000, [50, 80, 100])


async def test_what_a_budget_counts_is_what_it_names(mesh: Mesh) -> None:
    """A user's, a feature's, one user's within one feature, the tenant's; cost as the ledger has it, tokens of every class."""
    tenant = new_tenant(mesh)
    await put(mesh, tenant, "all", measure=TOKENS, period=MONTH)
    await put(mesh, tenant, "cost", measure=COST, period=CYCLE)
    await put(mesh, tenant, "ada", user="ada")
    await put(mesh, tenant, "ben", user="ben")
    await put(mesh, tenant, "chat", feature="chat")
    await put(mesh, tenant, "ada_in_chat", user="ada", feature="chat")
    for tokens, user, feature in ((100, "ada", "chat"), (10, "ada", "hiring"), (7, "ben", "chat"), (3, "", "")):
        await use(mesh, tenant, tokens, user=user, feature=feature)
    found = {name: (await stands(mesh, tenant, name)).used for name in ("all", "ada", "ben", "chat", "ada_in_chat")}
    assert found == {"all": 120, "ada": 110, "ben": 7, "chat": 107, "ada_in_chat": 100}
    assert (await stands(mesh, tenant, "cost")).used == await mesh.admin.fetchval(
        "SELECT sum(cost_nano_usd)::bigint FROM metering.entries WHERE tenant_id = $1", tenant.id
    )
    await budgets.wait_fired(mesh, tenant, [50, 80, 100], "cost")
    assert await fired(mesh, tenant, "ada") == []


async def test_units_are_those_of_the_limits_and_of_events(mesh: Mesh) -> None:
    """Both ways of recording a unit add up, each event once; a reversal takes its event back; another unit counts nothing."""
    tenant = new_tenant(mesh)
    await put(mesh, tenant, amount=10, measure=UNIT, product_unit="budgeted_unit")
    await events.register(mesh, "used", product="budgeting", unit="budgeted_unit")
    await mesh.record(mesh.use(tenant, product_unit="budgeted_unit", quantity=2), mesh.use(tenant, product_unit="another_unit", quantity=9))
    await looked_at(mesh, tenant)
    assert await fired(mesh, tenant) == []
    one = events.event(product="budgeting", type="used", quantity=3)
    await events.record(mesh, tenant, [one])
    await wait_fired(mesh, tenant, [50])
    assert (await stands(mesh, tenant)).used == 5
    await fold(mesh)
    assert (await stands(mesh, tenant)).used == 5
    await events.reverse(mesh, tenant, one)
    await looked_at(mesh, tenant)
    assert (await stands(mesh, tenant)).used == 2
    # What was corrected takes nothing back, and what crosses the threshold again fires nothing.
    assert await fired(mesh, tenant) == [50]
    await events.record(mesh, tenant, [events.event(product="budgeting", type="used", quantity=4)])
    await looked_at(mesh, tenant)
    assert (await stands(mesh, tenant)).used == 6
    assert await fired(mesh, tenant) == [50]


async def test_of_levels_the_highest_of_the_period_counts(mesh: Mesh) -> None:
    """As usage has it: a lower one adds nothing, one that is taken back counts no more, and a user has the highest of its own."""
    tenant = new_tenant(mesh)
    await events.register(mesh, "level", product="budgeting", unit="budgeted_level", aggregation=AGGREGATION_MAX)
    await put(mesh, tenant, amount=10, measure=UNIT, product_unit="budgeted_level")
    await put(mesh, tenant, "ada", amount=10, measure=UNIT, product_unit="budgeted_level", user="ada")
    high = events.event(product="budgeting", type="level", quantity=9, subject="ben")
    await events.record(mesh, tenant, [high, events.event(product="budgeting", type="level", quantity=6, subject="ada")])
    await wait_fired(mesh, tenant, [50, 80])
    await wait_fired(mesh, tenant, [50], "ada")
    await fold(mesh)
    assert [(await stands(mesh, tenant, name)).used for name in ("budget", "ada")] == [9, 6]
    await events.reverse(mesh, tenant, high)
    assert (await stands(mesh, tenant)).used == 6


MARKED = "SELECT use_quarter FROM metering.budget_marks WHERE tenant_id = $1"


async def test_only_what_a_budget_counts_is_marked(mesh: Mesh) -> None:
    """An event is marked by the quarter of an hour it happened in and by no other; what the limits refused, not at all."""
    tenant = new_tenant(mesh)
    await events.register(mesh, "used", product="budgeting", unit="budgeted_unit")
    async with mesh.admin.acquire() as looker, looker.transaction():
        # As whoever looks at marks does: they stay where they are meanwhile.
        await eventually(lambda: looker.fetchval("SELECT pg_try_advisory_xact_lock(7405, 1)"), within_seconds=budgets.WAIT_SECONDS)
        await put(mesh, tenant, "units", amount=10, measure=UNIT, product_unit="budgeted_unit")
        await put(mesh, tenant, "cost", amount=10, measure=COST)
        await mesh.admin.execute("DELETE FROM metering.budget_marks WHERE tenant_id = $1", tenant.id)
        last_quarter = datetime.now(UTC).replace(minute=52, second=0, microsecond=0) - timedelta(hours=1)
        await events.record(mesh, tenant, [events.event(product="budgeting", type="used", quantity=1, time=last_quarter)])
        await mesh.refuse(mesh.refusals(tenant))
        found = [row["use_quarter"] for row in await mesh.admin.fetch(MARKED, tenant.id)]
    assert found == [last_quarter.replace(minute=45)]


# Nine million events more, as the log or the sums would hold them.
ENDLESS = (
    "UPDATE metering.usage_pending SET quantity = 20000000000000000000 WHERE tenant_id = $1",
    "UPDATE metering.usage_rollups SET quantity = 20000000000000000000 WHERE tenant_id = $1",
)


async def test_units_beyond_an_integer_fire_and_are_told_as_the_largest(mesh: Mesh) -> None:
    """Quantities are what a tenant says they are: a sum that no integer holds ends nobody's looks, and nobody's answer."""
    tenant = new_tenant(mesh)
    await put(mesh, tenant, amount=10**13, measure=UNIT, product_unit="endless_unit", period=MONTH)
    await put(mesh, tenant, "ben", amount=10**13, measure=UNIT, product_unit="endless_unit", period=MONTH, user="ben")
    await put(mesh, tenant, "cost", amount=10**13, measure=COST, period=MONTH)
    await events.register(mesh, "used", product="endless", unit="endless_unit")
    used = [events.event(product="endless", type="used", quantity=1, subject="ada") for _ in range(2)]
    await events.record(mesh, tenant, used[:1])
    try:
        for sql in ENDLESS:
            await mesh.admin.execute(sql, tenant.id)
        await events.record(mesh, tenant, used[1:])
        await wait_fired(mesh, tenant, [50, 80, 100])
        # One for each looks at everybody as soon as it is put.
        await put(mesh, tenant, "each", amount=10**13, measure=UNIT, product_unit="endless_unit", period=MONTH, each_user=True)
        await wait_fired(mesh, tenant, [50, 80, 100], "each")
        standing = await stands(mesh, tenant)
        assert {standing.used, standing.forecast_by_period, standing.forecast_by_week} == {2**63 - 1}
        assert [(await stands(mesh, tenant, name)).used for name in ("ben", "cost")] == [0, 0]
    finally:
        # Other tests ask about all tenants.
        await fold(mesh)
        await mesh.admin.execute("DELETE FROM metering.usage_rollups WHERE tenant_id = $1", tenant.id)


async def test_late_use_fires_in_its_own_period(mesh: Mesh) -> None:
    """A call of yesterday that is settled today fires yesterday's threshold, once, and leaves today's budget alone."""
    tenant = new_tenant(mesh)
    await put(mesh, tenant, amount=100, thresholds_percent=[100, 200])
    yesterday = datetime.now(UTC) - timedelta(days=1)
    await use(mesh, tenant, 150, time=yesterday)
    await wait_fired(mesh, tenant, [100])
    [alert] = await budgets.alerts(mesh, tenant)
    assert alert.period_start.ToDatetime(tzinfo=UTC) <= yesterday < alert.period_end.ToDatetime(tzinfo=UTC)
    assert (await stands(mesh, tenant)).used == 0
    # Left unresolved and settled after all, and settled again.
    call = await mesh.opened(tenant, bound_tokens=1_000, reserve_time=yesterday)
    await mesh.void(unknown(call.ref))
    await mesh.settle(bill(call.ref, input_tokens=60, output_tokens=0))
    await wait_fired(mesh, tenant, [100, 200])
    await mesh.settle(bill(call.ref, input_tokens=60, output_tokens=0))
    await looked_at(mesh, tenant)
    assert await fired(mesh, tenant) == [100, 200]


async def test_a_day_is_one_of_the_tenants_time_zone(mesh: Mesh) -> None:
    """What was used before midnight in the tenant's zone is not of today, whatever day it is in UTC; the keeper agrees with the answer."""
    tenant = new_tenant(mesh)
    zone = ZoneInfo("Pacific/Kiritimati")
    anchor = datetime(2026, 1, 17, 12, tzinfo=UTC)
    rules = rules_pb.LimitRules(time_zone=zone.key)
    rules.cycle_anchor_time.FromDatetime(anchor)
    mesh.peers.configs.rules[str(tenant.id)] = rules
    await put(mesh, tenant, amount=10)
    await put(mesh, tenant, "cycle", amount=10_000, period=CYCLE)
    midnight = datetime.now(zone).replace(hour=0, minute=0, second=0, microsecond=0)
    await use(mesh, tenant, 10, time=midnight - timedelta(milliseconds=1))
    await wait_fired(mesh, tenant, [50, 80, 100])
    assert (await stands(mesh, tenant)).used == 0
    await use(mesh, tenant, 5, time=midnight)
    await wait_fired(mesh, tenant, [50, 50, 80, 100])
    standing = await stands(mesh, tenant)
    assert (standing.used, standing.period_start.ToDatetime(tzinfo=UTC)) == (5, midnight)
    assert (await stands(mesh, tenant, "cycle")).period_start.ToDatetime(tzinfo=UTC).astimezone(zone).day == 18


async def test_a_budget_looks_back_and_a_changed_one_begins_anew(mesh: Mesh) -> None:
    """What was used before it was put fires at once. Another amount is another budget; other thresholds alone go on where they were."""
    tenant = new_tenant(mesh)
    await use(mesh, tenant, 900)
    first = await put(mesh, tenant)
    await wait_fired(mesh, tenant, [50, 80])
    again = await put(mesh, tenant)
    assert again == first
    more = await put(mesh, tenant, thresholds_percent=[90, 50])
    assert more.budget_id == first.budget_id
    assert list(more.thresholds_percent) == [50, 90]
    await wait_fired(mesh, tenant, [50, 80, 90])
    larger = await put(mesh, tenant, amount=1_500, action=pb.BUDGET_ACTION_OVERAGE, thresholds_percent=[50, 90])
    assert larger.budget_id != first.budget_id
    assert list(larger.thresholds_percent) == [50, 90, 100]
    await wait_fired(mesh, tenant, [50, 50, 80, 90])
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            await ask(mesh, tenant, "DeleteBudget", pb.DeleteBudgetRequest(name="budget"))
    told = [line["budget_id"] for line in logs if line["event"] == "budget_deleted"]
    assert told == [larger.budget_id], "which one, and once"
    assert not (await ask(mesh, tenant, "ListBudgets", pb.ListBudgetsRequest())).budgets
    assert await fired(mesh, tenant) == [50, 50, 80, 90]
    with pytest.raises(MeshError) as refused:
        await stands(mesh, tenant)
    assert refused.value.code is grpc.StatusCode.NOT_FOUND


async def test_forecasts_are_integers_of_what_is_known(mesh: Mesh) -> None:
    """By the period so far and by the last seven days, each as its formula says, to the last unit."""
    tenant = new_tenant(mesh)
    await put(mesh, tenant, amount=10**9, period=MONTH)
    await use(mesh, tenant, 7_000)
    before = datetime.now(UTC)
    standing = await stands(mesh, tenant)
    after = datetime.now(UTC)
    start, end = standing.period_start.ToDatetime(tzinfo=UTC), standing.period_end.ToDatetime(tzinfo=UTC)
    assert standing.used == 7_000
    if standing.HasField("forecast_by_period"):
        assert 7_000 * (end - start) / (after - start) - 1 <= standing.forecast_by_period <= 7_000 * (end - start) / (before - start) + 1
    week = timedelta(days=7)
    assert 7_000 + 7_000 * (end - after) / week - 1 <= standing.forecast_by_week <= 7_000 + 7_000 * (end - before) / week + 1


async def test_a_block_needs_a_rule_that_refuses_the_same(mesh: Mesh) -> None:
    """Without one the refusal says which rule to put; with it the budget is kept and tells that it blocks, until the rule is gone."""
    tenant = new_tenant(mesh)
    wish = {"amount": 5_000, "measure": COST, "period": MONTH, "user": "ada", "action": pb.BUDGET_ACTION_BLOCK}
    with pytest.raises(MeshError) as refused:
        await put(mesh, tenant, "ada", **wish)
    assert (refused.value.reason, dict(refused.value.metadata)) == (
        reasons.ERROR_REASON_WRONG_STATE,
        {"resource": "limit_rule", "state": "MISSING"},
    )
    assert '"name": "budget_ada", "unit": "LIMIT_UNIT_COST_NANO_USD", "window": "LIMIT_WINDOW_MONTH"' in refused.value.message
    rule = rules_pb.LimitRule(
        name="budget_ada",
        unit=rules_pb.LIMIT_UNIT_COST_NANO_USD,
        window=rules_pb.LIMIT_WINDOW_MONTH,
        scope=rules_pb.LIMIT_SCOPE_USER,
        user="ada",
        limit=5_000,
    )
    for wrong in ({"limit": 5_001}, {"user": "ben"}, {"mode": rules_pb.LIMIT_MODE_SHADOW}, {"window": rules_pb.LIMIT_WINDOW_DAY}):
        other = rules_pb.LimitRule()
        other.CopyFrom(rule)
        other.MergeFrom(rules_pb.LimitRule(**wrong))  # type: ignore[arg-type] # the enum's numbers
        mesh.peers.configs.rules[str(tenant.id)] = rules_pb.LimitRules(rules=[other])
        with pytest.raises(MeshError):
            await put(mesh, tenant, "ada", **wish)
    mesh.peers.configs.rules[str(tenant.id)] = rules_pb.LimitRules(rules=[rule])
    assert list((await put(mesh, tenant, "ada", **wish, thresholds_percent=[10])).thresholds_percent) == [10, 100]


async def test_budgets_are_bounded_and_refusals_explain_themselves(mesh: Mesh) -> None:
    """A hundred a tenant; parts that make no sense together are named."""
    tenant = new_tenant(mesh)
    for number in range(100):
        await put(mesh, tenant, f"budget_{number}")
    with pytest.raises(MeshError) as refused:
        await put(mesh, tenant, "one_more")
    assert (refused.value.reason, refused.value.metadata["rule"]) == (reasons.ERROR_REASON_PLAN_LIMIT, "budgets")
    await put(mesh, tenant, "budget_7", amount=7)
    for parts in (
        {"measure": UNIT},
        {"product_unit": "ai_interviews"},
        {"amount": 0},
        {"thresholds_percent": [0]},
        {"thresholds_percent": [1_001]},
        {"period": 0},
        {"user": "a\x00b"},
    ):
        with pytest.raises(MeshError) as refused:
            await put(mesh, new_tenant(mesh), **({"amount": 1} | parts))
        assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT, parts


async def test_admins_put_and_readers_read(mesh: Mesh) -> None:
    """Without the admin's scope nothing is changed; reading takes the scope of usage; an operator acts for the tenant with a reason."""
    tenant, reader = new_tenant(mesh), ""
    reader = f"key-{tenant.id}"
    budget = pb.Budget(name="b", amount=1, measure=TOKENS, period=DAY)
    for method, request in (("PutBudget", pb.PutBudgetRequest(budget=budget)), ("DeleteBudget", pb.DeleteBudgetRequest(name="b"))):
        with pytest.raises(MeshError) as refused:
            await ask(mesh, tenant, method, request, credential=reader)
        assert refused.value.metadata["scope"] == "tenant:admin"
    await ask(mesh, tenant, "PutBudget", pb.PutBudgetRequest(budget=budget), credential=OPERATOR)
    listed = await ask(mesh, tenant, "ListBudgets", pb.ListBudgetsRequest(), credential=reader)
    assert [each.name for each in listed.budgets] == ["b"]
    assert not (await ask(mesh, new_tenant(mesh), "ListBudgets", pb.ListBudgetsRequest())).budgets


async def test_alerts_page_newest_first(mesh: Mesh) -> None:
    """A page goes on where the one before ended; another tenant's token is refused."""
    tenant = new_tenant(mesh)
    await put(mesh, tenant, thresholds_percent=[10, 20, 30])
    await use(mesh, tenant, 1_000)
    await wait_fired(mesh, tenant, [10, 20, 30])
    first = await ask(mesh, tenant, "ListAlerts", pb.ListAlertsRequest(page_size=2))
    second = await ask(mesh, tenant, "ListAlerts", pb.ListAlertsRequest(page_size=2, page_token=first.next_page_token))
    found = [*first.alerts, *second.alerts]
    assert (len(first.alerts), len(second.alerts), second.next_page_token) == (2, 1, "")
    assert len({alert.alert_id for alert in found}) == 3
    with pytest.raises(MeshError) as refused:
        await ask(mesh, new_tenant(mesh), "ListAlerts", pb.ListAlertsRequest(page_token=first.next_page_token))
    assert refused.value.metadata["field"] == "page_token"


MARK = """
INSERT INTO metering.budget_marks (tenant_id, use_quarter, product_unit) SELECT $1, '2026-11-01', '' FROM generate_series(1, $2::integer)
"""


async def test_a_tenant_that_cannot_be_looked_at_keeps_nobody_from_it(mesh: Mesh) -> None:
    """More marks than are taken at once, of tenants whose calendar is not known: another's thresholds fire, and theirs once it is."""
    stuck, tenant = new_tenant(mesh), new_tenant(mesh)
    assert stuck.id < tenant.id
    mesh.peers.tenants.unknown_plans.add(stuck.id)
    await put(mesh, stuck, amount=100, thresholds_percent=[100])
    await use(mesh, stuck, 100)
    await mesh.admin.execute(MARK, stuck.id, MOST_MARKS + 1)
    await put(mesh, tenant, amount=100, thresholds_percent=[100])
    await use(mesh, tenant, 100)
    await wait_fired(mesh, tenant, [100])
    assert await fired(mesh, stuck) == []
    mesh.peers.tenants.unknown_plans.remove(stuck.id)
    await wait_fired(mesh, stuck, [100])


SETTLE_BY_HAND = """
UPDATE metering.calls SET state = 2, settled_epoch = 0, entry_id = gen_random_uuid(), cost_nano_usd = 0, end_time = clock_timestamp(),
    input_tokens = 100, output_tokens = 0, cache_read_tokens = 0, cache_write_5m_tokens = 0, cache_write_1h_tokens = 0
WHERE tenant_id = $1
"""
WAITS = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


async def test_a_settlement_beside_a_new_budget_is_never_overlooked(mesh: Mesh) -> None:
    """Usage that was written before a budget was there and is committed after it was asked for: the budget waits, and then counts it."""
    tenant = new_tenant(mesh)
    await mesh.opened(tenant)
    async with mesh.admin.acquire() as writer, asyncio.TaskGroup() as group, writer.transaction():
        # As whoever records usage does: the tenant's lock, shared, and then the rows.
        await writer.execute("SELECT pg_advisory_xact_lock_shared(metering.tenant_lock($1))", tenant.id)
        await writer.execute(SETTLE_BY_HAND, tenant.id)
        putting = group.create_task(put(mesh, tenant, amount=100, thresholds_percent=[100]))

        async def waits_or_is_looked_at() -> bool:
            if not putting.done():
                return await mesh.admin.fetchval(WAITS) > 0
            await looked_at(mesh, tenant)
            return True

        await eventually(waits_or_is_looked_at, within_seconds=budgets.WAIT_SECONDS)
    await wait_fired(mesh, tenant, [100])
    assert UUID((await budgets.alerts(mesh, tenant))[0].alert_id).version == 7
