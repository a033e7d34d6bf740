"""Use is told to Stripe's meters once, whatever fails on the way: by a fake of its endpoint over HTTP, which knows identifiers again."""

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from mesh.metering.v1 import event_service_pb2 as events_pb
from mesh.metering.v1 import export_sink_service_pb2 as pb
from services.kernel.errors import MeshError
from services.kernel.ids import TenantId, new_uuid7
from services.metering.adapters.stripe_meter_events import StripeMeterEvents
from services.metering.exports.meters import METERS_OF_CALLS
from services.metering.exports.outgoing import Outgoing, OutgoingKey, Sink, Source, Teller, TellFailed
from services.metering.exports.stripe_windows import refuse_out_of_window
from tests.metering.billing import use_tokens, use_units
from tests.metering.events import event, record, register, reverse
from tests.metering.export_receivers import CUT, NO_JSON, NO_TEXT, SECRET_KEY, SILENT, StripeFake, served
from tests.metering.mesh import Mesh, mesh_of_its_own
from tests.metering.peers import Peers
from tests.metering.replicas import running_replicas
from tests.metering.rerating import load_versions, order, rerated
from tests.metering.telling import METERS, STRIPE, ask, customer, tell, waiting
from tests.metering.usage import fold
from tests.support.stores import PostgresStore
from tests.support.waiting import eventually

HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
async def mesh(postgres: PostgresStore, peers: Peers) -> AsyncIterator[Mesh]:
    """A service on a database of its own, whose exports the tests tell themselves; some of our meters are Stripe's."""
    async with mesh_of_its_own(postgres, peers) as running:
        await register(running)
        await register(running, "told.count", unit="told_counted", aggregation=events_pb.AGGREGATION_COUNT)
        await register(running, "told.level", unit="told_level", aggregation=events_pb.AGGREGATION_MAX)
        for meter, name in METERS.items():
            await ask(running, None, "SetStripeMeter", pb.SetStripeMeterRequest(meter=meter, event_name=name))
        yield running


@pytest.fixture
async def stripe() -> AsyncIterator[StripeFake]:
    """The fake."""
    fake = StripeFake()
    async with served(fake):
        yield fake


@pytest.fixture
async def tellers(stripe: StripeFake) -> AsyncIterator[Mapping[Sink, Teller]]:
    """Stripe's own library, in front of the fake."""
    teller = StripeMeterEvents(SECRET_KEY, stripe.url, timeout_seconds=1.0)
    yield {Sink.STRIPE: teller}
    await teller.close()


@pytest.mark.parametrize("outcome", [NO_JSON, NO_TEXT, SILENT, CUT])
async def test_what_stripe_may_have_taken_is_known_as_that(stripe: StripeFake, tellers: Mapping[Sink, Teller], outcome: int) -> None:
    """Accepted, and answered with nothing that can be read: whoever tells it again has to mind how long Stripe knows it."""
    stripe.trouble = lambda identifier, number: outcome
    now = datetime.now(UTC)
    key = OutgoingKey(TenantId(new_uuid7()), Sink.STRIPE, new_uuid7(), "ai_interviews")
    with pytest.raises(TellFailed) as failed:
        await tellers[Sink.STRIPE].tell(Outgoing(key, Source.UNIT, "interviews", "cus_1", 5, now, now, new_uuid7(), 1, None))
    assert failed.value.may_have_arrived and not failed.value.is_final and list(stripe.taken) == [str(key.usage_id)]


