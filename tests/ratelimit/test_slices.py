"""Slices at the service: charged ahead, used until their lease ends, given back where they are in a window still."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest
from google.protobuf.duration_pb2 import Duration

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from services.ratelimit.adapters.tenant_scripts import KINDS
from tests.ratelimit.callers import AtService, Service, eventually, now_us
from tests.ratelimit.oracle import LONGEST_SLICE_US
from tests.ratelimit.rules import OPEN, SHADOW, rule
from tests.ratelimit.test_consuming import consumption_time
from tests.ratelimit.test_waiting import tickets
from tests.support.stores import RedisStore as RedisServer

SEARCHES = rule("searches", "searches", 60, 100)
WAITERS = KINDS.index("waiters")


async def take(tenant: AtService, quantity: int, *, id: UUID | None = None, unit: str = "searches", **fields: Any) -> Any:
    """Takes a slice."""
    request = messages.TakeSliceRequest(slice_id=str(id or new_uuid7()), product_unit=unit, quantity=quantity, **fields)
    return await tenant.inference.unary(tenant.stub.TakeSlice, request, timeout_seconds=5.0, tenant=tenant.context)


async def give_back(tenant: AtService, *slices: tuple[UUID, int], epoch: int = 1) -> None:
    """Gives back slices of which so much was used."""
    request = messages.ReturnSlicesRequest(
        slices=[messages.SliceReturn(slice_id=str(slice_id), epoch=epoch, used=used) for slice_id, used in slices]
    )
    await tenant.inference.unary(tenant.stub.ReturnSlices, request, timeout_seconds=5.0, tenant=tenant.context)


async def refused(tenant: AtService, quantity: int = 1, **options: Any) -> MeshError:
    """The refusal of a slice."""
    with pytest.raises(MeshError) as caught:
        await take(tenant, quantity, **options)
    return caught.value


async def used(tenant: AtService, name: str = "searches", **whose: Any) -> int:
    """What a rule counts."""
    return (await tenant.limits(**whose))[name].used


async def test_a_slice_is_charged_like_a_use(service: Service) -> None:
    """What is granted is used of every rule that applies, and the rest is what anybody else may use."""
    tenant = service.tenant_with(SEARCHES, rule("each", "searches", 60, 40, "user"))
    answer = await take(tenant, 8, user="ada")
    assert (answer.granted, answer.epoch, answer.largest_use) == (8, 1, 0)
    assert {status.rule: (status.used, status.remaining) for status in answer.limits} == {"searches": (8, 92), "each": (8, 32)}
    await tenant.consume("searches", 32, user="ada")
    with pytest.raises(MeshError):
        await tenant.consume("searches", 1, user="ada")
    assert (await used(tenant, user="ada"), await used(tenant, "each", user="ada"), await used(tenant)) == (40, 40, 40)


async def test_no_holder_gets_more_than_a_part_of_what_is_left(service: Service) -> None:
    """A quarter of what the tightest rule has left, at least 1, and nothing where nothing is left."""
    tenant = service.tenant_with(SEARCHES, rule("each", "searches", 60, 10, "user"))
    granted = [(await take(tenant, 1000, user="ada")).granted for _ in range(8)]
    assert granted == [2, 2, 1, 1, 1, 1, 1, 1]
    error = await refused(tenant, user="ada")
    assert (error.reason_name, error.metadata["rule"], error.metadata["remaining"]) == ("PLAN_LIMIT", "each", "0")
    assert (await take(tenant, 1000, user="bob")).granted == 2


async def test_a_refused_slice_writes_nothing(service: Service) -> None:
    """Every key is byte for byte as it was."""
    tenant = service.tenant_with(SEARCHES)
    await tenant.consume("searches", 100)
    before = await tenant.store.dump()
    assert (await refused(tenant, 5)).code.name == "RESOURCE_EXHAUSTED"
    assert await tenant.store.dump() == before


async def test_a_slice_counts_until_its_last_use_has_left_the_window(service: Service) -> None:
    """It may be used until its lease ends, so it is dated then: no window that holds one of its uses forgets it."""
    tenant = service.tenant_with(rule("searches", "searches", 1, 4))
    began_us = now_us()
    answer = await take(tenant, 1)
    lease_us = answer.lease.ToMicroseconds()
    assert lease_us == 125_000
    status = (await tenant.limits())["searches"]
    assert status.reset_time.ToMicroseconds() >= began_us + lease_us + 1_000_000


@pytest.mark.parametrize(
    ("window", "wanted_us", "given_us"), [(60, None, 800_000), (60, 2_000_000, 800_000), (60, 30_000, 30_000), (2, None, 250_000)]
)
async def test_a_lease_is_short(service: Service, window: int, wanted_us: int | None, given_us: int) -> None:
    """As wanted, but below a second, so that a change of the rules holds by then, and within an eighth of the window."""
    tenant = service.tenant_with(rule("searches", "searches", window, 100))
    lease = {} if wanted_us is None else {"lease": Duration(seconds=wanted_us // 1_000_000, nanos=wanted_us % 1_000_000 * 1000)}
    answer = await take(tenant, 1, **lease)
    assert answer.lease.ToMicroseconds() == given_us
    assert given_us < LONGEST_SLICE_US


async def test_what_is_given_back_is_free_at_once(service: Service) -> None:
    """What was used counts from the return on, the rest not at all; given back again, nothing changes."""
    tenant = service.tenant_with(SEARCHES, rule("each", "searches", 60, 50, "user"))
    slice_id, other = new_uuid7(), new_uuid7()
    await take(tenant, 10, id=slice_id, user="ada")
    await take(tenant, 5, id=other, user="ada")
    await give_back(tenant, (slice_id, 3), (slice_id, 0), (new_uuid7(), 7))
    assert (await used(tenant), await used(tenant, "each", user="ada")) == (8, 8)
    await give_back(tenant, (slice_id, 0), (other, 9_999))
    assert (await used(tenant), await used(tenant, "each", user="ada")) == (8, 8)
    assert (await tenant.limits())["searches"].reset_time.ToMicroseconds() <= now_us() + 60_000_000


async def test_a_return_of_another_epoch_is_ignored(service: Service) -> None:
    """It speaks of counters that are gone."""
    tenant = service.tenant_with(SEARCHES)
    slice_id = new_uuid7()
    await take(tenant, 10, id=slice_id)
    await give_back(tenant, (slice_id, 0), epoch=2)
    assert await used(tenant) == 10


async def test_a_slice_is_its_tenants_alone(service: Service) -> None:
    """Whoever names another tenant's slice gives nothing back, and takes a slice of its own under that id."""
    tenant, stranger = service.tenant_with(SEARCHES), service.tenant_with(SEARCHES)
    slice_id = new_uuid7()
    await take(tenant, 10, id=slice_id)
    await stranger.limits()
    await give_back(stranger, (slice_id, 0))
    assert (await used(tenant), await used(stranger)) == (10, 0)
    assert (await take(stranger, 3, id=slice_id)).granted == 3
    assert (await used(tenant), await used(stranger)) == (10, 3)


