"""Clients that decide by themselves: together they never pass a limit, whatever happens to them and to the store."""

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.common.v1 import limit_rule_pb2 as rules
from tenantry.limits import LimitSlices
from tests.ratelimit.callers import AtService, Service, eventually
from tests.ratelimit.rules import rule
from tests.ratelimit.slice_client import UNIT, AdmittedUse, most_in_any_window, read_log, use_up
from tests.support.stores import RedisStore as RedisServer

USERS = ("ada", "bob")
TRACEPARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-00"


def metadata_of(tenant: AtService) -> Sequence[tuple[str, str]]:
    """What proves the tenant."""
    return tenant.inference.metadata(tenant.context, TRACEPARENT)


@contextlib.asynccontextmanager
async def processes(
    tenant: AtService, address: str, seconds: float, logs: Sequence[Path]
) -> AsyncIterator[list[asyncio.subprocess.Process]]:
    """One process a log, each using units as fast as it may."""
    command = (sys.executable, "-m", "tests.ratelimit.slice_client", address, str(seconds))
    started = []
    try:
        for log in logs:
            process = await asyncio.create_subprocess_exec(*command, str(log), *USERS, stdin=asyncio.subprocess.PIPE)
            assert process.stdin is not None
            process.stdin.write(json.dumps(list(metadata_of(tenant))).encode())
            process.stdin.close()
            started.append(process)
        yield started
        for process in started:
            await process.wait()
    finally:
        for process in started:
            if process.returncode is None:
                process.kill()
                await process.wait()


def assert_within(uses: Sequence[AdmittedUse], total: rules.LimitRule, each: rules.LimitRule) -> None:
    """No window holds more than its rule allows, of all together and of each user."""
    assert most_in_any_window(uses, total.window_seconds) <= total.limit
    for user in range(len(USERS)):
        assert most_in_any_window([use for use in uses if use.user == user], each.window_seconds) <= each.limit


async def test_processes_that_are_killed_never_pass_a_limit_together(service: Service, tmp_path: Path) -> None:
    """Three processes and plain uses under two rules; one is killed with a slice in hand; every use of any window is within both."""
    total, each = rule("searches", UNIT, 2, 900), rule("each", UNIT, 1, 300, "user")
    tenant = service.tenant_with(total, each)
    logs = [tmp_path / f"log-{number}" for number in range(3)]
    address = f"127.0.0.1:{service.app.server.bound_port}"
    async with processes(tenant, address, 6.0, logs) as started:
        async with asyncio.timeout(60):
            while not (logs[0].exists() and any(use.local for use in read_log(logs[0]))):  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.01)
        started[0].kill()
    uses = [use for log in logs for use in read_log(log)]
    assert_within(uses, total, each)
    # Near a limit most uses are asked one by one; enough of them were not.
    assert sum(use.local for use in uses) > 50
    # Six seconds allow three windows of 900 at most, and the limits are used, not only kept.
    assert sum(use.quantity for use in uses) > 900


faults = st.lists(st.sampled_from(("abandon", "close", "lose", "wait", "drop")), min_size=1, max_size=3)


@settings(max_examples=6, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.integers(20, 400), st.integers(10, 200), st.integers(1, 3), faults)
async def test_clients_never_pass_a_limit_whatever_happens(
    service: Service, redis_server: RedisServer, limit: int, of_each: int, client_count: int, run: list[str]
) -> None:
    """Clients that vanish, close, or go on over a loss of data: no window holds more than its rule allows."""
    total, each = rule("searches", UNIT, 1, limit), rule("each", UNIT, 2, of_each, "user")
    tenant = service.tenant_with(total, each)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        clients = [LimitSlices(tenant.stub, metadata=metadata_of(tenant)) for _ in range(client_count)]
        async with contextlib.AsyncExitStack() as closing, asyncio.TaskGroup() as group:
            for client in clients:
                await closing.enter_async_context(client)
                for _ in range(3):
                    group.create_task(use_up(client, 0.6 * len(run) + 1.2, USERS, log))
            for fault in run:
                await asyncio.sleep(0.6)
                match fault:
                    case "abandon":
                        # As a kill: its slices are neither used any more nor given back.
                        clients[0]._lanes.clear()
                    case "close":
                        await clients[-1].close()
                    case "lose":
                        await redis_server.flush()
                    case "drop":
                        await tenant.store.store.drop(tenant.tenant_id)
        os.close(log)
        assert_within(list(read_log(path)), total, each)


