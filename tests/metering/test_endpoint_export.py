"""Use is told to the operator's endpoint as CloudEvents: everything that is recorded, under its own id, without names of people."""

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from pydantic import SecretStr

from mesh.metering.v1 import export_sink_service_pb2 as pb
from services.kernel.errors import Unavailable
from services.kernel.webhook_sender import WebhookSender
from services.metering.adapters.export_endpoint import ExportEndpoint
from services.metering.adapters.postgres_export_outbox import PostgresExportOutbox
from services.metering.exports.outgoing import Outgoing, Sink, Teller
from tests.metering.billing import use_tokens, use_units
from tests.metering.events import event, record, register, reverse
from tests.metering.export_receivers import CUT, SECRET_KEY, SIGNING_SECRET, SILENT, EndpointFake, StripeFake, served
from tests.metering.mesh import MODEL, Mesh, mesh_of_its_own, running_mesh, unknown
from tests.metering.peers import Peers
from tests.metering.replicas import running_replicas
from tests.metering.rerating import RIGHT, as_operator, load_versions, order, seen
from tests.metering.telling import ENDPOINT, ask, customer, tell, waiting
from tests.support.stores import PostgresStore
from tests.support.waiting import eventually

RECONCILE = "SELECT metering.reconcile_call($1, $2, uuidv7(), 70, 0, 0, 0, 0, 70000, 'report')"

RECORD_UNIT = """
WITH used AS (
    INSERT INTO metering.calls (tenant_id, reservation_id, state, live, open_epoch, reserve_time, feature, user_name, prompt_version,
        product_unit, quantity, end_time, settled_epoch, entry_id, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens,
        cache_write_1h_tokens, cost_nano_usd)
    VALUES ($1, uuidv7(), 2, true, 0, now(), '', '', '', 'ai_interviews', 1, now(), 0, uuidv7(), 0, 0, 0, 0, 0, 0)
    RETURNING tenant_id, reservation_id, entry_id, product_unit, quantity, reserve_time, end_time
)
INSERT INTO metering.unit_entries (tenant_id, reservation_id, entry_id, product_unit, quantity, reserve_time, record_time, epoch)
SELECT u.tenant_id, u.reservation_id, u.entry_id, u.product_unit, u.quantity, u.reserve_time, u.end_time, 0 FROM used u
"""


@pytest.fixture(scope="module")
async def mesh(postgres: PostgresStore, peers: Peers) -> AsyncIterator[Mesh]:
    """A service on a database of its own, whose endpoint is turned on and told by the tests themselves."""
    async with mesh_of_its_own(postgres, peers) as running:
        await register(running)
        await ask(running, None, "SetEndpointExport", pb.SetEndpointExportRequest(is_on=True))
        yield running


@pytest.fixture
async def endpoint() -> AsyncIterator[EndpointFake]:
    """The fake."""
    fake = EndpointFake()
    async with served(fake):
        yield fake


@pytest.fixture
async def tellers(mesh: Mesh, endpoint: EndpointFake) -> AsyncIterator[Mapping[Sink, Teller]]:
    """The kernel's sender, in front of the fake."""
    sender, outbox = WebhookSender(private_addresses=True, timeout_seconds=1.0), PostgresExportOutbox(mesh.app.jobs)
    yield {Sink.ENDPOINT: ExportEndpoint(sender, outbox, f"{endpoint.url}/", SIGNING_SECRET.encode(), region="eu-west")}
    await sender.close()


