"""The guard against abuse: who goes on after refusals, or is tried with wrong credentials, is kept out for a while, at every replica."""

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from mesh.ratelimit.v1.rate_limit_service_pb2_grpc import RateLimitServiceStub
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from services.ratelimit.adapters.tenant_scripts import KINDS
from services.ratelimit.packing import unpacked
from tests.ratelimit.callers import AtService, AtStore, Service, eventually, running_service
from tests.ratelimit.rules import rule
from tests.ratelimit.scripted_peer import OPERATOR_KEY, running_peer
from tests.support.stores import RedisStore as RedisServer

GUARD = KINDS.index("guard")


def tenant_of(service: Service, *, refusals: int = 0, failures: int = 0, first: int = 60, most: int = 600, limit: int = 1) -> AtService:
    """A tenant of one request a minute, and with this guard."""
    guard = rules.AbuseGuard(refusals_per_minute=refusals, auth_failures_per_minute=failures, first_seconds=first, most_seconds=most)
    told = rules.LimitRules(rules=[rule("rate", "requests", 60, limit)], abuse_guard=guard)
    at_store = AtStore(service.stores, service.link)
    stub = RateLimitServiceStub(service.inference.channel)
    context = service.peer.tenants.context(at_store.tenant_id, told)
    return AtService(stub, service.inference, service.metering, service.tenant, context, at_store)


def at(tenant: AtService, service: Service) -> AtService:
    """The same tenant, called at another replica."""
    stub = RateLimitServiceStub(service.inference.channel)
    return AtService(stub, service.inference, service.metering, service.tenant, tenant.context, tenant.store)


async def reason(tenant: AtService) -> MeshError | None:
    """What keeps a call out; None when nothing does."""
    try:
        await tenant.reserve()
    except MeshError as error:
        return error
    return None


async def is_kept_out(tenant: AtService) -> bool:
    """Whether the guard keeps a call out."""
    error = await reason(tenant)
    return error is not None and error.reason_name == "ABUSE_GUARD"


async def refuse(tenant: AtService, times: int) -> list[str]:
    """Presses on; the reasons of the refusals in order."""
    return [error.reason_name for _ in range(times) if (error := await reason(tenant)) is not None]


async def report(tenant: AtService, failures: int) -> None:
    """Tells of failed authentications, as the tenant service does."""
    item = messages.AbuseReport(tenant_id=tenant.tenant_id.bytes, auth_failures=failures)
    stub = RateLimitServiceStub(tenant.tenant.channel)
    await tenant.tenant.unary(stub.ReportAbuse, messages.ReportAbuseRequest(reports=[item]), timeout_seconds=5)


async def guard_of(tenant: AtService) -> dict[str, bytes]:
    """What is kept of the guard."""
    flat = await tenant.store.link.send("HGETALL", f"{{{tenant.tenant_id}}}:guard")
    assert isinstance(flat, list)
    return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}


@pytest.fixture
async def replicas(redis_server: RedisServer) -> AsyncIterator[tuple[Service, Service]]:
    """Two processes' worth of the service on one store, with the same peers."""
    async with (
        running_peer() as peer,
        running_service(redis_server.url, peer, redis_timeout_seconds=2.0) as one,
        running_service(redis_server.url, peer, redis_timeout_seconds=2.0) as other,
    ):
        yield one, other


