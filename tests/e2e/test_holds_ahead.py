"""Holds that lie ahead of a hot tenant's calls, on a whole mesh with two inference processes: the books agree whatever happens to them."""

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import grpc
import pytest
import redis.asyncio
from google.protobuf.field_mask_pb2 import FieldMask

from devstack.managed_process import ManagedProcess
from devstack.mesh_client import credentials, operator_credentials, refusal
from devstack.replica import start_replica
from devstack.state import DemoTenant
from mesh.common.v1 import limit_rule_pb2
from mesh.inference.v1 import inference_service_pb2 as pb
from mesh.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from mesh.ratelimit.v1 import rate_limit_service_pb2
from mesh.tenant.v1 import configuration_service_pb2, tenant_service_pb2
from tests.chaos.agreement import Books, differences
from tests.chaos.books import Limits, read_holds, read_ledger, read_provider
from tests.chaos.callers import Diary
from tests.support.mesh import Mesh
from tests.support.waiting import eventually

MODEL = "claude-haiku-4-5-20251001"
WORKERS = 8
# A pace that is reached on a slow machine too.
PACE = "6"
SOON_SECONDS = 30.0
FAR = {"requests_per_minute": 1_000_000, "tokens_per_minute": 1_000_000_000, "tokens_per_day": 100_000_000_000, "concurrent_calls": 2_000}


@dataclass
class Caller:
    """Calls of one tenant at some inference processes, and what came of them."""

    mesh: Mesh
    tenant: DemoTenant
    stubs: Sequence[InferenceServiceStub]
    asked: set[str] = field(default_factory=set)
    answered: set[str] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)

    async def call(self, number: int, call_id: uuid.UUID | None = None) -> str:
        """Makes one call; returns why it was refused, empty where it was answered."""
        call_id = call_id or uuid.uuid4()
        self.asked.add(str(call_id))
        request = pb.GenerateRequest(
            messages=[pb.Message(role=pb.ROLE_USER, text="[[stub: output_tokens=3]] Go on.")],
            options=pb.GenerateOptions(model=MODEL, max_output_tokens=20),
        )
        metadata = credentials(self.tenant.api_key, call_id=call_id)
        try:
            await self.stubs[number % len(self.stubs)].Generate(request, metadata=metadata, timeout=20)
        except grpc.aio.AioRpcError as error:
            reason = refusal(error).reason or error.code().name
            self.refused[reason] += 1
            return reason
        self.answered.add(str(call_id))
        return ""

    async def until(self, true: Callable[[], Awaitable[bool]], workers: int = WORKERS, pause_seconds: float = 0.0) -> None:
        """Keeps so many calls under way until it is so, each worker's with a pause between them; at most for a generous while."""
        done = asyncio.Event()

        async def work(number: int) -> None:
            while not done.is_set():
                if await self.call(number):
                    await asyncio.sleep(0.05)
                await asyncio.sleep(pause_seconds)

        async with asyncio.timeout(2 * SOON_SECONDS), asyncio.TaskGroup() as group:
            for number in range(workers):
                group.create_task(work(number))
            try:
                await eventually(true, within_seconds=SOON_SECONDS)
            finally:
                done.set()

    async def heat(self, calls: int = 40) -> None:
        """Makes calls until so many took a hold that lay ahead, by what their spans say."""

        async def hot() -> bool:
            return len(self.took_ahead()) >= calls

        await self.until(hot)

    def took_ahead(self) -> set[str]:
        """Which calls took a hold that lay ahead."""
        spans = [span for trace in self.mesh.stack.traces._traces.values() for span in trace]
        ahead = {span.attributes["tenantry.call_id"] for span in spans if span.attributes.get("tenantry.hold") == "ahead"}
        return ahead & self.asked

    async def books(self) -> list[str]:
        """What differs between the provider's ledger, ours, and the limits' Redis."""
        stack, tenant_id = self.mesh.stack, self.tenant.tenant_id
        ledger = await read_ledger(stack.postgres.dsn("tenantry"), tenant_id)
        billed = [line for line in read_provider(stack.state.folder / "provider-ledger.jsonl") if line.call_id in self.asked]
        holds, lease_count = await read_holds(stack.redis.url, tenant_id)
        used = {limit.rule: limit.used for limit in await self.limits()}
        diary = Diary(asked=self.asked)
        return differences(Books(billed, ledger, {tenant_id: Limits(holds, lease_count, used)}, {}, {tenant_id: diary}, {}))

    async def limits(self) -> Sequence[rate_limit_service_pb2.LimitStatus]:
        """How the limits stand."""
        metadata = credentials(self.tenant.api_key)
        return (await self.mesh.client.limits.ListLimits(rate_limit_service_pb2.ListLimitsRequest(), metadata=metadata, timeout=20)).limits

    async def at_rest(self) -> None:
        """Returns once nothing is held, and everything agrees."""
        found = ["nothing was compared"]

        async def agree() -> bool:
            nonlocal found
            found = await self.books()
            return not found

        try:
            await eventually(agree, within_seconds=SOON_SECONDS)
        except TimeoutError:
            pytest.fail("\n".join(found))


