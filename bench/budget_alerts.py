"""What budgets cost the ledger, and how soon an alert follows the commit that reached its threshold, while calls are settled without pause.

The first part compares CPU of Postgres for a pair of open and settle, of tenants that all have budgets, with marks and without, in turn.
In the second one process settles batches as fast as it can and looks at budgets as the service does, while fresh tenants reach a threshold
each: how long until anybody can read the alert, from the moment the settlement was answered.
"""

import argparse
import asyncio
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from uuid import UUID

from bench.crowd import process_cpu_seconds
from bench.paired import Rounds, orders
from bench.usage_writes import PASSWORD, World, openings, settlements
from devstack.embedded_postgres import EmbeddedPostgres
from devstack.ports import free_port
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.metering.adapters.postgres_budget_marks import PostgresBudgetMarks
from services.metering.adapters.postgres_budgets import PostgresBudgets
from services.metering.adapters.postgres_ledger import PostgresLedger
from services.metering.adapters.postgres_usage_queries import PostgresUsageQueries
from services.metering.budgets.budget import BudgetAction, BudgetMeasure, BudgetPeriod, BudgetTerms, BudgetWish
from services.metering.budgets.keeper import BudgetKeeper
from services.metering.budgets.long_looks import LongLooks
from services.metering.budgets.look import BudgetLook
from services.metering.budgets.spending import UsageSpending
from services.metering.usage_calendar import TenantCalendar, zone_of

WITHOUT, WITH = 0, 1
WARMING = 2
SWITCH = {
    WITHOUT: "ALTER TABLE metering.usage_pending DISABLE TRIGGER budgets_are_marked",
    WITH: "ALTER TABLE metering.usage_pending ENABLE TRIGGER budgets_are_marked",
}
FORGET_MARKS = "TRUNCATE metering.budget_marks"
SELECT_ALERT = "SELECT 1 FROM metering.budget_alerts WHERE tenant_id = $1"
NEVER_REACHED = 9_000_000_000_000_000
BUDGETS_EACH = 10


class Utc:
    """Knows that every tenant counts in UTC."""

    async def of_tenant(self, tenant_id: TenantId) -> TenantCalendar:
        """Returns UTC and the first of the month."""
        return TenantCalendar("", zone_of("", ""), 1)


def wish(name: str, amount: int) -> BudgetWish:
    """A budget of tokens over a month."""
    terms = BudgetTerms(BudgetMeasure.TOKENS, "", "", "", amount, BudgetPeriod.MONTH)
    return BudgetWish(name, terms, BudgetAction.NOTIFY, (100,))


async def marks_cost(world: World, tenants: Sequence[bytes], options: argparse.Namespace) -> dict[str, object]:
    """Compares the writing session's CPU."""
    cpu = Rounds((WITHOUT, WITH))
    for number, order in enumerate(orders((WITHOUT, WITH), options.rounds + WARMING)):
        costs = {}
        for subject in order:
            await world.admin.execute(SWITCH[subject])
            batches = [openings(tenants, options.batch, 200) for _ in range(options.batches)]
            settling, began = [settlements(batch) for batch in batches], process_cpu_seconds(world.writer_pid)
            for opened, settled in zip(batches, settling, strict=True):
                await world.ledger.open(opened)
                await world.ledger.settle(settled)
            costs[subject] = (process_cpu_seconds(world.writer_pid) - began) * 1e6 / (options.batch * options.batches)
            await world.admin.execute(FORGET_MARKS)
            await world.folding.call("SELECT metering.fold_usage(1000000)")
        if number >= WARMING:
            cpu.add(costs)
    return {
        "postgres_cpu_us_per_pair": {"without": round(cpu.median_cost(WITHOUT), 1), "with": round(cpu.median_cost(WITH), 1)},
        "postgres_cpu_ratio": round(cpu.relative(WITH), 3),
    }


