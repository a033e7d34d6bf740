"""One run of chaos: a whole mesh under load, a part of it killed every other second, and afterwards all books compared."""

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from devstack.addresses import Ports
from devstack.handbook import HARBOR
from devstack.mesh_client import MeshClient, credentials, operator_credentials
from devstack.provisioning import create_tenant, ingest
from devstack.stack import Stack, running_stack
from devstack.state import DemoTenant
from mesh.inference.v1 import conversation_service_pb2
from mesh.metering.v1 import usage_service_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2
from mesh.tenant.v1 import configuration_service_pb2
from tests.chaos.agreement import Books, Report, differences, kind_of
from tests.chaos.bookkeeper import Bookkeeper
from tests.chaos.books import SETTLED, UNRESOLVED, VOID, Ledger, Limits, read_holds, read_ledger, read_provider
from tests.chaos.callers import UNIT, Caller, Diary
from tests.chaos.chances import closings, deaths, orders
from tests.chaos.faults import Faults, logged
from tests.chaos.killer import Killer
from tests.ratelimit.rules import rule
from tests.support.mesh import state_folder

T = TypeVar("T")

TENANTS = 8
CALLERS_A_TENANT = 2
TENANTS_WITH_DOCUMENTS = 3
# The last tenants have a budget that a minute of calls uses up.
TIGHT_TENANTS = 2
TIGHT_BUDGET_NANO_USD = 400_000_000
UNITS = 1_000_000
_BUDGET = "cost_nano_usd_per_month"
_SETUP_SECONDS = 20.0
_READ_SECONDS = 5.0
_LOOK_SECONDS = 0.25
# Longer than a sweep, a relay's look at its table and a renewal: what was still on its way has arrived.
_STAYS_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class Storm:
    """What a run is made from. `settle_seconds`: within which everything must agree, from the last restart and the last call's end."""

    seed: int
    duration_seconds: float
    settle_seconds: float


async def run(storm: Storm, state: Path | None = None) -> dict[str, Any]:
    """Runs a storm and returns what happened. `state` keeps its files.

    `differences` is empty when the guarantees held, no answer was INTERNAL and nothing failed in a way that nobody had foreseen.
    """
    with contextlib.ExitStack() as folders:
        folder = state or folders.enter_context(state_folder())
        async with _mesh(folder) as (stack, client):
            faults = Faults()
            bookkeeper = Bookkeeper(stack, client, faults)
            await bookkeeper.register()
            async with asyncio.TaskGroup() as group:
                making = [group.create_task(_tenant(stack, client, bookkeeper, number)) for number in range(TENANTS)]
            weather = _Weather(storm, stack, client, bookkeeper, faults, dict(made.result() for made in making))
            async with weather.killer.keeping_up():
                await weather.rage()
                return await weather.calm()


@contextlib.asynccontextmanager
async def _mesh(folder: Path) -> AsyncIterator[tuple[Stack, MeshClient]]:
    ports = Ports.free()
    async with running_stack(folder, ports, trace_sample_ratio=0.0) as stack, MeshClient.connect(ports) as client:
        yield stack, client


async def _tenant(stack: Stack, client: MeshClient, bookkeeper: Bookkeeper, number: int) -> tuple[DemoTenant, str]:
    company = replace(HARBOR, slug=f"chaos-{number}-{uuid.uuid4().hex[:8]}", plan="enterprise")
    tenant = await create_tenant(stack, client, company)
    tight = {_BUDGET: TIGHT_BUDGET_NANO_USD} if number >= TENANTS - TIGHT_TENANTS else {}
    request = configuration_service_pb2.UpdateConfigurationRequest(
        overrides=configuration_service_pb2.ConfigurationOverrides(
            limits=configuration_service_pb2.LimitOverrides(**tight),
            limit_rules=configuration_service_pb2.LimitRuleOverrides(rules=[rule(UNIT, UNIT, "month", UNITS)]),
        ),
        update_mask=FieldMask(paths=[f"limit_rules.rules.{UNIT}", *(f"limits.{name}" for name in tight)]),
    )
    operator = operator_credentials(stack.state.secrets.operator_key, "chaos")
    await client.configuration.UpdateConfiguration(request, metadata=(*operator, ("x-tenant-id", tenant.tenant_id)), timeout=_SETUP_SECONDS)
    await bookkeeper.subscribe(tenant)
    if number < TENANTS_WITH_DOCUMENTS:
        await ingest(client, HARBOR, tenant)
    made = await client.conversations.CreateConversation(
        conversation_service_pb2.CreateConversationRequest(), metadata=credentials(tenant.api_key), timeout=_SETUP_SECONDS
    )
    return tenant, made.conversation.conversation_id