async def test_what_a_customer_used_is_told_on_the_meters_that_are_set(
    mesh: Mesh, stripe: StripeFake, tellers: Mapping[Sink, Teller]
) -> None:
    """Calls, units and events, each under its own id in the ledger; of nobody else, on no other meter, and then nothing waits any more."""
    (tenant, name), other, now = await customer(mesh), mesh.new_tenant(), datetime.now(UTC).replace(microsecond=0)
    await use_tokens(mesh, tenant, now - 3 * HOUR, [120])
    await use_units(mesh, tenant, now - 2 * HOUR, quantity=7)
    await use_units(mesh, tenant, now - 2 * HOUR, quantity=7, unit="of_no_meter")
    await use_units(mesh, other, now)
    await record(mesh, tenant, [event(time=now - HOUR, quantity=3), event(time=now, type="told.count", quantity=50)])
    await tell(mesh, tellers)
    told = [(item["event_name"], item["payload[value]"], int(item["timestamp"])) for item in stripe.of(name)]
    assert told == [
        ("number_of_calls", "1", int((now - 3 * HOUR).timestamp())),
        ("tokens_of_calls", "120", int((now - 3 * HOUR).timestamp())),
        ("interviews", "7", int((now - 2 * HOUR).timestamp())),
        ("interviews", "3", int((now - HOUR).timestamp())),
        ("counted", "1", int(now.timestamp())),
    ]
    (entry,) = await mesh.admin.fetch("SELECT entry_id FROM metering.entries WHERE tenant_id = $1", tenant.id)
    (unit, _) = await mesh.admin.fetch("SELECT entry_id FROM metering.unit_entries WHERE tenant_id = $1 ORDER BY product_unit", tenant.id)
    ids = {item["identifier"] for item in stripe.of(name)}
    assert {f"{entry['entry_id']}.calls.tokens", f"{entry['entry_id']}.calls.count", str(unit["entry_id"])} <= ids
    assert len(stripe.taken) == 5 and await waiting(mesh, None) == []


async def test_what_is_taken_back_is_told_as_less(mesh: Mesh, stripe: StripeFake, tellers: Mapping[Sink, Teller]) -> None:
    """A reversal is the same quantity below zero, of a counted event one less; a level cannot be taken back there, and is not told."""
    tenant, name = await customer(mesh)
    gone = [event(quantity=4), event(type="told.count", quantity=9), event(type="told.level", quantity=12)]
    await record(mesh, tenant, gone)
    await reverse(mesh, tenant, *gone)
    await tell(mesh, tellers)
    told = sorted((item["event_name"], int(item["payload[value]"])) for item in stripe.of(name))
    assert told == [("counted", -1), ("counted", 1), ("interviews", -4), ("interviews", 4), ("level", 12)]


async def test_a_corrected_price_is_told_as_cost_alone(mesh: Mesh, stripe: StripeFake, tellers: Mapping[Sink, Teller]) -> None:
    """The difference of the cost, under the adjustment's own id: neither a call nor a token more."""
    await load_versions(mesh)
    tenant, name = await customer(mesh)
    await ask(mesh, None, "SetStripeMeter", pb.SetStripeMeterRequest(meter="calls.cost_nano_usd", event_name="cost"))
    try:
        await use_tokens(mesh, tenant, datetime.now(UTC), [120])
        await tell(mesh, tellers)
        before = {item["identifier"] for item in stripe.of(name)}
        answer = await rerated(mesh, tenant, order())
        await tell(mesh, tellers)
    finally:
        await ask(mesh, None, "SetStripeMeter", pb.SetStripeMeterRequest(meter="calls.cost_nano_usd"))
    told = [item for item in stripe.of(name) if item["identifier"] not in before]
    assert len(before) == 3
    assert [(item["event_name"], int(item["payload[value]"])) for item in told] == [("cost", answer.difference.nano_usd)]
    (adjusted,) = await mesh.admin.fetch("SELECT entry_id FROM metering.entries WHERE tenant_id = $1 AND kind = 3", tenant.id)
    assert told[0]["identifier"] == f"{adjusted['entry_id']}.calls.cost_nano_usd"


@pytest.mark.parametrize("outcome", [500, 503, 429, 401, CUT, SILENT])
async def test_whatever_fails_is_told_again_under_the_same_id(
    mesh: Mesh, stripe: StripeFake, tellers: Mapping[Sink, Teller], outcome: int
) -> None:
    """Down, throttling, refusing the key, cut off or silent after it had taken it: at the end Stripe has everything once."""
    tenant, name = await customer(mesh)
    stripe.trouble = lambda identifier, number: outcome if (number <= 2 and outcome != SILENT) or number <= 1 else 0
    for quantity in (1, 2, 3):
        await use_units(mesh, tenant, datetime.now(UTC), quantity=quantity)
    await tell(mesh, tellers)
    assert sorted(int(item["payload[value]"]) for item in stripe.of(name)) == [1, 2, 3]
    assert min(stripe.requests.values()) >= 2 and len(stripe.requests) == 3 and await waiting(mesh, None) == []


