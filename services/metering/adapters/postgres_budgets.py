"""Budgets and alerts in Postgres, as the service role, each in a transaction of its tenant."""

from collections.abc import Collection, Sequence
from datetime import UTC
from uuid import UUID

import asyncpg

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import LimitExceeded, NotFound
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.tenant_database import Connection, TenantDatabase
from services.metering.adapters.postgres_ledger import run_again
from services.metering.budgets.budget import (
    MAX_BUDGETS,
    Budget,
    BudgetAction,
    BudgetAlert,
    BudgetMeasure,
    BudgetPeriod,
    BudgetTerms,
    BudgetWish,
    Span,
)
from services.metering.budgets.ports import AlertPosition, Crossing, Watched

# Exclusive: whoever records usage either committed before, or sees the budget and marks it.
LOCK_TENANT = "SELECT pg_advisory_xact_lock(metering.tenant_lock($1))"
SELECT_ERASED = "SELECT 1 FROM metering.erased_tenants WHERE tenant_id = $1"
_BUDGET = """
SELECT name, budget_id, measure, product_unit, user_name, feature, amount, period, action, thresholds, update_time, each_user, each_feature
FROM metering.budgets
"""
SELECT_BUDGETS = _BUDGET + "WHERE tenant_id = $1 ORDER BY name"
UPSERT_BUDGET = """
INSERT INTO metering.budgets (
    tenant_id, name, budget_id, measure, product_unit, user_name, feature, amount, period, action, thresholds, each_user,
    each_feature, update_time)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, clock_timestamp())
ON CONFLICT (tenant_id, name) DO UPDATE SET
    budget_id = EXCLUDED.budget_id, measure = EXCLUDED.measure, product_unit = EXCLUDED.product_unit, user_name = EXCLUDED.user_name,
    feature = EXCLUDED.feature, amount = EXCLUDED.amount, period = EXCLUDED.period, action = EXCLUDED.action,
    thresholds = EXCLUDED.thresholds, each_user = EXCLUDED.each_user, each_feature = EXCLUDED.each_feature,
    update_time = EXCLUDED.update_time
RETURNING name, budget_id, measure, product_unit, user_name, feature, amount, period, action, thresholds, update_time, each_user,
    each_feature
"""
# What was used before the budget was there counts too, whoever used it.
MARK_NOW = """
INSERT INTO metering.budget_marks (tenant_id, use_quarter, product_unit)
VALUES ($1, date_bin('15 minutes', clock_timestamp(), timestamptz 'epoch'), $2)
"""
DELETE_BUDGET = "DELETE FROM metering.budgets WHERE tenant_id = $1 AND name = $2"
_ALERT = """
SELECT alert_id, budget_id, coalesce(metadata ->> 'budget', '') AS name, threshold, measure, product_unit, user_name, feature, amount,
       action, period_start, period_end, used, fire_time
FROM metering.budget_alerts
"""
SELECT_FIRST_ALERTS = _ALERT + "WHERE tenant_id = $1 ORDER BY fire_time DESC, alert_id DESC LIMIT $2"
SELECT_NEXT_ALERTS = _ALERT + "WHERE tenant_id = $1 AND (fire_time, alert_id) < ($3, $4) ORDER BY fire_time DESC, alert_id DESC LIMIT $2"
SELECT_FIRED = """
SELECT a.budget_id, a.period_start, a.user_name, a.feature, a.threshold
FROM unnest($2::uuid[], $3::timestamptz[], $4::text[], $5::text[]) AS w (budget_id, period_start, user_name, feature)
JOIN metering.budget_alerts a ON a.tenant_id = $1 AND a.budget_id = w.budget_id AND a.period_start = w.period_start
    AND a.user_name = w.user_name AND a.feature = w.feature AND a.metadata IS NOT NULL
"""
FIRE = """
SELECT metering.fire_budgets($1, $2::uuid[], $3::timestamptz[], $4::timestamptz[], $5::text[], $6::text[], $7::integer[], $8::bigint[],
    $9::uuid[])
"""