class _Weather:
    """One storm over one mesh."""

    def __init__(
        self,
        storm: Storm,
        stack: Stack,
        client: MeshClient,
        bookkeeper: Bookkeeper,
        faults: Faults,
        conversations: dict[DemoTenant, str],
    ) -> None:
        self.killer = Killer(stack)
        self._storm, self._stack, self._client, self._bookkeeper, self._faults = storm, stack, client, bookkeeper, faults
        self._conversations, self._tenants = conversations, list(conversations)
        self._diaries = {tenant.tenant_id: Diary() for tenant in conversations}
        self._last_seen_seconds: dict[str, float] = {}

    async def rage(self) -> None:
        """Calls and kills for as long as the storm lasts, and returns once every part is up and every caller has done."""
        began, seconds = time.monotonic(), self._storm.duration_seconds
        until = began + seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(self.killer.run(deaths(self._storm.seed), until))
            for number, (tenant, conversation_id) in enumerate(self._conversations.items()):
                at = [began + part * seconds for part in closings(self._storm.seed, number)]
                group.create_task(self._bookkeeper.close(tenant, at))
                for index in range(CALLERS_A_TENANT):
                    caller = Caller(self._client, tenant, conversation_id, self._diaries[tenant.tenant_id], self._faults)
                    group.create_task(caller.run(orders(self._storm.seed, number, index), until))
        await self.killer.all_up()

    async def calm(self) -> dict[str, Any]:
        """Compares the books until they agree, or for as long as they may take."""
        began = time.monotonic()
        agreed_after_seconds: float | None = None
        while True:
            found, ledger = await self._compare()
            now = time.monotonic() - began
            self._last_seen_seconds.update({kind_of(difference): round(now, 2) for difference in found})
            if found:
                agreed_after_seconds = None
            elif agreed_after_seconds is None:
                agreed_after_seconds = now
            elif now >= agreed_after_seconds + _STAYS_SECONDS:
                break
            if found and now > self._storm.settle_seconds:
                break
            await asyncio.sleep(_LOOK_SECONDS)
        return self._told(found, ledger, agreed_after_seconds)

    async def _compare(self) -> tuple[list[str], Ledger | None]:
        silent: list[grpc.aio.AioRpcError] = []
        # The limits first: a tenant whose counters are gone has them rebuilt by being asked, which begins an epoch at the ledger.
        try:
            limits = await self._of_each_tenant(self._limits)
            reports = await self._of_each_tenant(self._report)
            bills = await self._of_each_tenant(lambda tenant: self._bookkeeper.bills(tenant, _READ_SECONDS))
        except* grpc.aio.AioRpcError as failed:
            silent = [error for error in failed.exceptions if isinstance(error, grpc.aio.AioRpcError)]
        if silent:
            told = [self._faults.read("reading", "the books", error) for error in silent]
            return [f"the mesh does not answer: {answer.code} {answer.message}" for answer in told], None
        ledger = await read_ledger(self._stack.postgres.dsn("tenantry"))
        provider = await asyncio.to_thread(read_provider, self._stack.state.folder / "provider-ledger.jsonl")
        budgets = {tenant.tenant_id: TIGHT_BUDGET_NANO_USD for tenant in self._tenants[-TIGHT_TENANTS:]}
        runaways = frozenset(call_id for diary in self._diaries.values() for call_id in diary.runaways)
        months = self._bookkeeper.months
        return differences(Books(provider, ledger, limits, reports, self._diaries, budgets, runaways, bills, months)), ledger

    async def _of_each_tenant(self, read: Callable[[DemoTenant], Coroutine[object, object, T]]) -> dict[str, T]:
        async with asyncio.TaskGroup() as group:
            reading = {tenant.tenant_id: group.create_task(read(tenant)) for tenant in self._tenants}
        return {tenant_id: task.result() for tenant_id, task in reading.items()}

    async def _limits(self, tenant: DemoTenant) -> Limits:
        listed = await self._client.limits.ListLimits(
            rate_limit_service_pb2.ListLimitsRequest(), metadata=credentials(tenant.api_key), timeout=_READ_SECONDS
        )
        holds, lease_count = await read_holds(self._stack.redis.url, tenant.tenant_id)
        return Limits(holds, lease_count, {limit.rule: limit.used for limit in listed.limits})

    async def _report(self, tenant: DemoTenant) -> Report:
        request = usage_service_pb2.GetUsageReportRequest()
        request.start_time.FromDatetime(datetime.now(UTC) - timedelta(days=1))
        told = await self._client.usage.GetUsageReport(request, metadata=credentials(tenant.api_key), timeout=_READ_SECONDS)
        return Report(
            told.total_cost.nano_usd,
            told.settled_count,
            told.void_count,
            told.open_count,
            told.unresolved_count,
            told.outstanding_bound.nano_usd,
        )

    def _told(self, found: list[str], ledger: Ledger | None, agreed_after_seconds: float | None) -> dict[str, Any]:
        states = Counter(call.state for call in ledger.calls if call.call_id is not None) if ledger else Counter[int]()
        endings = sum((diary.endings for diary in self._diaries.values()), Counter[str]())
        return {
            "seed": self._storm.seed,
            "duration_seconds": self._storm.duration_seconds,
            "kills": dict(sorted(self.killer.kill_counts.items())),
            "restarts": self.killer.restart_count,
            "calls": sum(len(diary.asked) for diary in self._diaries.values()),
            "endings": dict(endings.most_common()),
            "settled": states[SETTLED],
            "unresolved": states[UNRESOLVED],
            "void": states[VOID],
            "units_recorded": len(ledger.units) if ledger else 0,
            "events_recorded": len(ledger.events) if ledger else 0,
            "waited_for_seconds": dict(sorted(self._last_seen_seconds.items(), key=lambda seen: -seen[1])),
            "agreed_after_seconds": None if agreed_after_seconds is None else round(agreed_after_seconds, 2),
            "differences": [*found, *self._faults.said, *logged(self._stack.state.folder / "logs")],
        }