async def test_whatever_is_recorded_is_told_as_a_cloud_event(mesh: Mesh, endpoint: EndpointFake, tellers: Mapping[Sink, Teller]) -> None:
    """Settled and reconciled calls, uses of units, events and reversals: with the ledger's id and figures, and no user or metadata."""
    tenant, now = mesh.new_tenant(), datetime.now(UTC).replace(microsecond=0)
    await use_tokens(mesh, tenant, now - timedelta(hours=4), [120])
    await use_units(mesh, tenant, now - timedelta(hours=3), quantity=7)
    taken_back = event("told-1", time=now - timedelta(hours=2), quantity=3, metadata={"who": "someone"})
    await record(mesh, tenant, [taken_back])
    await reverse(mesh, tenant, taken_back)
    interrupted = await mesh.opened(tenant, reserve_time=now)
    await mesh.void(unknown(interrupted.ref))
    await mesh.admin.execute(
        "UPDATE metering.calls SET dispatch_deadline = now() - interval '2 minutes' WHERE tenant_id = $1 AND state = 4", tenant.id
    )
    await mesh.app.jobs.call(RECONCILE, tenant.id, UUID(bytes=interrupted.ref.reservation_id))
    await tell(mesh, tellers)
    told = endpoint.of(tenant.id)
    assert sorted((item["type"], item["data"].get("quantity", item["data"].get("cost_nano_usd"))) for item in told) == [
        ("call.reconciled", 70_000), ("call.settled", 600_000), ("event.recorded", 3), ("event.reversed", -3), ("units.used", 7),
    ]  # fmt: skip
    for item in told:
        assert item["specversion"] == "1.0" and item["source"] == "tenantry/eu-west" and item["subject"] == str(tenant.id)
        assert item["id"] in (item["data"].get("entry_id"), item["data"].get("event_id")) and item["time"].endswith("Z")
        assert "user-1" not in str(item) and "someone" not in str(item)
    (settled,) = (item["data"] for item in told if item["type"] == "call.settled")
    assert (settled["model"], settled["output_tokens"], settled["feature"], settled["number"]) == (MODEL, 120, "chat", 1)
    back, there = sorted((item["data"] for item in told if "event_id" in item["data"]), key=lambda data: data["quantity"])
    assert back["reverses"] == there["event_id"] and there["id"] == "told-1" and await waiting(mesh, None) == []


async def test_a_corrected_price_is_an_adjustment_without_tokens(
    mesh: Mesh, endpoint: EndpointFake, tellers: Mapping[Sink, Teller]
) -> None:
    """It has the right version, the difference of the cost and the id of the re-rating; calls that were not rated anew have none."""
    await load_versions(mesh)
    tenant = mesh.new_tenant()
    await use_tokens(mesh, tenant, datetime.now(UTC), [120])
    wanted = await seen(mesh, tenant, order())
    answer = await as_operator(mesh, tenant, "RerateUsage", wanted)
    await tell(mesh, tellers)
    (settled, adjusted) = sorted(endpoint.of(tenant.id), key=lambda item: item["data"]["number"])
    assert (settled["type"], adjusted["type"]) == ("call.settled", "call.adjusted") and "rerating_id" not in settled["data"]
    data = adjusted["data"]
    assert (data["rerating_id"], data["price_version"], data["cost_nano_usd"]) == (wanted.rerating_id, RIGHT, answer.difference.nano_usd)
    assert {data[name] for name in data if name.endswith("_tokens")} == {0} and data["reservation_id"] == settled["data"]["reservation_id"]


@pytest.mark.parametrize("outcome", [500, 404, CUT, SILENT])
async def test_whatever_fails_is_told_again_the_same(
    mesh: Mesh, endpoint: EndpointFake, tellers: Mapping[Sink, Teller], outcome: int
) -> None:
    """The receiver gets everything, at least once, and each repeat with the same id and the same body."""
    tenant = mesh.new_tenant()
    endpoint.trouble = lambda identifier, number: outcome if number == 1 else 0
    for quantity in (1, 2, 3):
        await use_units(mesh, tenant, datetime.now(UTC), quantity=quantity)
    await tell(mesh, tellers)
    assert [item["data"]["quantity"] for item in endpoint.of(tenant.id)] == [1, 2, 3]
    assert set(endpoint.requests.values()) == {2} and all(len(bodies) == 1 for bodies in endpoint.bodies.values())


class _Faltering(PostgresExportOutbox):
    """Cannot read the first record that it is asked for, once."""

    failures = 0

    async def read(self, item: Outgoing) -> Mapping[str, object] | None:
        self.failures += 1
        if self.failures == 1:
            raise Unavailable("postgres")
        return await super().read(item)


async def test_a_record_that_cannot_be_read_now_disturbs_no_other(mesh: Mesh, endpoint: EndpointFake) -> None:
    """What is told beside it is told once and forgotten; it is told itself when its lease has ended."""
    tenant = mesh.new_tenant()
    for quantity in (1, 2, 3):
        await use_units(mesh, tenant, datetime.now(UTC), quantity=quantity)
    sender, outbox = WebhookSender(private_addresses=True), _Faltering(mesh.app.jobs)
    tellers = {Sink.ENDPOINT: ExportEndpoint(sender, outbox, f"{endpoint.url}/", SIGNING_SECRET.encode(), region="eu-west")}
    await tell(mesh, tellers, rounds=1)
    assert len(endpoint.of(tenant.id)) == 2 and len(await waiting(mesh, tenant)) == 1
    await mesh.admin.execute("UPDATE metering.export_outbox SET lease_until = now() WHERE tenant_id = $1", tenant.id)
    await tell(mesh, tellers)
    await sender.close()
    assert sorted(item["data"]["quantity"] for item in endpoint.of(tenant.id)) == [1, 2, 3] and set(endpoint.requests.values()) == {1}


