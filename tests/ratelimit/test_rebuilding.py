"""Counters that are gone: refused until the ledger has been asked, then exactly what the ledger says."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mesh.metering.v1 import ledger_service_pb2 as ledger
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.errors import MeshError
from services.kernel.ids import ReservationId, new_uuid7
from services.ratelimit.adapters.redis_snapshots import record_of
from services.ratelimit.adapters.scripts import load_script
from services.ratelimit.adapters.tenant_scripts import KINDS
from services.ratelimit.limit_rule import SECOND_US
from services.ratelimit.limits import Amounts, Demand
from services.ratelimit.rebuild import Begin, CountedCall, CountedState
from services.ratelimit.request import Question
from services.ratelimit.standing import Verdict
from services.ratelimit.terms import Terms
from tests.ratelimit.callers import AtService, AtStore, Service, now_us
from tests.ratelimit.scripted_peer import LedgerCall
from tests.support.stores import RedisStore as RedisServer

LIMITS = {
    "requests_per_minute": 100,
    "tokens_per_minute": 1000,
    "tokens_per_day": 1000,
    "cost_nano_usd_per_month": 10_000,
    "concurrent_calls": 10,
}


async def figures(tenant: AtService) -> list[int]:
    """What every rule counts, in the order of the rules."""
    limits = await tenant.limits()
    return [limits[rule].used for rule in LIMITS]


def write_down(service: Service, tenant: AtService, state: ledger.CallState.ValueType, tokens: int, cost: int, seconds_ago: float) -> bytes:
    """Puts a call into the ledger, as if made before."""
    reservation_id = new_uuid7().bytes
    service.peer.ledger.of(tenant.tenant_id).calls[reservation_id] = LedgerCall(state, now_us() - int(seconds_ago * 1e6), tokens, cost, 1)
    return reservation_id


async def test_a_new_tenants_first_call_asks_the_ledger_once(service: Service) -> None:
    """Many first calls at the same time make one epoch, and all are decided."""
    tenant = service.tenant_with(**LIMITS)
    answers = await tenant.reserve_many(20, 10, 10)
    held = [answer for answer in answers if isinstance(answer, messages.ReserveResponse)]
    assert len(held) == 10
    assert {answer.epoch for answer in held} == {1}
    assert service.peer.ledger.epoch_count == 1


async def test_callers_of_one_process_share_a_slow_rebuild(service: Service) -> None:
    """However long the ledger takes, callers here wait for the one request that is under way."""
    tenant = service.tenant_with(**LIMITS)
    service.peer.ledger.gate.clear()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        calls = group.create_task(tenant.reserve_many(5, 1, 1))
        await service.peer.ledger.asked.wait()
        # As if the request were old: another process might ask again now, this one must not.
        await service.link.send("HINCRBY", f"{{{tenant.tenant_id}}}:meta", "nonce_us", -2_000_000)
        more = group.create_task(tenant.reserve_many(5, 1, 1))
        await asyncio.sleep(0.15)
        service.peer.ledger.gate.set()
    assert all(isinstance(answer, messages.ReserveResponse) for answer in (*calls.result(), *more.result()))
    assert service.peer.ledger.epoch_count == 1


async def test_lost_counters_come_back_as_the_ledger_has_them(service: Service, redis_server: RedisServer) -> None:
    """After a loss of all data the next call counts settled, open and unresolved calls as the ledger does."""
    tenant = service.tenant_with(**LIMITS)
    await tenant.reserve(5, 5)
    write_down(service, tenant, ledger.CALL_STATE_SETTLED, 100, 1000, 10)
    write_down(service, tenant, ledger.CALL_STATE_SETTLED, 200, 2000, 70)
    write_down(service, tenant, ledger.CALL_STATE_VOID, 0, 0, 5)
    opened = write_down(service, tenant, ledger.CALL_STATE_OPEN, 30, 300, 8)
    write_down(service, tenant, ledger.CALL_STATE_UNRESOLVED, 7, 70, 9)
    await redis_server.flush()
    # The hold of before the loss is unknown to the ledger: it was never opened and is gone.
    assert await figures(tenant) == [4, 137, 337, 3370, 1]
    ref = messages.ReservationRef(tenant_id=tenant.tenant_id.bytes, reservation_id=opened)
    renewed = await service.inference.unary(tenant.stub.Renew, messages.RenewRequest(reservations=[ref]), timeout_seconds=5)
    assert not renewed.lost


async def test_nothing_is_admitted_until_the_snapshot_has_loaded(service: Service, redis_server: RedisServer) -> None:
    """While the ledger has not answered, a call is told that limits are being rebuilt and when to come back."""
    tenant = service.tenant_with(**LIMITS)
    await tenant.reserve(5, 5)
    await redis_server.flush()
    service.peer.ledger.gate.clear()
    with pytest.raises(MeshError) as refused:
        await tenant.reserve(5, 5, timeout_seconds=1.0)
    assert refused.value.reason_name == "LIMITS_REBUILDING"
    assert refused.value.retry_after_seconds is not None
    service.peer.ledger.gate.set()
    assert (await tenant.reserve(5, 5)).epoch == 2


async def test_a_silent_ledger_is_told_with_a_time_to_return(service: Service) -> None:
    """A tenant without counters cannot be served without the ledger, and is told so at once."""
    tenant = service.tenant_with(**LIMITS)
    service.peer.ledger.silent = True
    with pytest.raises(MeshError) as refused:
        await tenant.reserve()
    assert refused.value.reason_name == "LIMITS_REBUILDING"
    assert refused.value.retry_after_seconds == 1.0


async def test_a_snapshot_for_another_request_is_not_loaded(service: Service) -> None:
    """Only the answer to the last request loads: an older one could miss what happened between them."""
    tenant = service.tenant_with(**LIMITS).store
    assert await tenant.begin("first") is Begin.BEGUN
    assert await tenant.begin("second") is Begin.PENDING
    key = f"{{{tenant.tenant_id}}}:meta"
    await tenant.link.send("HINCRBY", key, "nonce_us", -1_000_001)
    assert await tenant.begin("second") is Begin.BEGUN
    assert not await tenant.load("first", 1)
    assert await tenant.load("second", 2)
    assert not await tenant.load("second", 3)
    assert await tenant.begin("third") is Begin.READY


async def test_a_loss_during_a_rebuild_is_rebuilt_again(service: Service, redis_server: RedisServer) -> None:
    """A snapshot whose request was lost with the data is dropped, and another one is asked for."""
    tenant = service.tenant_with(**LIMITS)
    service.peer.ledger.gate.clear()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        first = group.create_task(tenant.reserve(5, 5))
        await service.peer.ledger.asked.wait()
        await redis_server.flush()
        service.peer.ledger.gate.set()
    assert first.result().epoch == 2
    assert service.peer.ledger.epoch_count == 2


async def test_a_commit_between_snapshot_and_load_is_counted_once(service: Service, redis_server: RedisServer) -> None:
    """Snapshot taken, call settled, commit delivered, snapshot loaded: the commit is sent again and then counts."""
    tenant = service.tenant_with(**LIMITS)
    reservation_id = new_uuid7()
    held = await tenant.reserve(100, 1000, id=reservation_id)
    service.peer.ledger.of(tenant.tenant_id).calls[reservation_id.bytes] = LedgerCall(
        ledger.CALL_STATE_OPEN, held.reserve_time.ToMicroseconds(), 100, 1000
    )
    await redis_server.flush()
    service.peer.ledger.asked.clear()
    service.peer.ledger.gate.clear()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        next_call = group.create_task(tenant.reserve(5, 5))
        await service.peer.ledger.asked.wait()
        epoch = service.peer.ledger.settle(tenant.tenant_id, reservation_id, 40, 400)
        assert await tenant.settled(reservation_id, 40, 400, epoch=epoch) == messages.COMMIT_OUTCOME_RETRY
        service.peer.ledger.gate.set()
    assert next_call.result().epoch == epoch
    assert await figures(tenant) == [2, 105, 105, 1005, 2]
    for _ in range(2):
        assert await tenant.settled(reservation_id, 40, 400, epoch=epoch) == messages.COMMIT_OUTCOME_DONE
    assert await figures(tenant) == [2, 45, 45, 405, 1]


async def test_a_commit_dropped_without_counters_is_in_the_next_snapshot(service: Service, redis_server: RedisServer) -> None:
    """Settled, data lost, commit delivered and done: the rebuild that follows counts the settlement."""
    tenant = service.tenant_with(**LIMITS)
    reservation_id = new_uuid7()
    held = await tenant.reserve(100, 1000, id=reservation_id)
    service.peer.ledger.of(tenant.tenant_id).calls[reservation_id.bytes] = LedgerCall(
        ledger.CALL_STATE_OPEN, held.reserve_time.ToMicroseconds(), 100, 1000
    )
    epoch = service.peer.ledger.settle(tenant.tenant_id, reservation_id, 40, 400)
    await redis_server.flush()
    assert await tenant.settled(reservation_id, 40, 400, epoch=epoch) == messages.COMMIT_OUTCOME_DONE
    assert await figures(tenant) == [1, 40, 40, 400, 0]


async def test_a_newer_epoch_starts_over_and_counts_what_the_ledger_has(service: Service) -> None:
    """A late request moved the ledger on: its commit makes the limits rebuild, and the settlement is counted once."""
    tenant = service.tenant_with(**LIMITS)
    reservation_id = new_uuid7()
    held = await tenant.reserve(100, 1000, id=reservation_id)
    at_ledger = service.peer.ledger.of(tenant.tenant_id)
    at_ledger.calls[reservation_id.bytes] = LedgerCall(ledger.CALL_STATE_OPEN, held.reserve_time.ToMicroseconds(), 100, 1000)
    at_ledger.epoch += 1
    epoch = service.peer.ledger.settle(tenant.tenant_id, reservation_id, 40, 400)
    await tenant.settled(reservation_id, 40, 400, epoch=epoch)
    assert await figures(tenant) == [1, 40, 40, 400, 0]
    assert await tenant.settled(reservation_id, 40, 400, epoch=epoch) == messages.COMMIT_OUTCOME_DONE
    assert await figures(tenant) == [1, 40, 40, 400, 0]


async def test_a_large_snapshot_loads(service: Service) -> None:
    """Thousands of recent calls load in parts and appear at once."""
    tenant = service.tenant_with(requests_per_minute=10_000, tokens_per_minute=10**9)
    for _ in range(3000):
        write_down(service, tenant, ledger.CALL_STATE_SETTLED, 7, 1, 20)
    limits = await tenant.limits()
    assert (limits["requests_per_minute"].used, limits["tokens_per_minute"].used) == (3000, 21_000)


async def test_a_part_of_a_snapshot_counts_once_and_only_in_its_turn(service: Service) -> None:
    """Parts of a snapshot that come again, late or for another request change nothing; before the last nothing is admitted."""
    tenant = service.tenant_with(**LIMITS).store
    await tenant.begin("first")
    keys = [f"{{{tenant.tenant_id}}}:{kind}" for kind in KINDS]
    script = load_script("load").text

    async def part(number: int, last: int, nonce: str = "first") -> object:
        reservation_id = ReservationId(new_uuid7())
        record = record_of(CountedCall(reservation_id, CountedState.SETTLED, now_us(), 10, 0), 1, tenant.terms)
        head = (nonce, 1, 5_000_000, number, last, 0, tenant.terms.families_digest, "", 0)
        return await tenant.link.send("EVAL", script, len(keys), *keys, *head, reservation_id.bytes, record)

    assert await part(0, 0) == 1
    assert await part(0, 0) == 1
    assert await part(2, 1) == 0
    assert await part(1, 0, "other") == 0
    assert (await tenant.reserve())[1].verdict is Verdict.REBUILD
    assert not await tenant.commit(ReservationId(new_uuid7()))
    assert await part(1, 1) == 1
    assert await tenant.used() == (2, 20, 0, 0, 0)
    assert await part(1, 1) == 0


async def test_a_hold_that_a_snapshot_brings_back_is_not_forgotten(at_store: Callable[..., AtStore]) -> None:
    """A change of rules finds a call open at the ledger that was let go here: it is held again, for as long as the ledger has it."""
    tenant = await at_store(forget_seconds=0.2, tokens_per_day=100).loaded()
    held = await tenant.held(10)
    await tenant.store.release(tenant.tenant_id, held, 1)
    tenant.terms, tenant.epoch = replaced_terms(tenant), 2
    await tenant.loaded(CountedCall(held, CountedState.HELD, now_us(), 10, 0))
    await asyncio.sleep(0.3)
    await tenant.store.expired([tenant.tenant_id], 10)
    assert await tenant.state(held) == "held"
    assert await tenant.commit(held, tokens=5)
    assert (await tenant.used())[2] == 5


def replaced_terms(tenant: AtStore) -> Terms:
    """The tenant's rules with one of another window: a newer configuration that needs other counters."""
    further = replace(tenant.terms.rules[0], name="further", window_us=7 * SECOND_US)
    return Terms((*tenant.terms.rules, further), version=tenant.terms.version + 1)