@pytest.fixture(scope="module")
async def replicas(mesh: Mesh) -> AsyncIterator[Sequence[InferenceServiceStub]]:
    """Two inference processes in which a pace of few calls is hot."""
    async with contextlib.AsyncExitStack() as closing:
        yield [await replica(mesh, f"inference-hot-{number}", closing) for number in range(2)]


async def replica(
    mesh: Mesh, name: str, closing: contextlib.AsyncExitStack, started: list[ManagedProcess] | None = None
) -> InferenceServiceStub:
    """Starts an inference process of the test's own."""
    process, address = await start_replica(mesh.stack, "inference", name, trace_sample_ratio=1.0, TENANTRY_AHEAD_CALLS_PER_SECOND=PACE)
    closing.push_async_callback(process.stop)
    if started is not None:
        started.append(process)
    return InferenceServiceStub(await closing.enter_async_context(grpc.aio.insecure_channel(address)))


async def hot_tenant(mesh: Mesh, stubs: Sequence[InferenceServiceStub], *rules: limit_rule_pb2.LimitRule) -> Caller:
    """A tenant far from every edge but those of these rules."""
    caller = Caller(mesh, await mesh.tenant("enterprise"), stubs)
    overrides = configuration_service_pb2.ConfigurationOverrides(
        limits=configuration_service_pb2.LimitOverrides(**FAR), limit_rules=configuration_service_pb2.LimitRuleOverrides(rules=rules)
    )
    paths = [*(f"limits.{term}" for term in FAR), *(f"limit_rules.rules.{rule.name}" for rule in rules)]
    request = configuration_service_pb2.UpdateConfigurationRequest(overrides=overrides, update_mask=FieldMask(paths=paths))
    operator = operator_credentials(mesh.stack.state.secrets.operator_key, "a hot tenant")
    await mesh.client.configuration.UpdateConfiguration(request, metadata=(*operator, ("x-tenant-id", caller.tenant.tenant_id)), timeout=20)

    async def in_force() -> bool:
        return {limit.rule: limit.limit for limit in await caller.limits()}["requests_per_minute"] == FAR["requests_per_minute"]

    await eventually(in_force, within_seconds=SOON_SECONDS)
    return caller


async def test_a_hot_tenants_calls_take_holds_ahead_and_the_books_agree(mesh: Mesh, replicas: Sequence[InferenceServiceStub]) -> None:
    """Through two processes, none is refused, and once the calls have ended nothing is held: no hold was used twice or left behind."""
    caller = await hot_tenant(mesh, replicas)
    await caller.heat(calls=60)
    assert not caller.refused
    await caller.at_rest()
    assert caller.answered == caller.asked


