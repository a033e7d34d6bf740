"""Units of a product: used once, under every rule of theirs, in the ledger where they must outlive the limits."""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.metering.v1 import ledger_service_pb2 as ledger
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from mesh.tenant.v1.tenant_service_pb2 import TenantConfig
from services.kernel.errors import MeshError
from services.kernel.ids import ReservationId, new_uuid7
from services.ratelimit.adapters.tenant_rules import terms_of
from tests.ratelimit.callers import AtService, AtStore, Service, eventually
from tests.ratelimit.oracle import LONGEST_SLICE_US
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


@pytest.mark.parametrize("unit", ["ai_interviews", "exports"])
async def test_a_use_repeated_for_somebody_else_takes_nothing_back(service: Service, unit: str) -> None:
    """An id is one use of one user and feature: for another it is a conflict, before its commit and after it, and the use stays counted."""
    tenant = service.tenant_with(INTERVIEWS, EXPORTS)
    consumption_id = new_uuid7()
    await tenant.consume(unit, 2, id=consumption_id, user="ada", feature="chat")
    for others in ({"user": "bob", "feature": "chat"}, {"user": "ada", "feature": "search"}, {}):
        assert (await refusal(tenant, unit, 2, id=consumption_id, **others)).reason_name == "CONTENT_CONFLICT"
    assert await tenant.settled(consumption_id, 0) == messages.COMMIT_OUTCOME_DONE
    assert (await refusal(tenant, unit, 2, id=consumption_id, user="bob")).reason_name == "CONTENT_CONFLICT"
    assert {status.used for name, status in (await tenant.limits()).items() if unit.endswith(name)} == {2}


async def test_a_use_that_waits_for_its_commit_is_no_running_call(service: Service) -> None:
    """Calls that run are calls: however many uses the ledger has just been told of, a call finds its slot free."""
    tenant = service.tenant_with(INTERVIEWS, rule("running", "running", "running", 1), rule("each", "running", "running", 1, "user"))
    await tenant.consume("ai_interviews", user="ada")
    await tenant.consume("ai_interviews", user="ada")
    assert (await tenant.limits(user="ada"))["running"].used == 0
    await tenant.reserve(user="ada")
    assert {name: status.used for name, status in (await tenant.limits(user="ada")).items() if name != "interviews"} == {
        "running": 1,
        "each": 1,
    }


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
    assert (await tenant.limits())["interviews"].used == 3


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
    request = messages.CheckRequest(product_unit="audio_seconds", quantity=1)
    with pytest.raises(MeshError) as caught:
        await service.inference.unary(tenant.stub.Check, request, timeout_seconds=5, tenant=tenant.context)
    assert (caught.value.code.name, caught.value.reason_name) == ("PERMISSION_DENIED", "FEATURE")


async def test_a_rule_of_the_tenants_own_grants_no_unit(service: Service) -> None:
    """Only a plan or an operator does: FEATURE for a use, a slice and a look; the rule is listed, and a gateway is held to it."""
    own, theirs = (
        rule("ours", unit, 60, 5, origin=origin)
        for unit, origin in (("searches", rules.LIMIT_RULE_ORIGIN_TENANT), ("exports", rules.LIMIT_RULE_ORIGIN_OPERATOR))
    )
    tenant = service.tenant_with(rule("interviews", "ai_interviews", 60, 10), own, theirs)
    assert (await refusal(tenant, "searches")).reason_name == "FEATURE"
    slice_of = messages.TakeSliceRequest(slice_id=str(new_uuid7()), product_unit="searches", quantity=1)
    look = messages.CheckRequest(product_unit="searches", quantity=1)
    for method, request in ((tenant.stub.TakeSlice, slice_of), (tenant.stub.Check, look)):
        with pytest.raises(MeshError) as caught:
            await service.inference.unary(method, request, timeout_seconds=5, tenant=tenant.context)
        assert (caught.value.code.name, caught.value.reason_name) == ("PERMISSION_DENIED", "FEATURE")
    assert "ours" in await tenant.limits()
    await tenant.consume("exports")
    narrowed = service.tenant_with(
        rule("interviews", "ai_interviews", 60, 10), rule("ours", "ai_interviews", 60, 1, origin=rules.LIMIT_RULE_ORIGIN_TENANT)
    )
    await narrowed.consume("ai_interviews")
    assert (await refusal(narrowed, "ai_interviews")).metadata["rule"] == "ours"