@pytest.mark.parametrize("with_others", [False, True])
async def test_a_loss_between_two_parts_of_a_batch_loses_no_call_of_it(
    at_store: Callable[..., AtStore], monkeypatch: pytest.MonkeyPatch, with_others: bool
) -> None:
    """More than a script decides at a time: when the counters go in between, all of it is asked again and none is told it has ended."""
    tenant = await at_store().loaded()
    run, count = tenant.stores.scripts.run, 0

    async def losing(name: str, *arguments: Any, **options: Any) -> object:
        nonlocal count
        count += 1
        # With those of other tenants the first part comes another way.
        if count == 2 - with_others:
            await tenant.lose()
        return await run(name, *arguments, **options)

    monkeypatch.setattr(tenant.stores.scripts, "run", losing)
    asks = [tenant.ask(new_uuid7(), Demand(Amounts(1, 0))) for _ in range(60)]

    async def verdicts() -> list[Verdict]:
        if not with_others:
            return [answer.verdict for answer in await tenant.store.reserve(tenant.tenant_id, tenant.terms, asks)]
        (answers,) = await tenant.store.reserve_each([Question(tenant.tenant_id, tenant.terms, asks)])
        assert not isinstance(answers, Exception)
        return [answer.verdict for answer in answers]

    assert await verdicts() == [Verdict.REBUILD] * 60
    monkeypatch.undo()
    await tenant.loaded()
    assert await verdicts() == [Verdict.HELD] * 60