async def test_the_last_call_of_a_budget_is_admitted_and_none_beyond(mesh: Mesh, replicas: Sequence[InferenceServiceStub]) -> None:
    """Of 240 calls a day, through two processes with holds ahead, 240 are answered: they pass no limit and keep nobody out for good."""
    rule = limit_rule_pb2.LimitRule(
        name="calls_per_day",
        unit=limit_rule_pb2.LIMIT_UNIT_REQUESTS,
        window=limit_rule_pb2.LIMIT_WINDOW_DAY,
        scope=limit_rule_pb2.LIMIT_SCOPE_TENANT,
        limit=240,
    )
    caller = await hot_tenant(mesh, replicas, rule)

    async def used_up() -> bool:
        return len(caller.answered) >= 240

    # Slowly enough that a fast machine has not used most of it up before it is known to be hot.
    await caller.until(used_up, pause_seconds=0.15)
    assert all([await caller.call(number) == "PLAN_LIMIT" for number in range(4)])
    assert set(caller.refused) == {"PLAN_LIMIT"}
    assert caller.took_ahead()
    await caller.at_rest()
    assert len(caller.answered) == 240
    assert {limit.rule: limit.used for limit in await caller.limits()}["calls_per_day"] == 240


async def test_no_hold_of_a_lost_epoch_is_opened(mesh: Mesh, replicas: Sequence[InferenceServiceStub]) -> None:
    """Redis forgets everything while holds lie ahead: afterwards others lie there, and what is used is what the ledger says."""
    caller = await hot_tenant(mesh, replicas)
    await caller.heat()
    async with redis.asyncio.from_url(mesh.stack.redis.url) as client:
        await client.flushall()
    before = len(caller.took_ahead())
    await caller.heat(calls=before + 30)
    assert len(caller.took_ahead()) >= before + 30
    await caller.at_rest()


async def test_a_suspended_tenant_has_nothing_ahead(mesh: Mesh, replicas: Sequence[InferenceServiceStub]) -> None:
    """Once its calls are refused none is answered from a hold that lay ahead, and what lay ahead is released."""
    caller = await hot_tenant(mesh, replicas)
    await caller.heat()
    operator = operator_credentials(mesh.stack.state.secrets.operator_key, "an unpaid bill")
    named = tenant_service_pb2.SuspendTenantRequest(tenant_id=caller.tenant.tenant_id)

    async def refused() -> bool:
        return caller.refused["TENANT_SUSPENDED"] >= 3 * WORKERS

    async with asyncio.TaskGroup() as group:
        calls = group.create_task(caller.until(refused))
        await mesh.client.tenants.SuspendTenant(named, metadata=operator, timeout=20)
        await calls
    answered = len(caller.answered)
    assert all([await caller.call(number) == "TENANT_SUSPENDED" for number in range(2 * WORKERS)])
    assert len(caller.answered) == answered
    again = tenant_service_pb2.ResumeTenantRequest(tenant_id=caller.tenant.tenant_id)
    await mesh.client.tenants.ResumeTenant(again, metadata=operator, timeout=20)

    async def resumed() -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            return bool(await caller.limits())
        return False

    await eventually(resumed, within_seconds=SOON_SECONDS)
    await caller.at_rest()


async def test_a_killed_process_leaves_nothing_after_its_leases(mesh: Mesh) -> None:
    """Killed while holds lie ahead: each goes with its lease, after the ledger was asked, and calls elsewhere are not refused for it."""
    started: list[ManagedProcess] = []
    async with contextlib.AsyncExitStack() as closing:
        caller = await hot_tenant(mesh, [await replica(mesh, "inference-killed", closing, started)])
        await caller.heat()
        async with asyncio.TaskGroup() as group:
            calls = group.create_task(caller.until(lambda: _died(started[0])))
            started[0].kill()
            await calls
    holds, _ = await read_holds(mesh.stack.redis.url, caller.tenant.tenant_id)
    assert holds
    caller.stubs = [mesh.client.inference]
    assert await caller.call(0) == ""
    await caller.at_rest()


async def test_a_repeated_call_id_finds_its_own_call(mesh: Mesh, replicas: Sequence[InferenceServiceStub]) -> None:
    """A call that is made again under its id, while holds lie ahead, is told of its first, and is billed once."""
    caller = await hot_tenant(mesh, replicas)
    await caller.heat()
    call_ids = [uuid.uuid4() for _ in range(20)]
    twice = [await caller.call(number, call_id) for _ in range(2) for number, call_id in enumerate(call_ids)]
    assert twice == [""] * 20 + ["CONTENT_CONFLICT"] * 20
    await caller.at_rest()


async def _died(process: ManagedProcess) -> bool:
    await process.wait()
    return True