async def test_a_slice_that_comes_back_late_is_taken_where_it_still_counts(service: Service) -> None:
    """After the end of its lease the rest is free all the same; after the window there is nothing to give back."""
    tenant = service.tenant_with(rule("searches", "searches", 1, 100), rule("longer", "searches", 60, 100))
    slice_id = new_uuid7()
    answer = await take(tenant, 10, id=slice_id)
    await asyncio.sleep(answer.lease.ToMicroseconds() / 1e6 + 1.1)
    await give_back(tenant, (slice_id, 4))
    assert (await used(tenant), await used(tenant, "longer")) == (0, 4)


async def test_a_repeated_slice_is_the_same_with_less_of_its_lease(service: Service) -> None:
    """A lost answer is asked for again: the same units once, and the lease ends when it would have."""
    tenant = service.tenant_with(SEARCHES)
    slice_id = new_uuid7()
    first = await take(tenant, 10, id=slice_id)
    again = await take(tenant, 10, id=slice_id)
    assert (again.granted, await used(tenant)) == (10, 10)
    assert again.lease.ToMicroseconds() < first.lease.ToMicroseconds()
    assert (await refused(tenant, 11, id=slice_id)).reason_name == "CONTENT_CONFLICT"
    assert (await refused(tenant, 10, id=slice_id, user="ada")).reason_name == "CONTENT_CONFLICT"
    with pytest.raises(MeshError) as caught:
        await tenant.consume("searches", 10, id=slice_id)
    assert caught.value.reason_name == "RESERVATION_LOST"
    await give_back(tenant, (slice_id, 0))
    assert (await refused(tenant, 10, id=slice_id)).reason_name == "RESERVATION_LOST"
    assert (await refused(tenant, 10, id=new_uuid7(consumption_time(-100)))).reason_name == "RESERVATION_LOST"
    assert (await refused(tenant, 10, id=new_uuid7(consumption_time(100)))).reason_name == "INVALID_REQUEST"
    assert await used(tenant) == 0