async def test_what_stripe_will_never_take_is_given_up_listed_and_told_again_by_hand(
    mesh: Mesh, stripe: StripeFake, tellers: Mapping[Sink, Teller]
) -> None:
    """A refusal of the event itself is final at once: operators see why, without Stripe's words, and tell it again once it is put right."""
    tenant, name = await customer(mesh)
    stripe.trouble = lambda identifier, number: 400
    for _ in range(3):
        await use_units(mesh, tenant, datetime.now(UTC), quantity=5)
    await tell(mesh, tellers)
    found = await waiting(mesh, tenant, STRIPE, dead_only=True, page_size=2)
    assert [(item.attempts, item.last_error, item.HasField("due_time")) for item in found] == [
        (1, "Stripe refused it (InvalidRequestError, 400)", False)
    ] * 3
    assert set(stripe.requests.values()) == {1} and {(item.meter, item.quantity, item.tenant_id) for item in found} == {
        ("ai_interviews", 5, str(tenant.id))
    }
    stripe.trouble = lambda identifier, number: 0
    replayed = await ask(mesh, tenant, "ReplayExports", pb.ReplayExportsRequest(sink=STRIPE))
    await tell(mesh, tellers)
    assert replayed.replayed_count == 3 and len(stripe.of(name)) == 3 and await waiting(mesh, tenant) == []


async def test_what_waits_is_listed_of_the_tenant_that_is_named(mesh: Mesh, stripe: StripeFake, tellers: Mapping[Sink, Teller]) -> None:
    """And of every tenant where none is: an operator who acts for one is told of no other."""
    (one, _), (other, _) = await customer(mesh), await customer(mesh)
    for tenant in (one, other):
        await use_units(mesh, tenant, datetime.now(UTC))
    assert {item.tenant_id for item in await waiting(mesh, one)} == {str(one.id)}
    assert {item.tenant_id for item in await waiting(mesh, None)} >= {str(one.id), str(other.id)}
    await tell(mesh, tellers)


async def test_after_many_attempts_it_is_given_up(mesh: Mesh, stripe: StripeFake, tellers: Mapping[Sink, Teller]) -> None:
    """As many as are set, with a pause after each that grows; nothing is lost."""
    tenant, _ = await customer(mesh)
    stripe.trouble = lambda identifier, number: 503
    await use_units(mesh, tenant, datetime.now(UTC))
    await tell(mesh, tellers, rounds=2, max_attempts=3)
    (item,) = await waiting(mesh, tenant)
    assert item.attempts == 2 and item.due_time.ToDatetime(UTC) > datetime.now(UTC) - timedelta(seconds=30)
    await tell(mesh, tellers, rounds=2, max_attempts=3)
    (item,) = await waiting(mesh, tenant, dead_only=True)
    assert (item.attempts, item.last_error, sum(stripe.requests.values())) == (3, "Stripe answered 503", 3)
    await mesh.admin.execute("DELETE FROM metering.export_outbox WHERE tenant_id = $1", tenant.id)