async def test_a_tenants_own_rule_is_named_as_its_own(service: Service) -> None:
    """No plan lifts what a tenant put on itself, and one of 0 takes no unit out of the plan: the sentence says what to change."""
    day = rule("interviews", "ai_interviews", "day", 10, lifting_plan="pro")
    for limit, quantity in ((0, 1), (1, 1), (1, 2)):
        own = rule("ours", "ai_interviews", 60, limit, origin=rules.LIMIT_RULE_ORIGIN_TENANT)
        tenant = service.tenant_with(day, own)
        if quantity <= limit:
            await tenant.consume("ai_interviews")
        error = await refusal(tenant, "ai_interviews", quantity)
        assert (error.reason_name, error.metadata["rule"]) == ("PLAN_LIMIT", "ours")
        assert error.message.endswith("or change the tenant's own rule ours.")


async def test_what_is_wrong_is_named_by_the_requests_own_fields(service: Service) -> None:
    """A use has a consumption_id and a quantity, a slice a slice_id: neither has a reservation or amounts."""
    tenant = service.tenant_with(EXPORTS, rule("at_once", "exports", "request", 2))
    too_much = await refusal(tenant, "exports", 3)
    assert (too_much.reason_name, too_much.metadata["field"]) == ("REQUEST_TOO_LARGE", "quantity")
    ahead = uuid7_at(time.time() + 600)
    for unusable in (uuid4(), ahead):
        assert (await refusal(tenant, "exports", id=unusable)).metadata["field"] == "consumption_id"
        with pytest.raises(MeshError) as caught:
            request = messages.TakeSliceRequest(slice_id=str(unusable), product_unit="exports", quantity=1)
            await service.inference.unary(tenant.stub.TakeSlice, request, timeout_seconds=5, tenant=tenant.context)
        assert caught.value.metadata["field"] == "slice_id"
    old = await refusal(tenant, "exports", id=uuid7_at(time.time() - 600))
    assert (old.reason_name, old.message.split(":")[0]) == ("RESERVATION_LOST", "the consumption id is older than 60 s")


@pytest.mark.parametrize("field", ["user", "feature"])
async def test_a_name_that_the_ledger_cannot_keep_holds_nothing(service: Service, field: str) -> None:
    """It is refused by its field before anything is counted: a hold for it would keep good uses out until its lease ends."""
    tenant = service.tenant_with(INTERVIEWS)
    await tenant.consume("ai_interviews")
    before = await tenant.store.dump()
    error = await refusal(tenant, "ai_interviews", **{field: "a\x00b"})
    assert (error.reason_name, error.metadata["field"]) == ("INVALID_REQUEST", field)
    assert await tenant.store.dump() == before


def uuid7_at(seconds: float) -> UUID:
    """An id that was made then."""
    return UUID(int=int(seconds * 1000) << 80 | new_uuid7().int & (1 << 80) - 1)


async def test_a_feature_that_is_switched_off_is_refused_as_one(service: Service) -> None:
    """A rule that allows nothing of a unit is no limit that is used up: FEATURE, with the plan that has it, and nothing to wait for."""
    tenant = service.tenant_with(rule("ai_interviews", "ai_interviews", "cycle", 0, lifting_plan="pro"))
    error = await refusal(tenant, "ai_interviews")
    assert (error.code.name, error.reason_name) == ("PERMISSION_DENIED", "FEATURE")
    assert error.metadata == {"feature": "ai_interviews", "lifting_plan": "pro"}
    assert error.message == 'The plan does not include ai interviews: move to the plan "pro".'


async def test_a_feature_without_a_limit_is_used_and_recorded(service: Service) -> None:
    """What a plan has without limit is no less a part of it, and is in the ledger for the plan that comes next, which may limit it."""
    tenant = service.tenant_with(rule("day", "tokens", "day", 10))
    told = rules.LimitRules(rules=[rule("day", "tokens", "day", 10)])
    tenant.context = service.peer.tenants.context(tenant.tenant_id, told, 2, {"ai_interviews": 0})
    consumption_id = new_uuid7()
    for _ in range(2):
        assert not (await tenant.consume("ai_interviews", 2, id=consumption_id)).limits
    assert service.peer.ledger.of(tenant.tenant_id).calls[consumption_id.bytes].quantity == 2
    assert await tenant.settled(consumption_id, 0) == messages.COMMIT_OUTCOME_DONE
    assert (await refusal(tenant, "audio_seconds")).reason_name == "FEATURE"
    tenant.context = service.peer.tenants.context(tenant.tenant_id, rules.LimitRules(rules=[INTERVIEWS]), 3, {"ai_interviews": 3})
    assert (await tenant.limits())["interviews"].used == 2


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


async def test_a_change_of_other_rules_forgets_no_volatile_use_and_refuses_nobody(service: Service) -> None:
    """Rules of other windows are loaded from the ledger; what only the limits have counted goes on as it was."""
    tenant = service.tenant_with(EXPORTS, INTERVIEWS)
    await tenant.consume("exports", 2)
    await tenant.consume("ai_interviews", 1)
    told = rules.LimitRules(rules=[EXPORTS, INTERVIEWS, rule("interviews_a_day", "ai_interviews", "day", 9)])
    tenant.context = service.peer.tenants.context(tenant.tenant_id, told, 2)
    await tenant.consume("exports", 1)
    assert (await refusal(tenant, "exports")).metadata["used"] == "3"
    limits = await tenant.limits()
    assert (limits["interviews"].used, limits["interviews_a_day"].used) == (1, 1)