async def test_a_hot_unit_is_decided_here_and_a_cold_one_there(service: Service) -> None:
    """A demand makes slices; a rare use makes none; and what is left when the block ends is given back."""
    tenant = service.tenant_with(rule("searches", UNIT, 60, 1_000_000), rule("exports", "exports", 60, 100))
    used = local = 0
    async with LimitSlices(tenant.stub, metadata=metadata_of(tenant)) as limits:
        assert not (await limits.try_use("exports")).local
        while local < 500:
            answer = await limits.try_use(UNIT, 2, user="ada")
            assert answer
            used, local = used + 2, local + answer.local
        assert not (await limits.try_use("exports")).local
    found = await tenant.limits()
    assert (found["searches"].used, found["exports"].used) == (used, 2)
    assert not (await limits.try_use(UNIT, user="ada")).local


async def test_what_stops_being_used_is_given_back(service: Service) -> None:
    """Without any other call: a while after the last use the limits count what was used and no more."""
    tenant = service.tenant_with(rule("searches", UNIT, 60, 1_000_000))
    async with LimitSlices(tenant.stub, metadata=metadata_of(tenant)) as limits:
        used = local = 0
        while local < 100:
            local += (await limits.try_use(UNIT)).local
            used += 1

        async def is_exact() -> bool:
            return (await tenant.limits())["searches"].used == used

        await eventually(is_exact)


async def test_a_refusal_says_what_the_service_says(service: Service) -> None:
    """Used up here is asked there: the rule, the wait, and False as a condition."""
    tenant = service.tenant_with(rule("searches", UNIT, 60, 50), rule("at_once", UNIT, "request", 5))
    async with LimitSlices(tenant.stub, metadata=metadata_of(tenant)) as limits:
        too_large = await limits.try_use(UNIT, 6)
        assert (bool(too_large), too_large.reason, too_large.retry_after_seconds) == (False, "REQUEST_TOO_LARGE", None)
        used = 0
        while answer := await limits.try_use(UNIT):
            used += 1
        assert (answer.reason, answer.rule, answer.local) == ("PLAN_LIMIT", "searches", False)
        assert answer.retry_after_seconds is not None
        assert 0 < answer.retry_after_seconds <= 61
        assert "searches are in use" in answer.message
    assert used <= 50
    with pytest.raises(ValueError, match="at least 1"):
        limits.try_use_locally(UNIT, 0) or await limits.try_use(UNIT, 0)


async def test_a_unit_that_is_not_sliced_is_used_all_the_same(service: Service) -> None:
    """A durable unit is consumed use by use, however high its demand."""
    tenant = service.tenant_with(rule("interviews", "ai_interviews", "month", 300))
    async with LimitSlices(tenant.stub, metadata=metadata_of(tenant)) as limits:
        answers = [await limits.try_use("ai_interviews") for _ in range(301)]
    assert [answer.admitted for answer in answers] == [True] * 300 + [False]
    assert not any(answer.local for answer in answers)


async def test_a_child_that_is_forked_holds_nothing(service: Service) -> None:
    """Only one of two copies may use a slice: the parent's."""
    tenant = service.tenant_with(rule("searches", UNIT, 60, 1_000_000))
    async with LimitSlices(tenant.stub, metadata=metadata_of(tenant)) as limits:
        while not (await limits.try_use(UNIT)).local:
            pass
        assert limits._lanes
        with warnings.catch_warnings():
            # Of threads that a child does not have: it asks one question and ends.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os._exit(1 if limits._lanes or limits.try_use_locally(UNIT) else 0)
        assert (await asyncio.to_thread(os.waitpid, child, 0))[1] == 0
        assert limits._lanes