async def test_what_may_have_arrived_a_day_ago_is_not_told_again_by_itself(
    mesh: Mesh, stripe: StripeFake, tellers: Mapping[Sink, Teller]
) -> None:
    """Stripe knows ids for 24 hours: afterwards an operator looks, and only their word tells it again."""
    tenant, name = await customer(mesh)
    stripe.trouble = lambda identifier, number: CUT if number == 1 else 0
    await use_units(mesh, tenant, datetime.now(UTC))
    await tell(mesh, tellers, rounds=1)
    await mesh.admin.execute(
        "UPDATE metering.export_outbox SET send_time = send_time - interval '23 hours 1 minute' WHERE tenant_id = $1", tenant.id
    )
    await tell(mesh, tellers)
    (item,) = await waiting(mesh, tenant, dead_only=True)
    assert "23 hours" in item.last_error and sum(stripe.requests.values()) == 1
    assert (await ask(mesh, tenant, "ReplayExports", pb.ReplayExportsRequest(sink=STRIPE))).replayed_count == 0
    accepted = await ask(mesh, tenant, "ReplayExports", pb.ReplayExportsRequest(sink=STRIPE, accept_repeats=True))
    await tell(mesh, tellers)
    assert accepted.replayed_count == 1 and sum(stripe.requests.values()) == 2 and len(stripe.of(name)) == 1


def test_stripe_is_asked_only_within_its_windows() -> None:
    """35 days back, 5 minutes ahead, and 24 hours of knowing an id, each with a margin."""
    now = datetime(2026, 6, 1, tzinfo=UTC)

    def item(use_time: datetime, send_time: datetime | None = None) -> Outgoing:
        key = OutgoingKey(TenantId(new_uuid7()), Sink.STRIPE, new_uuid7(), "ai_interviews")
        return Outgoing(key, Source.UNIT, "interviews", "cus_1", 1, use_time, use_time, UUID(int=1), 1, send_time)

    for fine in (
        item(now),
        item(now - timedelta(days=34, hours=23)),
        item(now + timedelta(minutes=3)),
        item(now, now - timedelta(hours=22)),
    ):
        refuse_out_of_window(fine, now)
    for wrong, is_final in (
        (item(now - timedelta(days=35)), True),
        (item(now + HOUR), False),
        (item(now, now - timedelta(hours=24)), True),
    ):
        with pytest.raises(TellFailed) as refused:
            refuse_out_of_window(wrong, now)
        assert refused.value.is_final is is_final
        assert is_final or refused.value.pause_seconds == HOUR.total_seconds()


async def test_a_tenant_without_a_customer_is_told_no_more(mesh: Mesh, stripe: StripeFake, tellers: Mapping[Sink, Teller]) -> None:
    """What waits when the customer goes is given up; with a new one it is told to that; what is recorded meanwhile is not."""
    tenant, _ = await customer(mesh)
    await use_units(mesh, tenant, datetime.now(UTC), quantity=1)
    await ask(mesh, tenant, "SetStripeCustomer", pb.SetStripeCustomerRequest())
    await use_units(mesh, tenant, datetime.now(UTC), quantity=2)
    await tell(mesh, tellers)
    (item,) = await waiting(mesh, tenant, dead_only=True)
    assert "no Stripe customer" in item.last_error
    await ask(mesh, tenant, "SetStripeCustomer", pb.SetStripeCustomerRequest(customer_id="cus_new"))
    await ask(mesh, tenant, "ReplayExports", pb.ReplayExportsRequest(sink=STRIPE))
    await tell(mesh, tellers)
    assert [event["payload[value]"] for event in stripe.of("cus_new")] == ["1"]
    shown = await ask(mesh, tenant, "GetExportSinks", pb.GetExportSinksRequest())
    assert shown.stripe_customer_id == "cus_new" and {item.meter: item.event_name for item in shown.stripe_meters} == METERS


async def test_a_process_killed_while_it_tells_loses_nothing(
    mesh: Mesh, stripe: StripeFake, tellers: Mapping[Sink, Teller], tmp_path: Path
) -> None:
    """A replica is killed with requests that arrived and were not answered. The next one tells them again, and Stripe has each once."""
    tenant, name = await customer(mesh)
    stripe.trouble = lambda identifier, number: SILENT if number == 1 else 0
    settings = {"stripe_secret_key": SECRET_KEY, "stripe_url": stripe.url, "export_poll_seconds": 0.05}
    for quantity in range(1, 41):
        await use_units(mesh, tenant, datetime.now(UTC), quantity=quantity)
    async with running_replicas(mesh, tmp_path, 1, **settings) as (replica,):
        await eventually(lambda: _sent(stripe, 32), within_seconds=60)
        await replica.kill()
    stripe.trouble = lambda identifier, number: 0
    # The leases of whoever died lapse; nobody waits for the minute here.
    await mesh.admin.execute("UPDATE metering.export_outbox SET lease_until = now() WHERE lease_until IS NOT NULL")
    await tell(mesh, tellers)
    assert sorted(int(event["payload[value]"]) for event in stripe.of(name)) == list(range(1, 41))
    assert sorted(stripe.requests.values()) == [1] * 8 + [2] * 32 and await waiting(mesh, tenant) == []