async def alert_lags(
    world: World, database: TenantDatabase, jobs: JobsDatabase, tenants: Sequence[bytes], options: argparse.Namespace
) -> tuple[list[float], float]:
    """Returns how long each alert took, in seconds, and how many pairs a second were settled meanwhile."""
    store = PostgresBudgets(database)
    spending = UsageSpending(PostgresUsageQueries(database, database, jobs))
    marks, look = PostgresBudgetMarks(jobs), BudgetLook(store, spending, Utc())
    keeper = BudgetKeeper(marks, look, LongLooks(marks, look), poll_seconds=0.2)
    settled, lags = 0, []

    async def load() -> None:
        nonlocal settled
        while True:
            batch = openings(tenants, options.batch, 200)
            await world.ledger.open(batch)
            await world.ledger.settle(settlements(batch))
            settled += len(batch)

    async def fold() -> None:
        while True:
            await asyncio.sleep(1.0)
            await world.folding.call("SELECT metering.fold_usage(5000)")

    probing, began = PostgresLedger(database, lease_seconds=60.0), time.perf_counter()
    async with asyncio.TaskGroup() as group:
        loops = [group.create_task(each) for each in (load(), fold(), keeper.run())]
        for _ in range(options.probes):
            tenant_id = TenantId(new_uuid7())
            await store.put(tenant_id, wish("probe", 1))
            opened = openings([tenant_id.bytes], 1, 1)
            await probing.open(opened)
            await probing.settle(settlements(opened))
            answered = time.perf_counter()
            # As whoever reads the table sees it.
            while not await world.admin.fetchval(SELECT_ALERT, tenant_id):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            lags.append(time.perf_counter() - answered)
        for loop in loops:
            loop.cancel()
    rate = settled / (time.perf_counter() - began)
    return lags, rate


async def measure(options: argparse.Namespace, postgres: EmbeddedPostgres) -> dict[str, object]:
    """Measures both parts."""
    tenants = [new_uuid7().bytes for _ in range(options.tenants)]
    service, jobs_dsn = (postgres.dsn(role=role, password=PASSWORD) for role in ("metering_service", "metering_jobs"))
    async with World.on(postgres) as world:
        database = await TenantDatabase.open(service, max_size=4, application_name="budgets")
        jobs = await JobsDatabase.open(jobs_dsn, max_size=3, application_name="budget-jobs")
        store = PostgresBudgets(database)
        for tenant in tenants:
            for number in range(BUDGETS_EACH):
                await store.put(TenantId(UUID(bytes=tenant)), wish(f"budget_{number}", NEVER_REACHED))
        cost = await marks_cost(world, tenants, options)
        lags, rate = await alert_lags(world, database, jobs, tenants, options)
        await jobs.close()
        await database.close()
    cuts = quantiles(lags, n=100, method="inclusive")
    milliseconds = {"p50": cuts[49], "p99": cuts[98], "most": max(lags)}
    return cost | {
        "alert_after_commit_ms": {name: round(seconds * 1e3, 1) for name, seconds in milliseconds.items()},
        "pairs_per_second_meanwhile": round(rate),
    }


async def run(options: argparse.Namespace) -> dict[str, object]:
    """Starts a Postgres of its own, measures and stops it."""
    with tempfile.TemporaryDirectory(prefix="tenantry-bench-") as folder:
        Path(folder).chmod(0o755)  # noqa: ASYNC240 - Postgres may run as another user
        postgres = EmbeddedPostgres(Path(folder) / "data", port=free_port(), password=PASSWORD, log_path=Path(folder) / "postgres.log")
        await postgres.start()
        try:
            measured = await measure(options, postgres)
        finally:
            await postgres.stop()
    shape = {name: getattr(options, name) for name in ("batch", "batches", "rounds", "tenants", "probes")}
    return {"bench": "budget_alerts", "python": platform.python_version()} | shape | measured


def main(arguments: list[str]) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m bench budget_alerts", description=__doc__)
    parser.add_argument("--batch", type=int, default=32, help="calls in one transaction")
    parser.add_argument("--batches", type=int, default=20, help="transactions in one half of a round")
    parser.add_argument("--rounds", type=int, default=20, help="rounds, each with the marks and without")
    parser.add_argument("--tenants", type=int, default=4, help="tenants that are loaded, each with ten budgets")
    parser.add_argument("--probes", type=int, default=100, help="thresholds that are reached")
    print(json.dumps(asyncio.run(run(parser.parse_args(arguments)))))