async def test_a_use_repeated_across_a_change_of_rules_is_used_once(service: Service) -> None:
    """Its answer is remembered whatever rules come and go, also where the unit becomes durable; another's use of that id is a conflict."""
    tenant = service.tenant_with(EXPORTS, INTERVIEWS)
    first, durable = new_uuid7(), new_uuid7()
    await tenant.consume("exports", 1, id=first, user="ada")
    await tenant.consume("ai_interviews", 1, id=durable)
    others = [
        [EXPORTS, INTERVIEWS, rule("a_day", "exports", "day", 9)],
        [EXPORTS, INTERVIEWS],
        [EXPORTS, INTERVIEWS, rule("m", "tokens", 7, 9)],
    ]
    for version, told in enumerate(others, 2):
        tenant.context = service.peer.tenants.context(tenant.tenant_id, rules.LimitRules(rules=told), version)
        await tenant.consume("exports", 1, id=first, user="ada")
        await tenant.consume("ai_interviews", 1, id=durable)
        assert (await refusal(tenant, "exports", 1, id=first, user="bob")).reason_name == "CONTENT_CONFLICT"
        limits = await tenant.limits()
        assert (limits["exports"].used, limits["interviews"].used) == (1, 1)
    assert service.peer.ledger.epoch_count == 4
    exported = [
        fields["reservation_id"] async for kind, fields in tenant.store.stores.records.export(tenant.tenant_id) if kind == "redis:uses"
    ]
    assert exported == [str(first)]
    assert (await tenant.store.stores.records.erase(tenant.tenant_id))["uses"] == 1


async def test_answers_that_outlived_a_change_of_rules_are_forgotten_in_time(at_store: Callable[..., AtStore]) -> None:
    """Once nobody can repeat them any more, by the sweep: nothing is kept for good."""
    tenant = await at_store(forget_seconds=0.3).loaded()
    tenant.terms = terms_of(TenantConfig(version=2, limit_rules=rules.LimitRules(rules=[EXPORTS])))
    await tenant.loaded()
    used = new_uuid7()
    await tenant.use("exports", id=used)
    key = f"{{{tenant.tenant_id}}}:uses"
    tenant.terms = terms_of(TenantConfig(version=3, limit_rules=rules.LimitRules(rules=[EXPORTS, rule("m", "tokens", 7, 9)])))
    tenant.epoch = 2
    await tenant.loaded()
    assert await tenant.link.send("HKEYS", key) == [used.bytes]

    async def is_forgotten() -> bool:
        await tenant.store.expired([tenant.tenant_id], 10)
        return await tenant.link.send("EXISTS", key) == 0

    await eventually(is_forgotten)


async def test_a_rule_that_makes_a_unit_durable_and_goes_again_gives_nothing_back(service: Service) -> None:
    """Whoever adds and removes rules of a unit in turn gets no more of it: a window holds what was used, whoever has it, once."""
    tenant = service.tenant_with(EXPORTS)
    await tenant.consume("exports", 1)
    with_day = [EXPORTS, rule("exports_a_day", "exports", "day", 9), rule("exports_in_30_s", "exports", 30, 9)]
    for version, (told, used) in enumerate([(with_day, 1), ([EXPORTS], 2), (with_day, 2), ([EXPORTS], 2)], 2):
        tenant.context = service.peer.tenants.context(tenant.tenant_id, rules.LimitRules(rules=told), version)
        assert (await tenant.limits())["exports"].used == used
        if version == 2:
            recorded = new_uuid7()
            await tenant.consume("exports", 1, id=recorded)
            await tenant.settled(recorded, 0)
    await tenant.consume("exports", 1)
    assert (await refusal(tenant, "exports")).metadata["used"] == "3"


async def test_after_a_loss_a_volatile_rule_is_full_for_one_window_unless_it_is_open(service: Service, redis_server: RedisServer) -> None:
    """Nobody knows what was used: closed, a rule waits its window out, and as long as a slice may live; open, it starts anew."""
    tenant = service.tenant_with(rule("closed", "exports", 2, 3), rule("open", "searches", 2, 3, on_store_failure=OPEN))
    await tenant.consume("exports")
    await tenant.consume("searches")
    await redis_server.flush()
    await tenant.consume("searches", 3)
    error = await refusal(tenant, "exports")
    assert error.retry_after_seconds is not None
    assert 2 < error.retry_after_seconds <= 2 + LONGEST_SLICE_US / 1e6

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