class PostgresBudgets:
    """Implements BudgetStore."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def put(self, tenant_id: TenantId, wish: BudgetWish) -> Budget:
        """Keeps the budget under its name, and marks it to be looked at. Raises: LimitExceeded for one too many, NotFound once erased."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            if await connection.fetchval(SELECT_ERASED, tenant_id):
                raise NotFound("tenant")
            kept = {budget.wish.name: budget for budget in map(_budget, await connection.fetch(SELECT_BUDGETS, tenant_id))}
            before = kept.get(wish.name)
            if before is not None and before.wish == wish:
                return before
            if before is None and len(kept) >= MAX_BUDGETS:
                raise _too_many()
            return await self._write(connection, tenant_id, wish, before)

    async def _write(self, connection: Connection, tenant_id: TenantId, wish: BudgetWish, before: Budget | None) -> Budget:
        terms = wish.terms
        goes_on = before is not None and before.terms == terms
        row = await connection.fetchrow(
            UPSERT_BUDGET,
            tenant_id,
            wish.name,
            before.budget_id if before is not None and goes_on else new_uuid7(),
            int(terms.measure),
            terms.product_unit,
            terms.user,
            terms.feature,
            terms.amount,
            int(terms.period),
            int(wish.action),
            list(wish.thresholds),
            terms.each_user,
            terms.each_feature,
        )
        await connection.execute(MARK_NOW, tenant_id, terms.product_unit)
        return _budget(row)

    async def list_all(self, tenant_id: TenantId) -> Sequence[Budget]:
        """Returns all budgets by name."""
        async with self._database.transaction(tenant_id) as connection:
            return [_budget(row) for row in await connection.fetch(SELECT_BUDGETS, tenant_id)]

    async def delete(self, tenant_id: TenantId, name: str) -> None:
        """Removes a budget, if it is there."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(DELETE_BUDGET, tenant_id, name)

    async def alerts(self, tenant_id: TenantId, after: AlertPosition | None, size: int) -> Sequence[BudgetAlert]:
        """Returns up to `size` alerts, newest first, after the position."""
        async with self._database.transaction(tenant_id) as connection:
            if after is None:
                rows = await connection.fetch(SELECT_FIRST_ALERTS, tenant_id, size)
            else:
                rows = await connection.fetch(SELECT_NEXT_ALERTS, tenant_id, size, after.fire_time, after.alert_id)
        return [_alert(row) for row in rows]

    async def fired(self, tenant_id: TenantId, wanted: Collection[Watched]) -> set[tuple[Watched, int]]:
        """Returns which thresholds fired of these, in percent."""
        columns = (
            [watched.budget_id for watched in wanted],
            [watched.start for watched in wanted],
            [watched.user for watched in wanted],
            [watched.feature for watched in wanted],
        )
        async with self._database.transaction(tenant_id) as connection:
            rows = await connection.fetch(SELECT_FIRED, tenant_id, *columns)
        return {
            (Watched(UUID(int=row["budget_id"].int), row["period_start"], row["user_name"], row["feature"]), row["threshold"])
            for row in rows
        }

    async def fire(self, tenant_id: TenantId, crossings: Sequence[Crossing]) -> int:
        """Fires what has not fired, with its deliveries, in one transaction; returns how many did."""
        # In one order: two that fire the same wait for each other, never in a circle.
        ordered = sorted(crossings, key=lambda crossing: (crossing.watched, crossing.threshold))
        columns = (
            [crossing.watched.budget_id for crossing in ordered],
            [crossing.watched.start for crossing in ordered],
            [crossing.end for crossing in ordered],
            [crossing.watched.user for crossing in ordered],
            [crossing.watched.feature for crossing in ordered],
            [crossing.threshold for crossing in ordered],
            [crossing.used for crossing in ordered],
            [new_uuid7() for _ in ordered],
        )
        count: int = await run_again(lambda: self._database.fetch_value(tenant_id, FIRE, tenant_id, *columns))
        return count


def _too_many() -> LimitExceeded:
    return LimitExceeded(
        error_reason_pb2.ERROR_REASON_PLAN_LIMIT,
        f"a tenant has at most {MAX_BUDGETS} budgets; delete one first",
        rule="budgets",
        limit=str(MAX_BUDGETS),
        used=str(MAX_BUDGETS),
        remaining="0",
    )


def _budget(row: asyncpg.Record) -> Budget:
    terms = BudgetTerms(
        BudgetMeasure(row["measure"]),
        row["product_unit"],
        row["user_name"],
        row["feature"],
        row["amount"],
        BudgetPeriod(row["period"]),
        row["each_user"],
        row["each_feature"],
    )
    wish = BudgetWish(row["name"], terms, BudgetAction(row["action"]), tuple(row["thresholds"]))
    return Budget(UUID(int=row["budget_id"].int), wish, row["update_time"].astimezone(UTC))


def _alert(row: asyncpg.Record) -> BudgetAlert:
    return BudgetAlert(
        alert_id=UUID(int=row["alert_id"].int),
        budget_id=UUID(int=row["budget_id"].int),
        name=row["name"],
        threshold=row["threshold"],
        measure=BudgetMeasure(row["measure"]),
        product_unit=row["product_unit"],
        user=row["user_name"],
        feature=row["feature"],
        amount=row["amount"],
        action=BudgetAction(row["action"]),
        span=Span(row["period_start"], row["period_end"]),
        used=row["used"],
        fire_time=row["fire_time"],
    )
