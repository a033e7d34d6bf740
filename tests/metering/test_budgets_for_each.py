"""Budgets for each user and each feature: one definition, each name's use by itself, and only who used something is looked at."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import grpc
import pytest

from mesh.common.v1 import limit_rule_pb2 as rules_pb
from mesh.metering.v1 import budget_service_pb2 as pb
from mesh.metering.v1.event_service_pb2 import AGGREGATION_COUNT
from services.kernel.errors import MeshError
from services.kernel.ids import TenantId
from services.metering.adapters.postgres_budgets import PostgresBudgets
from services.metering.adapters.postgres_usage_queries import PostgresUsageQueries
from services.metering.adapters.usage_statements import PLAN_ONCE, UsageStatement
from services.metering.budgets import spending
from services.metering.budgets.look import BudgetLook
from services.metering.budgets.ports import Change, Marked
from services.metering.budgets.spending import UsageSpending
from services.metering.usage_calendar import TenantCalendar
from services.metering.usage_query import Dimension, UsageFilter, UsageQuery
from tests.metering import events
from tests.metering.budgets import DAY, MONTH, UNIT, alerts, looked_at, new_tenant, put, stands, use
from tests.metering.mesh import Mesh, Tenant
from tests.metering.usage import fold


async def fired_of(mesh: Mesh, tenant: Tenant) -> list[tuple[str, str, int]]:
    """Whose thresholds fired: user, feature, percent."""
    return sorted((alert.user, alert.feature, alert.threshold_percent) for alert in await alerts(mesh, tenant))


async def test_each_users_thresholds_fire_by_themselves_and_once(mesh: Mesh) -> None:
    """One definition; another's use reaches nobody's threshold, folded or not, and use that names no user counts for none."""
    tenant = new_tenant(mesh)
    budget = await put(mesh, tenant, amount=100, each_user=True, thresholds_percent=[50, 100])
    assert budget.each_user and not budget.user
    for tokens, user in ((60, "ada"), (49, "ben"), (500, "")):
        await use(mesh, tenant, tokens, user=user)
    await looked_at(mesh, tenant)
    assert await fired_of(mesh, tenant) == [("ada", "", 50)]
    await fold(mesh)
    await use(mesh, tenant, 60, user="ben", feature="hiring")
    await use(mesh, tenant, 1, user="ada")
    await looked_at(mesh, tenant)
    assert await fired_of(mesh, tenant) == [("ada", "", 50), ("ben", "", 50), ("ben", "", 100)]
    standing = await stands(mesh, tenant, user="ben")
    assert (standing.user, standing.used, standing.overage, list(standing.fired_percent)) == ("ben", 109, 9, [50, 100])
    assert list((await stands(mesh, tenant, user="ada")).fired_percent) == [50]
    nobody = await stands(mesh, tenant, user="eve")
    assert (nobody.used, list(nobody.fired_percent)) == (0, [])


async def test_each_feature_and_both(mesh: Mesh) -> None:
    """Each feature's, each user's within one feature, and each user's within each; alerts say whose."""
    tenant = new_tenant(mesh)
    await put(mesh, tenant, "features", amount=100, each_feature=True, thresholds_percent=[100])
    await put(mesh, tenant, "chatters", amount=100, each_user=True, feature="chat", thresholds_percent=[100])
    await put(mesh, tenant, "pairs", amount=100, each_user=True, each_feature=True, thresholds_percent=[100])
    for tokens, user, feature in ((70, "ada", "chat"), (40, "ben", "chat"), (120, "ada", "hiring"), (999, "", "")):
        await use(mesh, tenant, tokens, user=user, feature=feature)
    await looked_at(mesh, tenant)
    told = sorted((alert.budget_name, alert.user, alert.feature, alert.used) for alert in await alerts(mesh, tenant))
    assert told == [("features", "", "chat", 110), ("features", "", "hiring", 120), ("pairs", "ada", "hiring", 120)]
    await use(mesh, tenant, 30, user="ada", feature="chat")
    await looked_at(mesh, tenant)
    later = {(alert.budget_name, alert.user, alert.feature, alert.used) for alert in await alerts(mesh, tenant)} - set(told)
    assert later == {("chatters", "ada", "chat", 100), ("pairs", "ada", "chat", 100)}
    standing = await stands(mesh, tenant, "pairs", user="ada", feature="chat")
    assert (standing.user, standing.feature, standing.used) == ("ada", "chat", 100)