async def test_the_id_of_a_use_is_no_slice(service: Service) -> None:
    """One id is one thing."""
    tenant = service.tenant_with(SEARCHES)
    consumption_id = new_uuid7()
    await tenant.consume("searches", 2, id=consumption_id)
    assert (await refused(tenant, 2, id=consumption_id)).reason_name == "CONTENT_CONFLICT"
    await give_back(tenant, (consumption_id, 0))
    assert await used(tenant) == 2


@pytest.mark.parametrize(
    ("cause", "limit_rule"),
    [
        ("durable", rule("day", "searches", "day", 100)),
        ("open", rule("open", "searches", 10, 100, on_store_failure=OPEN)),
        ("shadow", rule("trial", "searches", 10, 100, mode=SHADOW)),
    ],
)
async def test_some_units_are_used_one_by_one(service: Service, cause: str, limit_rule: rules.LimitRule) -> None:
    """What must be on record, what a loss forgets, and what decides by the use: the answer says to use Consume, and nothing is charged."""
    tenant = service.tenant_with(SEARCHES, limit_rule)
    await tenant.limits()
    before = await tenant.store.dump()
    error = await refused(tenant, 5)
    assert (error.code.name, error.reason_name, error.metadata["cause"]) == ("FAILED_PRECONDITION", "NOT_SLICEABLE", cause)
    assert "Consume" in error.message
    assert await tenant.store.dump() == before
    assert (await refused(tenant, 5, unit="audio_seconds")).reason_name == "FEATURE"


async def test_a_slice_says_the_largest_use(service: Service) -> None:
    """A rule of each request by itself is kept by the holder; one that allows nothing gives no slice."""
    tenant = service.tenant_with(SEARCHES, rule("at_once", "searches", "request", 7))
    assert (await take(tenant, 20)).largest_use == 7
    nothing = service.tenant_with(SEARCHES, rule("at_once", "searches", "request", 0))
    assert (await refused(nothing, 20)).reason_name == "FEATURE"


async def test_a_slice_from_before_a_loss_adds_nothing_to_what_is_admitted_after(service: Service, redis_server: RedisServer) -> None:
    """Its holder uses it until its lease ends, which is after the loss: no window in which such a use lies admits anything more."""
    tenant = service.tenant_with(rule("searches", "searches", 1, 4))
    asked_us = now_us()
    lease_us = (await take(tenant, 1)).lease.ToMicroseconds()
    last_use_us = asked_us + lease_us
    await redis_server.flush()
    while True:
        try:
            await tenant.consume("searches", 4)
        except MeshError as error:
            assert error.reason_name == "PLAN_LIMIT"
            await asyncio.sleep(0.01)
        else:
            break
    assert now_us() > last_use_us + 1_000_000
    assert (await refused(tenant)).reason_name == "PLAN_LIMIT"


