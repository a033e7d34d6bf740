"""Units of a product: used once, under every rule of theirs, in the ledger where they must outlive the limits."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.metering.v1 import ledger_service_pb2 as ledger
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.errors import MeshError
from services.kernel.ids import ReservationId, new_uuid7
from tests.ratelimit.callers import AtService, Service, eventually
from tests.ratelimit.rules import OPEN, rule
from tests.support.stores import RedisStore as RedisServer

INTERVIEWS = rule("interviews", "ai_interviews", "cycle", 3, lifting_plan="pro")
EXPORTS = rule("exports", "exports", 60, 3)


async def refusal(tenant: AtService, unit: str, quantity: int = 1, **options: object) -> MeshError:
    """The refusal of a use."""
    with pytest.raises(MeshError) as caught:
        await tenant.consume(unit, quantity, **options)  # type: ignore[arg-type] # fields of the message
    return caught.value


async def test_a_durable_use_is_in_the_ledger_before_it_is_answered(service: Service) -> None:
    """One interview is one entry; more than the plan has is refused with the plan that has more."""
    tenant = service.tenant_with(INTERVIEWS, rule("each", "ai_interviews", "day", 2, "user"))
    consumption_id = new_uuid7()
    answer = await tenant.consume("ai_interviews", 2, id=consumption_id, user="ada")
    entry = service.peer.ledger.of(tenant.tenant_id).calls[consumption_id.bytes]
    assert (entry.product_unit, entry.quantity, entry.user, entry.epoch) == ("ai_interviews", 2, "ada", 1)
    assert {status.rule: (status.used, status.remaining) for status in answer.limits} == {"interviews": (2, 1), "each": (2, 0)}
    assert (await refusal(tenant, "ai_interviews", 1, user="ada")).metadata["rule"] == "each"
    error = await refusal(tenant, "ai_interviews", 2)
    assert (error.reason_name, error.metadata["lifting_plan"], error.metadata["used"]) == ("PLAN_LIMIT", "pro", "2")
    assert len(service.peer.ledger.of(tenant.tenant_id).calls) == 1


async def test_a_repeated_use_is_used_once(service: Service) -> None:
    """However often it is sent, before and after its commit: the same answer and one use. Another content is a conflict."""
    tenant = service.tenant_with(INTERVIEWS, EXPORTS)
    for unit in ("ai_interviews", "exports"):
        consumption_id = new_uuid7()
        for _ in range(3):
            await tenant.consume(unit, 2, id=consumption_id)
        if unit == "ai_interviews":
            assert await tenant.settled(consumption_id, 0) == messages.COMMIT_OUTCOME_DONE
            await tenant.consume(unit, 2, id=consumption_id)
        with pytest.raises(MeshError) as caught:
            await tenant.consume(unit, 1, id=consumption_id)
        assert caught.value.reason_name == "CONTENT_CONFLICT"
    assert {name: status.used for name, status in (await tenant.limits()).items()} == {"interviews": 2, "exports": 2}


async def test_a_use_that_was_recorded_long_ago_is_still_known(service: Service) -> None:
    """Idempotency lasts as long as the ledger: the limits have forgotten it, the ledger has not, and nothing more is used."""
    tenant = service.tenant_with(INTERVIEWS)
    consumption_id = new_uuid7()
    await tenant.consume("ai_interviews", id=consumption_id)
    await tenant.settled(consumption_id, 0)
    old = ReservationId(new_uuid7(consumption_time(-300)))
    service.peer.ledger.of(tenant.tenant_id).calls[old.bytes] = service.peer.ledger.of(tenant.tenant_id).calls[consumption_id.bytes]
    await tenant.consume("ai_interviews", id=old)
    assert (await refusal(tenant, "ai_interviews", id=new_uuid7(consumption_time(-300)))).reason_name == "RESERVATION_LOST"
    assert (await tenant.limits())["interviews"].used == 1


async def test_a_lost_answer_of_the_ledger_loses_no_use(service: Service) -> None:
    """The ledger has it, the caller was told nothing: repeated it is one use, and left alone the fence leaves it to its commit."""
    tenant = service.tenant_with(INTERVIEWS)
    await tenant.limits()
    consumption_id = new_uuid7()
    service.peer.ledger.silent = True
    assert (await refusal(tenant, "ai_interviews", id=consumption_id)).code.name == "UNAVAILABLE"
    service.peer.ledger.silent = False
    assert (await tenant.limits())["interviews"].used == 1
    await tenant.store.end_lease(consumption_id)
    await refusal(tenant, "ai_interviews", 3)
    assert await tenant.store.state(consumption_id) == "held"
    await tenant.settled(consumption_id, 0)
    assert (await tenant.limits())["interviews"].used == 1


async def test_a_use_that_never_reached_the_ledger_is_given_back(service: Service) -> None:
    """A replica that died between hold and record leaves nothing: the fence's tombstone ends the hold and refuses the late record."""
    tenant = service.tenant_with(INTERVIEWS)
    await tenant.limits()
    consumption_id = new_uuid7()
    service.peer.ledger.fence_answers[consumption_id.bytes] = ledger.FENCE_OUTCOME_VOID
    service.peer.ledger.silent = True
    await refusal(tenant, "ai_interviews", 3, id=consumption_id)
    service.peer.ledger.silent = False
    await tenant.store.end_lease(consumption_id)
    await tenant.consume("ai_interviews", 3)