async def test_a_budget_for_each_looks_back_at_everybody(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was used before it was put counts, in as many parts as there are; afterwards only who used something is looked at."""
    monkeypatch.setattr(spending, "_PART", 2)
    tenant = new_tenant(mesh)
    for number in range(7):
        await use(mesh, tenant, 100 + number, user=f"user-{number}")
    await use(mesh, tenant, 99, user="little")
    await put(mesh, tenant, amount=100, each_user=True, thresholds_percent=[100])
    await looked_at(mesh, tenant)
    assert await fired_of(mesh, tenant) == [(f"user-{number}", "", 100) for number in range(7)]


async def test_units_and_late_use_count_for_whom_they_name(mesh: Mesh) -> None:
    """Events mark their user; what comes late fires in its own period, of its own user."""
    tenant, name = new_tenant(mesh), "each.counted"
    await events.register(mesh, name, unit="each_counted", aggregation=AGGREGATION_COUNT)
    await put(mesh, tenant, "counted", amount=2, measure=UNIT, product_unit="each_counted", period=MONTH, each_user=True)
    await put(mesh, tenant, "days", amount=10, each_user=True, period=DAY, thresholds_percent=[100])
    subjects = ("ada", "ada", "ben")
    await events.record(mesh, tenant, [events.event(type=name, subject=subject) for subject in subjects])
    yesterday = datetime.now(UTC) - timedelta(days=1)
    await use(mesh, tenant, 10, user="ben", time=yesterday)
    await looked_at(mesh, tenant)
    told = sorted((alert.budget_name, alert.user, alert.threshold_percent) for alert in await alerts(mesh, tenant))
    assert told == [("counted", "ada", 50), ("counted", "ada", 80), ("counted", "ada", 100), ("counted", "ben", 50), ("days", "ben", 100)]
    (late,) = [alert for alert in await alerts(mesh, tenant) if alert.budget_name == "days"]
    assert late.period_start.ToDatetime(UTC) <= yesterday < late.period_end.ToDatetime(UTC)


class _Counting(PostgresUsageQueries):
    """Remembers whom it was asked about."""

    asked: list[UsageQuery]

    async def of_tenant(self, tenant_id: TenantId, query: UsageQuery, *rest: object, **cut: bool):  # type: ignore[no-untyped-def,override] # as the port's
        self.asked.append(query)
        return await super().of_tenant(tenant_id, query, *rest, **cut)  # type: ignore[arg-type] # as the port's


async def test_only_who_used_something_since_is_looked_at(mesh: Mesh) -> None:
    """Of many users a look asks for those with new use alone, and not for those whose thresholds all fired."""
    tenant = new_tenant(mesh)
    await put(mesh, tenant, amount=100, each_user=True, thresholds_percent=[100])
    for number in range(5):
        await use(mesh, tenant, 10, user=f"user-{number}")
    await use(mesh, tenant, 100, user="spent")
    await looked_at(mesh, tenant)
    queries = _Counting(mesh.app.database, mesh.app.database, mesh.app.jobs)
    queries.asked = []
    look = BudgetLook(PostgresBudgets(mesh.app.database), UsageSpending(queries), _Always())
    now = datetime.now(UTC)
    marked = Marked(TenantId(tenant.id), {Change(now, "", user, "") for user in ("user-3", "spent", "")})
    await look.fire(marked)
    assert [list(query.filter.users) for query in queries.asked] == [["user-3"]]


class _Always:
    """Every tenant counts by UTC."""

    async def of_tenant(self, tenant_id: TenantId) -> TenantCalendar:
        return TenantCalendar("", UTC, 1)


async def test_a_block_of_each_user_needs_a_rule_of_each_user(mesh: Mesh) -> None:
    """The rule that is offered counts each user by itself; with it the budget is kept."""
    tenant = new_tenant(mesh)
    wanted = {"amount": 100, "each_user": True, "action": pb.BUDGET_ACTION_BLOCK}
    with pytest.raises(MeshError) as refused:
        await put(mesh, tenant, **wanted)
    offered = refused.value.message.partition("again: ")[2]
    assert '"scope": "LIMIT_SCOPE_USER"' in offered and '"user"' not in offered
    rule = rules_pb.LimitRule(
        name="each", unit=rules_pb.LIMIT_UNIT_TOKENS, window=rules_pb.LIMIT_WINDOW_DAY, scope=rules_pb.LIMIT_SCOPE_USER, limit=100
    )
    # What a version of the configuration says is remembered: another tenant has the rule from the beginning.
    tenant = new_tenant(mesh)
    mesh.peers.configs.rules[str(tenant.id)] = rules_pb.LimitRules(rules=[rule])
    assert (await put(mesh, tenant, **wanted)).action == pb.BUDGET_ACTION_BLOCK
    assert (await stands(mesh, tenant, user="ada")).blocks


async def test_names_are_given_where_the_budget_is_for_each(mesh: Mesh) -> None:
    """One user and all users make no sense together; whose use is asked about is said where it has to be, and there alone."""
    tenant = new_tenant(mesh)
    for parts in ({"each_user": True, "user": "ada"}, {"each_feature": True, "feature": "chat"}):
        with pytest.raises(MeshError) as refused:
            await put(mesh, tenant, **parts)
        assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    await put(mesh, tenant, "each", each_user=True)
    await put(mesh, tenant, "one", user="ada")
    for name, names in (("each", {}), ("each", {"user": "ada", "feature": "chat"}), ("one", {"user": "ada"})):
        with pytest.raises(MeshError, match="INVALID_REQUEST"):
            await stands(mesh, tenant, name, **names)
    assert (await stands(mesh, tenant, "one")).user == "ada"


PLANT = """
INSERT INTO metering.usage_rollups
SELECT (jsonb_populate_record(u, jsonb_build_object('user_name', 'other-' || n, 'series', gen_random_uuid()))).*
FROM metering.usage_rollups u CROSS JOIN generate_series(1, 3000) n
WHERE u.tenant_id = $1 AND u.grain = 3 AND u.user_name = 'ada'
"""


async def test_a_users_sums_are_found_by_name(mesh: Mesh) -> None:
    """Of thousands of users no other's sums are read for a look at one."""
    tenant = new_tenant(mesh)
    await use(mesh, tenant, 10, user="ada")
    await fold(mesh)
    await mesh.admin.execute(PLANT, tenant.id)
    await mesh.admin.execute("ANALYZE metering.usage_rollups")
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    asked = UsageQuery(
        today - timedelta(days=30),
        today + timedelta(days=1),
        group_by=frozenset({Dimension.USER}),
        filter=UsageFilter(users=["ada"], product_units=[""]),
    )
    statement = UsageStatement([tenant.id], asked, None, 10)
    async with mesh.admin.acquire() as connection, connection.transaction():
        for setting in PLAN_ONCE.split("; "):
            await connection.execute(setting)
        (told,) = await connection.fetchrow(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement.text}", *statement.arguments)
    read = [
        (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
        for node in nodes(json.loads(told)[0]["Plan"])
        if node.get("Relation Name") == "usage_rollups"
    ]
    assert 1 <= sum(read) <= 10, read


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every step of a plan."""
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


FIRE_AS_BEFORE = """
SELECT metering.fire_budgets($1, ARRAY[$2::uuid], ARRAY[date_trunc('day', now(), 'UTC')],
    ARRAY[date_trunc('day', now(), 'UTC') + interval '1 day'], ARRAY[100], ARRAY[1000::bigint], ARRAY[gen_random_uuid()])
"""


async def test_replicas_of_the_release_before_fire_what_they_know(mesh: Mesh) -> None:
    """A budget of one name fires once through either function; of one for each the older knows nothing."""
    tenant = new_tenant(mesh)
    one = await put(mesh, tenant, "one", user="ada", thresholds_percent=[100])
    each = await put(mesh, tenant, "each", each_user=True, thresholds_percent=[100])
    told = [await mesh.app.database.fetch_value(TenantId(tenant.id), FIRE_AS_BEFORE, tenant.id, UUID(one.budget_id)) for _ in range(2)]
    assert told == [1, 0]
    assert await mesh.app.database.fetch_value(TenantId(tenant.id), FIRE_AS_BEFORE, tenant.id, UUID(each.budget_id)) == 0
    await use(mesh, tenant, 1_000, user="ada")
    await looked_at(mesh, tenant)
    assert sorted(alert.budget_name for alert in await alerts(mesh, tenant)) == ["each", "one"]
