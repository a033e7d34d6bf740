"""What sums that are ready when they are asked for cost the ledger: CPU of Postgres and pairs a second, with them and without, in turn.

Opens and settles batches of calls over several tenants, through the ledger's own statements, on one connection; in one half of each round
the trigger that counts is switched off. In the other half the log is folded by a second connection, whose cost is told apart. Halves are
compared within a round, so what else the machine does is in both.
"""

import argparse
import asyncio
import json
import platform
import random
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Self

import asyncpg

from bench.crowd import process_cpu_seconds
from bench.paired import Rounds, orders
from devstack.embedded_postgres import EmbeddedPostgres
from devstack.ports import free_port
from services.kernel.ids import new_uuid7
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.metering.adapters.postgres_ledger import PostgresLedger
from services.metering.app.loading import migrate_schema
from services.metering.call import Opening, RatedSettlement, Settlement, TokenUsage
from services.metering.settings import MeteringSettings

PASSWORD = "bench"  # noqa: S105 - of a server on loopback that ends with the measurement
PRICE_VERSION, MODELS = "2026-01", ("claude-haiku-4-5", "claude-opus-4-6")
FEATURES, PROMPTS = ("chat", "search", "summary"), ("default@1", "default@2")
WITHOUT, WITH = 0, 1
# These fill caches and make plans.
WARMING = 2
SWITCH = {
    WITHOUT: "ALTER TABLE metering.calls DISABLE TRIGGER calls_are_counted",
    WITH: "ALTER TABLE metering.calls ENABLE TRIGGER calls_are_counted",
}
BACKEND = "SELECT pid FROM pg_stat_activity WHERE application_name = $1"
FOLD = "SELECT metering.fold_usage(1000000)"
COUNTED = """
SELECT sum(settled_calls) FILTER (WHERE grain = 1)::bigint AS settled, count(*) AS rows
FROM metering.usage_rollups WHERE tenant_id IS NOT NULL
"""


def openings(tenants: Sequence[bytes], size: int, users: int) -> list[Opening]:
    """A batch of calls to open, of as many users as there are."""
    now = datetime.now(UTC)
    micros, deadline = int(now.timestamp() * 1e6), int((now + timedelta(seconds=60)).timestamp() * 1e6)
    return [
        Opening(
            tenant_id=random.choice(tenants),
            reservation_id=new_uuid7().bytes,
            context_token="",
            call_id=new_uuid7().bytes,
            attempt=1,
            epoch=0,
            reserve_us=micros,
            dispatch_deadline_us=deadline,
            bound_tokens=1_000,
            bound_nano_usd=5_000_000,
            price_version=PRICE_VERSION,
            provider="anthropic",
            model=random.choice(MODELS),
            feature=random.choice(FEATURES),
            user=f"user-{random.randrange(users)}",
            prompt_version=random.choice(PROMPTS),
            tier="professional",
        )
        for _ in range(size)
    ]


def settlements(opened: Sequence[Opening]) -> list[RatedSettlement]:
    """What each of them was billed."""
    return [
        RatedSettlement(
            Settlement(
                call.tenant_id,
                call.reservation_id,
                TokenUsage(input=random.randrange(100, 4_000), output=random.randrange(10, 800), cache_read=random.randrange(2_000)),
                "end_turn",
                "req_1",
                int(random.lognormvariate(6, 0.5)),
                int(random.lognormvariate(8, 0.7)),
            ),
            new_uuid7().bytes,
            350_000,
        )
        for call in opened
    ]


@dataclass(frozen=True, slots=True)
class Half:
    """What a pair cost in one half of a round, in microseconds: CPU of the writing session and of the folding one, and time."""

    writer: float
    folder: float
    clock: float