async def test_a_receiver_that_hangs_holds_up_itself_alone(mesh: Mesh, endpoint: EndpointFake, peers: Peers) -> None:
    """Each receiver has a loop of its own: Stripe is told while the endpoint does not answer."""
    tenant, name = await customer(mesh)
    await ask(mesh, None, "SetStripeMeter", pb.SetStripeMeterRequest(meter="ai_interviews", event_name="interviews"))
    endpoint.trouble = lambda identifier, number: SILENT
    settings = {
        "export_endpoint_url": f"{endpoint.url}/",
        "export_endpoint_secret": SecretStr(SIGNING_SECRET),
        "stripe_secret_key": SecretStr(SECRET_KEY),
        "export_poll_seconds": 0.05,
    }
    async with served(stripe := StripeFake()):
        two = await running_mesh(
            str(mesh.settings.postgres_admin_dsn.get_secret_value()), peers, mesh.admin, stripe_url=stripe.url, **settings
        )
        try:
            assert {"export_relay_stripe", "export_relay_endpoint"} <= set(two.app.background.running())
            await use_units(mesh, tenant, datetime.now(UTC), quantity=5)
            await eventually(lambda: _told(stripe, name), within_seconds=60)
        finally:
            await two.close()
    await mesh.admin.execute("DELETE FROM metering.export_outbox WHERE tenant_id = $1", tenant.id)


async def _told(stripe: StripeFake, name: str) -> bool:
    return len(stripe.of(name)) == 1


async def test_an_endpoint_that_is_off_is_told_nothing(mesh: Mesh, endpoint: EndpointFake, tellers: Mapping[Sink, Teller]) -> None:
    """What was recorded while it was on is still told; what is recorded while it is off never is."""
    tenant = mesh.new_tenant()
    await use_units(mesh, tenant, datetime.now(UTC), quantity=1)
    await ask(mesh, None, "SetEndpointExport", pb.SetEndpointExportRequest())
    await use_units(mesh, tenant, datetime.now(UTC), quantity=2)
    await ask(mesh, None, "SetEndpointExport", pb.SetEndpointExportRequest(is_on=True))
    await use_units(mesh, tenant, datetime.now(UTC), quantity=3)
    await tell(mesh, tellers)
    assert [item["data"]["quantity"] for item in endpoint.of(tenant.id)] == [1, 3]
    assert (await ask(mesh, None, "GetExportSinks", pb.GetExportSinksRequest())).is_endpoint_on


async def test_a_record_that_is_rolled_back_is_not_told(mesh: Mesh) -> None:
    """The outbox is written in the transaction of the record."""
    tenant = mesh.new_tenant()
    async with mesh.admin.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(RECORD_UNIT, tenant.id)
        assert await connection.fetchval("SELECT count(*) FROM metering.export_outbox WHERE tenant_id = $1", tenant.id) == 1
        await transaction.rollback()
    assert await waiting(mesh, tenant) == []


async def test_a_process_killed_while_it_tells_loses_nothing(
    mesh: Mesh, endpoint: EndpointFake, tellers: Mapping[Sink, Teller], tmp_path: Path
) -> None:
    """A replica is killed with requests under way: what was not answered is told again under its id, and nothing is missing."""
    tenant = mesh.new_tenant()
    endpoint.trouble = lambda identifier, number: SILENT if number == 1 else 0
    settings = {"export_endpoint_url": f"{endpoint.url}/", "export_endpoint_secret": SIGNING_SECRET, "export_poll_seconds": 0.05}
    for quantity in range(1, 41):
        await use_units(mesh, tenant, datetime.now(UTC), quantity=quantity)
    async with running_replicas(mesh, tmp_path, 1, **settings) as (replica,):
        await eventually(lambda: _sent(endpoint), within_seconds=60)
        await replica.kill()
    endpoint.trouble = lambda identifier, number: 0
    # The leases of whoever died lapse; nobody waits for the minute here.
    await mesh.admin.execute("UPDATE metering.export_outbox SET lease_until = now() WHERE lease_until IS NOT NULL")
    await tell(mesh, tellers)
    assert sorted(item["data"]["quantity"] for item in endpoint.of(tenant.id)) == list(range(1, 41))
    assert len(endpoint.bodies) == 40 and await waiting(mesh, tenant, ENDPOINT) == []


async def _sent(endpoint: EndpointFake) -> bool:
    return len(endpoint.received) >= 32