async def test_refusals_beyond_the_rule_open_the_guard_at_every_replica(replicas: tuple[Service, Service]) -> None:
    """Three refusals are borne and the fourth opens it; then calls are refused as abuse, with cause and time, wherever they arrive."""
    one, other = replicas
    tenant = tenant_of(one, refusals=3)
    assert await refuse(tenant, 5) == ["PLAN_LIMIT"] * 4
    error = await reason(tenant)
    assert error is not None
    assert (error.code, error.reason_name, error.metadata["cause"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ABUSE_GUARD", "REFUSALS")
    assert error.retry_after_seconds is not None
    assert 55 < error.retry_after_seconds <= 60
    assert "reset_time" in error.metadata
    # The first call there may be decided before it has looked; then it knows.
    await eventually(lambda: is_kept_out(at(tenant, other)))


async def test_refusals_are_added_up_over_all_replicas(replicas: tuple[Service, Service]) -> None:
    """A tenant refused in turns at two replicas is kept out after as many refusals as at one: none counts for itself alone."""
    one, other = replicas
    first = tenant_of(one, refusals=8)
    places = [first, at(first, other)]
    await first.reserve()
    for turn in range(8):
        assert await refuse(places[turn % 2], 1) == ["PLAN_LIMIT"]
    # What a replica was refused is told within a moment, as each has fewer than would open it.
    await eventually(lambda: counts(first, 8))
    assert not await is_open(first)
    assert await refuse(places[1], 1) == ["PLAN_LIMIT"]
    await eventually(lambda: is_open(first))
    for tenant in places:
        await eventually(lambda tenant=tenant: is_kept_out(tenant))  # type: ignore[misc] # bound at once


async def counts(tenant: AtService, refusals: int) -> bool:
    """Whether the store has counted so many refusals."""
    packed = (await guard_of(tenant)).get("refusals")
    return packed is not None and sum(unpacked(packed)[1::2]) == refusals  # type: ignore[index,arg-type] # seconds and numbers by turns


async def is_open(tenant: AtService) -> bool:
    """Whether the store has it open."""
    return "until_us" in await guard_of(tenant)


async def test_refusals_change_the_guards_key_and_no_other(service: Service) -> None:
    """However many: what is counted of them lies in the guard alone, in a field that does not grow with their number."""
    tenant, reservation_id = tenant_of(service, refusals=1_000_000), new_uuid7()
    await tenant.reserve(id=reservation_id)
    # Of an ended call nothing changes by the passing of time, while a lease would end on a slow machine.
    await tenant.settled(reservation_id, 1)
    before = await tenant.store.dump()
    assert before[GUARD] is None
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(refuse(tenant, 20))
    await eventually(lambda: counts(tenant, 400))
    after = await tenant.store.dump()
    assert after[GUARD] is not None
    assert after[:GUARD] + after[GUARD + 1 :] == before[:GUARD] + before[GUARD + 1 :]
    assert list(await guard_of(tenant)) == ["refusals"]
    assert 0 < int(str(await tenant.store.link.send("PTTL", f"{{{tenant.tenant_id}}}:guard"))) <= 61_000


async def test_a_look_says_that_the_guard_keeps_a_call_out(service: Service) -> None:
    """Check answers what a call would be told, though every rule has room: not admitted, why, and when to come again."""
    tenant = tenant_of(service, refusals=1, limit=2)
    await tenant.reserve()

    async def look() -> messages.CheckResponse:
        request = messages.CheckRequest(amounts=messages.Amounts(tokens=1))
        return await service.inference.unary(tenant.stub.Check, request, timeout_seconds=5, tenant=tenant.context)

    assert (await look()).admitted
    await tenant.reserve()
    await refuse(tenant, 2)
    assert await is_kept_out(tenant)
    answer = await look()
    assert (answer.admitted, answer.refusing_rule, answer.refusal.reason) == (False, "", "ABUSE_GUARD")
    assert "is kept out for" in answer.refusal.message
    assert not answer.refusal.HasField("status")
    assert 0 < answer.retry_after.ToMicroseconds() / 1e6 <= 60


async def test_what_runs_goes_on_while_the_guard_is_open(service: Service) -> None:
    """Renewing, extending, settling and letting go are never guarded, and ListLimits shows until when the rest is."""
    tenant = tenant_of(service, refusals=1, limit=2)
    running, other = new_uuid7(), new_uuid7()
    await tenant.reserve(10, id=running)
    await tenant.reserve(10, id=other)
    await refuse(tenant, 2)
    assert await is_kept_out(tenant)
    refs = [messages.ReservationRef(tenant_id=tenant.tenant_id.bytes, reservation_id=running.bytes)]
    renewed = await service.inference.unary(tenant.stub.Renew, messages.RenewRequest(reservations=refs), timeout_seconds=5)
    assert not renewed.lost
    assert (await tenant.extend(running, 20)).granted.tokens == 20
    assert await tenant.settled(running, 15) == messages.COMMIT_OUTCOME_DONE
    release = messages.ReleaseRequest(reservation_id=str(other), epoch=1)
    await service.inference.unary(tenant.stub.Release, release, timeout_seconds=5, tenant=tenant.context)
    response = await service.inference.unary(tenant.stub.ListLimits, messages.ListLimitsRequest(), timeout_seconds=5, tenant=tenant.context)
    assert 55 < response.guarded_until_time.ToMicroseconds() / 1e6 - time.time() <= 60


async def test_the_guard_closes_by_itself_and_opens_for_twice_as_long(service: Service) -> None:
    """Each opening within an hour of the last end doubles, up to the most."""
    tenant = tenant_of(service, refusals=1, first=1, most=3)
    lengths = []
    for _ in range(3):
        await refuse(tenant, 3)

        async def is_open() -> bool:
            return await is_kept_out(tenant)

        await eventually(is_open)
        lengths.append(int((await guard_of(tenant))["length_us"]) // 1_000_000)

        async def is_closed() -> bool:
            error = await reason(tenant)
            return error is None or error.reason_name != "ABUSE_GUARD"

        await eventually(is_closed)
    assert lengths == [1, 2, 3]


async def test_failed_authentications_open_the_guard(service: Service) -> None:
    """What the tenant service reports is added up over a minute, whichever replica it told."""
    tenant = tenant_of(service, failures=5, limit=1000)
    await tenant.reserve()
    await report(tenant, 3)
    await report(tenant, 2)
    assert not await is_kept_out(tenant)
    await report(tenant, 1)
    await eventually(lambda: is_kept_out(tenant))
    error = await reason(tenant)
    assert error is not None
    assert error.metadata["cause"] == "AUTH_FAILURES"


async def test_a_tenant_without_guard_is_never_kept_out(service: Service) -> None:
    """No guard, or one of zeros: refusals stay refusals, and nothing of it is kept but what was reported, for a minute."""
    tenant = tenant_of(service)
    assert set(await refuse(tenant, 30)) == {"PLAN_LIMIT"}
    assert await guard_of(tenant) == {}
    await report(tenant, 1000)
    assert set(await refuse(tenant, 5)) == {"PLAN_LIMIT"}


async def test_an_operator_lifts_the_guard(service: Service) -> None:
    """Lifted, it is forgotten, and who lifted it is in the tenant's audit log; others than operators are refused."""
    tenant = tenant_of(service, refusals=1)
    await refuse(tenant, 3)
    assert await is_kept_out(tenant)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.app.server.bound_port}") as channel:
        stub = RateLimitServiceStub(channel)
        metadata = [("authorization", f"Bearer {OPERATOR_KEY}"), ("x-tenant-id", str(tenant.tenant_id)), ("x-operator-reason", "a mistake")]
        lifted = await stub.LiftGuard(messages.LiftGuardRequest(), metadata=metadata, timeout=5)
        assert lifted.was_open
        again = await stub.LiftGuard(messages.LiftGuardRequest(), metadata=metadata, timeout=5)
        assert not again.was_open
    assert [(item.tenant_id, item.action) for item in service.peer.tenants.audited] == [(tenant.tenant_id.bytes, "ABUSE_GUARD_LIFTED")] * 2
    assert not await is_kept_out(tenant)
    with pytest.raises(MeshError) as refused:
        await service.inference.unary(tenant.stub.LiftGuard, messages.LiftGuardRequest(), timeout_seconds=5, tenant=tenant.context)
    assert refused.value.code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)


async def test_a_rebuild_does_not_lift_the_guard(service: Service) -> None:
    """Counters that are lost and come back leave the guard as it was."""
    tenant = tenant_of(service, refusals=1)
    await refuse(tenant, 3)
    await service.link.send("DEL", f"{{{tenant.tenant_id}}}:meta")
    assert await is_kept_out(tenant)
    await tenant.limits()
    assert await guard_of(tenant) != {}