@dataclass(frozen=True, slots=True)
class World:
    """A migrated database with one session that writes, one that folds, and an administrator's."""

    ledger: PostgresLedger
    folding: JobsDatabase
    admin: asyncpg.Connection
    writer_pid: int
    folder_pid: int

    @classmethod
    @asynccontextmanager
    async def on(cls, postgres: EmbeddedPostgres) -> AsyncIterator[Self]:
        """Migrates and connects; everything is closed at the end."""
        service, jobs = (postgres.dsn(role=role, password=PASSWORD) for role in ("metering_service", "metering_jobs"))
        dsns = {"postgres_admin_dsn": postgres.dsn(), "postgres_dsn": service, "postgres_jobs_dsn": jobs}
        await migrate_schema(MeteringSettings.model_validate(dsns))
        database = await TenantDatabase.open(service, max_size=1, application_name="usage-writes")
        folding = await JobsDatabase.open(jobs, max_size=1, application_name="usage-folds", statement_timeout_seconds=60.0)
        admin = await asyncpg.connect(postgres.dsn())
        try:
            writer, folder = [await admin.fetchval(BACKEND, name) for name in ("usage-writes", "usage-folds")]
            yield cls(PostgresLedger(database, lease_seconds=60.0), folding, admin, writer, folder)
        finally:
            await admin.close()
            await folding.close()
            await database.close()

    async def half(self, subject: int, tenants: Sequence[bytes], options: argparse.Namespace) -> Half:
        """Opens and settles batches with the trigger or without it, then folds."""
        await self.admin.execute(SWITCH[subject])
        batches = [openings(tenants, options.batch, options.users) for _ in range(options.batches)]
        settling = [settlements(batch) for batch in batches]
        cpu, began = process_cpu_seconds(self.writer_pid), time.perf_counter()
        for opened, settled in zip(batches, settling, strict=True):
            await self.ledger.open(opened)
            await self.ledger.settle(settled)
        wrote, took = process_cpu_seconds(self.writer_pid) - cpu, time.perf_counter() - began
        cpu = process_cpu_seconds(self.folder_pid)
        await self.folding.call(FOLD)
        scale = 1e6 / (options.batch * options.batches)
        return Half(wrote * scale, (process_cpu_seconds(self.folder_pid) - cpu) * scale, took * scale)


async def measure(options: argparse.Namespace, postgres: EmbeddedPostgres) -> dict[str, object]:
    """Runs the rounds."""
    tenants = [new_uuid7().bytes for _ in range(options.tenants)]
    cpu, clock, folds = Rounds((WITHOUT, WITH)), Rounds((WITHOUT, WITH)), []
    async with World.on(postgres) as world:
        for number, order in enumerate(orders((WITHOUT, WITH), options.rounds + WARMING)):
            halves = {subject: await world.half(subject, tenants, options) for subject in order}
            if number >= WARMING:
                cpu.add({subject: half.writer for subject, half in halves.items()})
                clock.add({subject: half.clock for subject, half in halves.items()})
                folds.append(halves[WITH].folder)
        counted = await world.admin.fetchrow(COUNTED)
    return {
        "postgres_cpu_us_per_pair": {"without": round(cpu.median_cost(WITHOUT), 1), "with": round(cpu.median_cost(WITH), 1)},
        "postgres_cpu_ratio": round(cpu.relative(WITH), 3),
        "fold_cpu_us_per_pair": round(median(folds), 1),
        "pairs_per_second": {"without": round(1e6 / clock.median_cost(WITHOUT)), "with": round(1e6 / clock.median_cost(WITH))},
        "time_ratio": round(clock.relative(WITH), 3),
        "settled_and_counted": counted["settled"],
        "rollup_rows": counted["rows"],
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
    shape = {name: getattr(options, name) for name in ("batch", "batches", "rounds", "tenants", "users")}
    return {"bench": "usage_writes", "python": platform.python_version()} | shape | measured


def main(arguments: list[str]) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m bench usage_writes", description=__doc__)
    parser.add_argument("--batch", type=int, default=32, help="calls in one transaction")
    parser.add_argument("--batches", type=int, default=20, help="transactions in one half of a round")
    parser.add_argument("--rounds", type=int, default=40, help="rounds, each with the sums and without")
    parser.add_argument("--tenants", type=int, default=4, help="tenants the calls are of")
    parser.add_argument("--users", type=int, default=200, help="users of each tenant")
    print(json.dumps(asyncio.run(run(parser.parse_args(arguments)))))
