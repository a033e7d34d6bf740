"""The service through its contract: Reserve, Renew, Release, Commit, Check and ListLimits over gRPC."""

import pytest

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from tests.ratelimit.callers import Service


async def test_exactly_six_of_twenty_concurrent_reservations_of_75_fit_500(service: Service) -> None:
    """Concurrent reservations never hold more than the limit together, and none is refused that fits."""
    tenant = service.tenant_with(tokens_per_day=500)
    answers = await tenant.reserve_many(20, tokens=75)
    refusals = [answer for answer in answers if isinstance(answer, MeshError)]
    assert len(refusals) == 14
    assert {error.reason_name for error in refusals} == {"PLAN_LIMIT"}
    assert (await tenant.limits())["tokens_per_day"].used == 450


async def test_a_settled_call_gives_back_what_it_did_not_use(service: Service) -> None:
    """A commit turns the hold into what was really used, and frees the slot."""
    tenant = service.tenant_with(tokens_per_minute=100, cost_nano_usd_per_month=1000, concurrent_calls=1)
    reservation_id = new_uuid7()
    held = await tenant.reserve(80, 700, id=reservation_id)
    assert await tenant.settled(reservation_id, 30, 200, epoch=held.epoch) == messages.COMMIT_OUTCOME_DONE
    limits = await tenant.limits()
    assert [limits[rule].used for rule in ("tokens_per_minute", "cost_nano_usd_per_month", "concurrent_calls")] == [30, 200, 0]


async def test_a_hold_tells_its_epoch_time_lease_and_what_is_left(service: Service) -> None:
    """The answer carries what the ledger needs to open the call and what the caller may show."""
    tenant = service.tenant_with(requests_per_minute=10, concurrent_calls=3)
    held = await tenant.reserve(5)
    assert (held.epoch, held.lease.ToSeconds()) == (1, 5)
    assert [(item.rule, item.limit, item.used, item.remaining) for item in held.limits] == [
        ("requests_per_minute", 10, 1, 9),
        ("concurrent_calls", 3, 1, 2),
    ]
    assert held.limits[0].reset_time.ToMicroseconds() == held.reserve_time.ToMicroseconds() + 60_000_000
    assert not held.limits[1].HasField("reset_time")


async def test_a_repeated_call_gets_the_same_answer(service: Service) -> None:
    """A caller that lost the answer repeats the call and gets it."""
    tenant = service.tenant_with(tokens_per_day=100, concurrent_calls=1)
    reservation_id = new_uuid7()
    assert await tenant.reserve(100, id=reservation_id) == await tenant.reserve(100, id=reservation_id)


async def test_a_refusal_explains_itself_on_the_wire(service: Service) -> None:
    """The caller learns rule, figures, wait and what to do."""
    tenant = service.tenant_with(requests_per_minute=1)
    await tenant.reserve()
    with pytest.raises(MeshError) as refused:
        await tenant.reserve()
    error = refused.value
    assert (error.code.name, error.reason_name) == ("RESOURCE_EXHAUSTED", "PLAN_LIMIT")
    assert {key: error.metadata[key] for key in ("rule", "limit", "used", "remaining")} == {
        "rule": "requests_per_minute",
        "limit": "1",
        "used": "1",
        "remaining": "0",
    }
    assert "reset_time" in error.metadata
    assert error.metadata["decide_time"] < error.metadata["reset_time"]
    assert error.retry_after_seconds is not None
    assert 50 < error.retry_after_seconds <= 60
    assert error.quota_violations


async def test_check_answers_what_reserve_would_and_changes_nothing(service: Service) -> None:
    """A look costs nothing: no counter moves, admitted or not."""
    tenant = service.tenant_with(tokens_per_minute=100)
    await tenant.reserve(60)
    before = await tenant.store.dump()

    async def check(tokens: int) -> messages.CheckResponse:
        request = messages.CheckRequest(amounts=messages.Amounts(tokens=tokens))
        return await service.inference.unary(tenant.stub.Check, request, timeout_seconds=5, tenant=tenant.context)

    assert (await check(40)).admitted
    refused = await check(41)
    assert (refused.admitted, refused.refusing_rule) == (False, "tokens_per_minute")
    assert 50 < refused.retry_after.ToMilliseconds() / 1000 <= 60
    too_large = await check(101)
    assert not too_large.HasField("retry_after")
    await tenant.limits()
    assert await tenant.store.dump() == before


async def test_released_and_unknown_reservations_are_lost_to_renewal(service: Service) -> None:
    """Renew names every reservation that does not live, and only those."""
    tenant = service.tenant_with(requests_per_minute=10)
    alive, released, unknown = new_uuid7(), new_uuid7(), new_uuid7()
    held = await tenant.reserve(id=alive)
    await tenant.reserve(id=released)
    request = messages.ReleaseRequest(reservation_id=str(released), epoch=held.epoch)
    for _ in range(2):
        await service.inference.unary(tenant.stub.Release, request, timeout_seconds=5, tenant=tenant.context)
    refs = [messages.ReservationRef(tenant_id=tenant.tenant_id.bytes, reservation_id=each.bytes) for each in (alive, released, unknown)]
    answer = await service.inference.unary(tenant.stub.Renew, messages.RenewRequest(reservations=refs), timeout_seconds=5)
    assert list(answer.lost) == refs[1:]


async def test_bad_input_is_refused_by_name(service: Service) -> None:
    """What breaks the contract is INVALID_ARGUMENT and reaches no counter."""
    tenant = service.tenant_with(requests_per_minute=10)
    for reservation_id, tokens, cost in (
        ("no uuid", 1, 1),
        ("3fa85f64-5717-4562-b3fc-2c963f66afa6", 1, 1),
        (str(new_uuid7()), -1, 1),
        (str(new_uuid7()), 10_000_001, 1),
        (str(new_uuid7()), 1, 10**15 + 1),
    ):
        with pytest.raises(MeshError) as refused:
            await tenant.reserve(tokens, cost, id=reservation_id)
        assert refused.value.code.name == "INVALID_ARGUMENT"
    assert set(await tenant.store.dump()) == {None}


async def test_only_metering_commits_and_only_inference_reserves(service: Service) -> None:
    """The contract's callers are enforced."""
    tenant = service.tenant_with(requests_per_minute=10)
    with pytest.raises(MeshError) as refused:
        await service.metering.unary(
            tenant.stub.Reserve, messages.ReserveRequest(reservation_id=str(new_uuid7())), timeout_seconds=5, tenant=tenant.context
        )
    assert refused.value.reason_name == "CALLER_NOT_ALLOWED"
    with pytest.raises(MeshError) as refused:
        await service.inference.unary(tenant.stub.Commit, messages.CommitRequest(), timeout_seconds=5)
    assert refused.value.reason_name == "CALLER_NOT_ALLOWED"


async def test_tenants_do_not_share_counters(service: Service) -> None:
    """One tenant's use leaves another's untouched, even under the same reservation id."""
    first, second = service.tenant_with(tokens_per_day=100), service.tenant_with(tokens_per_day=100)
    reservation_id = new_uuid7()
    await first.reserve(100, id=reservation_id)
    assert (await second.limits())["tokens_per_day"].used == 0
    await second.reserve(100, id=reservation_id)
