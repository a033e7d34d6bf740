"""Sums of use are what the books say, whoever writes, sweeps, folds or dies in between."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from mesh.metering.v1 import ledger_service_pb2 as pb
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from services.metering.usage_plan import Grain
from tests.metering.mesh import Mesh, Tenant, bill, not_billed, unknown
from tests.metering.replicas import Replica, running_replicas
from tests.metering.usage import ALL_NAMES, HOUR, NAMES, asking, books, every_row, fold, told

CALLS, USES, AT_ONCE = 90, 30, 16
RECONCILE = "SELECT metering.reconcile_call($1, $2, $3, 7, 3, 0, 0, 0, 22000, 'report')"
RECOUNTED = """
SELECT coalesce(sum(calls), 0) = (SELECT count(*) * 2 FROM metering.calls WHERE tenant_id = $1 AND state = 2 AND product_unit IS NULL)
FROM metering.usage_latencies WHERE tenant_id = $1
"""
EVERY_GRAIN = """
SELECT grain, sum(settled_calls)::bigint, sum(void_calls)::bigint, sum(input_tokens)::bigint, sum(cost_nano_usd)::bigint,
       sum(quantity)::bigint
FROM metering.usage_rollups WHERE tenant_id = $1 GROUP BY grain ORDER BY grain
"""


class Script:
    """Everything that may happen to a tenant's calls, in an order that chance decides, at whichever replica answers."""

    def __init__(self, mesh: Mesh, tenant: Tenant, replicas: Sequence[Replica], chance: random.Random) -> None:
        self._mesh = mesh
        self._tenant = tenant
        self._replicas = replicas
        self._chance = chance
        self.happened = 0

    async def call(self, number: int) -> None:
        """One call: opened, then two to four ends of any kind, some repeated, some impossible by then."""
        chance = self._chance
        deadline = datetime.now(UTC) - timedelta(minutes=2)
        opening = self._mesh.opening(
            self._tenant,
            attempt=chance.randint(1, 3),
            user=f"user-{number % 7}",
            feature=chance.choice(("chat", "search", "")),
            model=chance.choice(("claude-haiku-4-5", "claude-opus-4-6")),
            prompt_version=f"default@{number % 2}",
            reserve_time=datetime.now(UTC) - timedelta(minutes=chance.randint(0, 4_000)),
            dispatch_deadline=deadline,
        )
        await self._say("OpenCalls", pb.OpenCallsRequest(calls=[opening]))
        settlement = bill(opening.ref, input_tokens=chance.randint(0, 900), output_tokens=chance.randint(0, 90), cache_read_tokens=number)
        ends: list[Callable[[], Awaitable[object]]] = [
            lambda: self._say("SettleCalls", pb.SettleCallsRequest(calls=[settlement])),
            lambda: self._say("VoidCalls", pb.VoidCallsRequest(calls=[unknown(opening.ref, pb.TokenUsage(input_tokens=5))])),
            lambda: self._say(
                "VoidCalls", pb.VoidCallsRequest(calls=[not_billed(opening.ref, chance.choice(("provider_529", "cancelled")))])
            ),
            lambda: self._say("FenceCalls", pb.FenceCallsRequest(calls=[pb.FenceCall(ref=opening.ref)])),
            lambda: self._reconcile(opening.ref),
            lambda: self._lapse(opening.ref),
        ]
        settle, interrupt, void, _, reconcile, _ = ends
        # The first ones go every way there is; what the others do is left to chance.
        certain = [[settle], [interrupt], [void], [interrupt, reconcile], [interrupt, reconcile, settle]]
        left = chance.choices(ends, weights=(4, 3, 1, 1, 3, 2), k=chance.randint(1, 4))
        for end in certain[number] if number < len(certain) else left:
            await end()

    async def use(self, number: int) -> None:
        """A use of units, told twice."""
        use = self._mesh.use(self._tenant, quantity=number + 1, product_unit=f"unit_{number % 2}", user=f"user-{number % 3}")
        for _ in range(2):
            await self._say("RecordUnits", pb.RecordUnitsRequest(items=[use]))

    async def _say(self, method: str, request: object) -> None:
        while True:
            replica = self._chance.choice([replica for replica in self._replicas if replica.process.exit_code is None])
            caller = replica.ratelimit if method in ("FenceCalls", "RecordUnits") else replica.inference
            try:
                await caller.channel.unary(getattr(caller.ledger, method), request, timeout_seconds=20)
            except MeshError:
                # Killed on the way: whether it was written is not known, so it is said again to another.
                continue
            self.happened += 1
            return

    async def _reconcile(self, reference: pb.CallRef) -> None:
        ids = UUID(bytes=reference.tenant_id), UUID(bytes=reference.reservation_id)
        # Only an unresolved call can be: whether it is one, chance decides.
        with suppress(asyncpg.ObjectNotInPrerequisiteStateError):
            await self._mesh.app.jobs.call(RECONCILE, *ids, new_uuid7())

    async def _lapse(self, reference: pb.CallRef) -> None:
        await self._mesh.admin.execute(
            "UPDATE metering.call_leases SET lease_until = now() - interval '1 s' WHERE tenant_id = $1 AND reservation_id = $2",
            UUID(bytes=reference.tenant_id),
            UUID(bytes=reference.reservation_id),
        )


@pytest.mark.timeout(180)
async def test_sums_are_those_of_the_books_after_anything(mesh: Mesh, tmp_path: Path) -> None:
    """Settled, voided, swept, fenced, reconciled, adjusted and repeated at three replicas, folded all the while, one of them killed."""
    tenant, other = mesh.new_tenant(), mesh.new_tenant()
    await mesh.opened(other)
    async with running_replicas(mesh, tmp_path, 3, lease_seconds=1.0, sweep_seconds=0.05, usage_fold_seconds=0.02) as replicas:
        script = Script(mesh, tenant, replicas, random.Random(13))
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(step: Callable[[int], Awaitable[None]], number: int) -> None:
            async with limit:
                await step(number)
                if number == CALLS // 2:
                    await replicas[0].kill()

        async with asyncio.TaskGroup() as group:
            for number in range(CALLS):
                group.create_task(one(script.call, number))
                if number < USES:
                    group.create_task(one(script.use, number))
        await fold(mesh)
    asked = asking(*ALL_NAMES, page_size=100)
    found = await every_row(mesh, tenant, asked)
    assert told(found) == await books(mesh, tenant)
    by_hour = await every_row(mesh, tenant, asking(*ALL_NAMES[1:], bucket=HOUR, page_size=1_000))
    assert told(by_hour, NAMES[1:], hours=True) == await books(mesh, tenant, NAMES[1:], hours=True)
    assert await mesh.admin.fetchval(RECOUNTED, tenant.id)
    grains = [tuple(row) for row in await mesh.admin.fetch(EVERY_GRAIN, tenant.id)]
    assert [grain for grain, *_ in grains] == sorted(set(Grain) - {Grain.CALLS})
    assert len({tuple(sums) for _, *sums in grains}) == 1, "every grain says the same in all"
    kinds = await mesh.admin.fetch("SELECT kind, count(*) FROM metering.entries WHERE tenant_id = $1 GROUP BY kind", tenant.id)
    assert {row["kind"] for row in kinds} == {1, 2, 3}, "the script reconciles and adjusts"
    states = await mesh.admin.fetch("SELECT DISTINCT state FROM metering.calls WHERE tenant_id = $1", tenant.id)
    assert {row["state"] for row in states} >= {2, 3, 4, 5}