async def test_a_slice_of_a_lost_epoch_is_not_given_back_to_the_next(service: Service, redis_server: RedisServer) -> None:
    """Nothing of it was loaded, so nothing of it is taken away."""
    tenant = service.tenant_with(rule("searches", "searches", 60, 100))
    slice_id = new_uuid7()
    await take(tenant, 10, id=slice_id)
    await redis_server.flush()
    await tenant.limits()
    before = await used(tenant)
    await give_back(tenant, (slice_id, 0))
    await give_back(tenant, (slice_id, 0), epoch=2)
    assert await used(tenant) == before == 100
    assert (await refused(tenant, 10, id=slice_id)).reason_name in ("PLAN_LIMIT", "RESERVATION_LOST")


async def test_an_export_and_an_erasure_know_slices(service: Service) -> None:
    """A slice is a record like others: told in words, and gone with its tenant."""
    tenant = service.tenant_with(SEARCHES)
    slice_id = new_uuid7()
    await take(tenant, 10, id=slice_id, user="ada")
    found = [fields async for kind, fields in tenant.store.stores.records.export(tenant.tenant_id) if kind == "redis:reservations"]
    assert [(item["reservation_id"], item["state"], item["quantity"], item["user"]) for item in found] == [
        (str(slice_id), "sliced", "10", "ada")
    ]
    erased = await tenant.store.stores.records.erase(tenant.tenant_id)
    assert erased["reservations"] == 1


@asynccontextmanager
async def waiting_use(tenant: AtService, quantity: int, **whose: Any) -> AsyncIterator["asyncio.Task[Any]"]:
    """A use that waits, given once its ticket stands in line."""
    request = messages.ConsumeRequest(
        consumption_id=str(new_uuid7()), product_unit="searches", quantity=quantity, max_wait=Duration(seconds=40), **whose
    )
    task = asyncio.create_task(
        tenant.inference.unary(tenant.stub.Consume, request, timeout_seconds=50.0, tenant=tenant.context)  # type: ignore[arg-type] # a coroutine
    )

    async def stands() -> bool:
        return task.done() or await tickets(tenant) > 0

    try:
        await eventually(stands)
        assert not task.done(), task.result()
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_slice_passes_nobody_who_waits(service: Service) -> None:
    """While a use waits for a rule no slice is charged to it, though it would fit; who the rule does not count gets one."""
    tenant = service.tenant_with(rule("each", "searches", 20, 10, "user"))
    await tenant.consume("searches", 5, user="ada")
    async with waiting_use(tenant, 6, user="ada"):
        before = await tenant.store.dump()
        error = await refused(tenant, user="ada")
        assert (error.code.name, error.reason_name) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert error.retry_after_seconds == 0.5
        # The line itself is prolonged by who waits.
        assert [key for place, key in enumerate(await tenant.store.dump()) if place != WAITERS] == [
            key for place, key in enumerate(before) if place != WAITERS
        ]
        assert (await take(tenant, 1, user="bob")).granted == 1
    await eventually(lambda: nobody_waits(tenant))
    assert (await take(tenant, 1, user="ada")).granted == 1


async def nobody_waits(tenant: AtService) -> bool:
    """Whether the line is empty."""
    return await tickets(tenant) == 0


async def test_what_is_given_back_wakes_who_waits(service: Service) -> None:
    """A use that waits for the window is admitted as soon as a slice comes back, by the store's clock long before the window frees."""
    tenant = service.tenant_with(rule("searches", "searches", 20, 1))
    slice_id = new_uuid7()
    await take(tenant, 1, id=slice_id)
    frees_us = (await tenant.limits())["searches"].reset_time.ToMicroseconds()
    async with waiting_use(tenant, 1) as task:
        await give_back(tenant, (slice_id, 0))
        used_us = (await task).decide_time.ToMicroseconds()
    assert used_us < frees_us
    assert await used(tenant) == 1