async def test_twenty_at_once_use_what_there_is(service: Service) -> None:
    """Concurrent uses never pass the limit, and none is refused that fits."""
    tenant = service.tenant_with(INTERVIEWS)

    async def one() -> bool:
        try:
            await tenant.consume("ai_interviews")
        except MeshError:
            return False
        return True

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one()) for _ in range(20)]
    assert sum(task.result() for task in tasks) == 3


async def test_what_the_plan_does_not_have_cannot_be_used(service: Service) -> None:
    """A unit without a rule is no part of the plan: FEATURE, not a limit of 0."""
    tenant = service.tenant_with(INTERVIEWS)
    error = await refusal(tenant, "audio_seconds")
    assert (error.code.name, error.reason_name, error.metadata["feature"]) == ("PERMISSION_DENIED", "FEATURE", "audio_seconds")


async def test_a_unit_is_checked_and_listed_like_a_call(service: Service) -> None:
    """Check answers for units what Consume would, and changes nothing; ListLimits lists their rules after those of calls."""
    tenant = service.tenant_with(rule("day", "tokens", "day", 10), INTERVIEWS)
    await tenant.consume("ai_interviews", 2)
    request = messages.CheckRequest(product_unit="ai_interviews", quantity=2)
    before = await tenant.store.dump()
    answer = await service.inference.unary(tenant.stub.Check, request, timeout_seconds=5, tenant=tenant.context)
    assert (answer.admitted, answer.refusing_rule, answer.refusal.reason, answer.refusal.lifting_plan) == (
        False,
        "interviews",
        "PLAN_LIMIT",
        "pro",
    )
    assert await tenant.store.dump() == before
    assert list(await tenant.limits()) == ["day", "interviews"]


async def test_durable_units_come_back_from_the_ledger(service: Service, redis_server: RedisServer) -> None:
    """After a loss of all data as much is left as before it."""
    tenant = service.tenant_with(INTERVIEWS, rule("each", "ai_interviews", 60, 2, "user"))
    await tenant.consume("ai_interviews", 2, user="ada")
    await redis_server.flush()
    assert (await tenant.limits(user="ada"))["interviews"].used == 2
    assert (await refusal(tenant, "ai_interviews", 1, user="ada")).metadata["rule"] == "each"
    await tenant.consume("ai_interviews", 1, user="bob")
    await refusal(tenant, "ai_interviews", 1, user="bob")


async def test_after_a_loss_a_volatile_rule_is_full_for_one_window_unless_it_is_open(service: Service, redis_server: RedisServer) -> None:
    """Nobody knows what was used: closed, a rule waits its window out; open, it starts anew."""
    tenant = service.tenant_with(rule("closed", "exports", 2, 3), rule("open", "searches", 2, 3, on_store_failure=OPEN))
    await tenant.consume("exports")
    await tenant.consume("searches")
    await redis_server.flush()
    await tenant.consume("searches", 3)
    error = await refusal(tenant, "exports")
    assert error.retry_after_seconds is not None
    assert 0 < error.retry_after_seconds <= 2

    async def admitted() -> bool:
        try:
            await tenant.consume("exports", 3)
        except MeshError:
            return False
        return True

    await eventually(admitted)


def consumption_time(seconds: float) -> datetime:
    """A time so far from now."""
    return datetime.now(UTC) + timedelta(seconds=seconds)


@pytest.mark.parametrize("running", [rule("running", "running", "running", 1), rule("running", "running", "running", 1, "user")])
async def test_a_use_under_way_is_no_running_call(service: Service, running: rules.LimitRule) -> None:
    """A durable use is a hold until the ledger's outbox ends it, and takes no slot of the calls that may run at the same time."""
    tenant = service.tenant_with(running, rule("interviews", "interviews", "day", 10))
    await tenant.consume("interviews", user="ada")
    held = await tenant.reserve(user="ada")
    assert {status.rule: status.used for status in held.limits} == {"running": 1}
    with pytest.raises(MeshError) as caught:
        await tenant.reserve(user="ada")
    assert caught.value.reason_name == "CONCURRENCY"