async def _sent(stripe: StripeFake, count: int) -> bool:
    return len(stripe.taken) >= count


async def test_a_meter_that_would_never_tell_anything_is_refused(mesh: Mesh) -> None:
    """What is known is listed: meters of calls, units of events and of billing plans. One of the limits is known once a tenant used it."""
    for meter in ("calls.tokns", "ai_interviews.count", "told_typo", "calls"):
        with pytest.raises(MeshError) as refused:
            request = pb.SetStripeMeterRequest(meter=meter, event_name="never", accept_unknown_unit="." in meter)
            await ask(mesh, None, "SetStripeMeter", request)
        known = refused.value.metadata["known"].split()
        assert refused.value.reason_name == "INVALID_REQUEST" and refused.value.metadata["field"] == "meter"
        assert known == [*METERS_OF_CALLS, "ai_interviews", "audio_seconds", "told_counted", "told_level"] and known[-1] in str(
            refused.value
        )
    await set_and_ended(mesh, "audio_seconds")
    await set_and_ended(mesh, "told_expected", accept_unknown_unit=True)
    await use_units(mesh, mesh.new_tenant(), datetime.now(UTC), unit="told_used")
    await set_and_ended(mesh, "told_used")
    await fold(mesh)
    await set_and_ended(mesh, "told_used")
    kept = await ask(mesh, None, "GetExportSinks", pb.GetExportSinksRequest())
    assert {meter.meter for meter in kept.stripe_meters} == set(METERS)


async def set_and_ended(mesh: Mesh, meter: str, **parts: bool) -> None:
    """Sets a meter, and ends it: nothing has to be known for that."""
    await ask(mesh, None, "SetStripeMeter", pb.SetStripeMeterRequest(meter=meter, event_name="taken", **parts))
    await ask(mesh, None, "SetStripeMeter", pb.SetStripeMeterRequest(meter=meter))


async def test_only_operators_set_and_see_exports(mesh: Mesh) -> None:
    """A tenant's key is refused everywhere; a customer belongs to a tenant that is named; made-up page tokens are refused."""
    tenant, _ = await customer(mesh)
    for method, request in (
        ("SetStripeCustomer", pb.SetStripeCustomerRequest(customer_id="cus_x")), ("SetStripeMeter", pb.SetStripeMeterRequest(meter="x")),
        ("SetEndpointExport", pb.SetEndpointExportRequest(is_on=True)), ("GetExportSinks", pb.GetExportSinksRequest()),
        ("ListPendingExports", pb.ListPendingExportsRequest()), ("ReplayExports", pb.ReplayExportsRequest(sink=STRIPE)),
    ):  # fmt: skip
        with pytest.raises(MeshError) as refused:
            await ask(mesh, tenant, method, request, credential=f"key-{tenant.id}")
        assert refused.value.code.name == "PERMISSION_DENIED"
    for method, request in (
        ("SetStripeCustomer", pb.SetStripeCustomerRequest(customer_id="cus_x")),
        ("ListPendingExports", pb.ListPendingExportsRequest(page_token="x")),
        ("ReplayExports", pb.ReplayExportsRequest()), ("SetStripeMeter", pb.SetStripeMeterRequest()),
    ):  # fmt: skip
        with pytest.raises(MeshError) as refused:
            await ask(mesh, None, method, request)
        assert refused.value.reason_name == "INVALID_REQUEST"
