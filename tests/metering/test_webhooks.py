"""Receivers of tenants through the service: signed, at least once, later and later, then dead and sent again; secrets shown once."""

import base64
import hashlib
import hmac
import json
from uuid import UUID

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from devstack.ports import free_port
from mesh.common.v1 import error_reason_pb2 as reasons
from mesh.metering.v1 import webhook_service_pb2 as pb
from services.kernel.errors import InvalidRequest, MeshError
from services.kernel.ids import new_uuid7
from services.metering.webhooks.endpoint import refuse_address
from services.metering.webhooks.secrets import parse_seal_keys
from tests.metering.budgets import (
    WAIT_SECONDS,
    alerts,
    ask,
    data_of,
    deliveries,
    new_tenant,
    put,
    receiver_at,
    use,
    wait_delivered,
    wait_fired,
    wait_received,
)
from tests.metering.mesh import Mesh, Tenant
from tests.metering.peers import OPERATOR
from tests.support.waiting import eventually
from tests.tenant.receivers import CLOSED, Receiver, running_receiver

MAKE_DUE = "UPDATE metering.webhook_deliveries SET due_time = now() WHERE tenant_id = $1 AND state = 1"
LAST_ATTEMPT = "UPDATE metering.webhook_deliveries SET attempts = 23, due_time = now() WHERE tenant_id = $1 AND state = 1"


def signers(receiver: Receiver, *secrets: str, index: int = -1) -> list[bool]:
    """Which of the secrets signed a post, as Standard Webhooks says to check."""
    headers, body = receiver.received[index]
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    offered = headers["webhook-signature"].split(" ")
    keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets]
    return ["v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() in offered for key in keys]


async def reach(mesh: Mesh, tenant: Tenant, name: str = "budget") -> None:
    """Fires one threshold."""
    await put(mesh, tenant, name, amount=100, thresholds_percent=[100])
    await use(mesh, tenant, 150)
    await wait_fired(mesh, tenant, [100], name)


async def test_an_alert_arrives_signed_as_a_cloud_event(mesh: Mesh) -> None:
    """Its `webhook-id` is the alert's id; its data says what was reached; the delivery is listed as taken."""
    tenant, other = new_tenant(mesh), new_tenant(mesh)
    async with running_receiver() as receiver:
        made = await receiver_at(mesh, tenant, receiver.url)
        await reach(mesh, other)
        await reach(mesh, tenant)
        [delivery] = await wait_delivered(mesh, tenant, 1)
    [(headers, body)] = receiver.received
    [alert] = await alerts(mesh, tenant)
    assert signers(receiver, made.secret) == [True]
    assert headers["webhook-id"] == alert.alert_id == delivery.event_id
    event = json.loads(body)
    assert (event["specversion"], event["id"], event["type"], event["subject"]) == (
        "1.0",
        alert.alert_id,
        "budget.threshold_reached",
        str(tenant.id),
    )
    wanted = {"budget": "budget", "threshold_percent": 100, "amount": 100, "used": 150, "measure": "tokens", "action": "notify"}
    assert wanted.items() <= data_of(body).items() == json.loads(delivery.data_json).items()
    assert (delivery.attempts, delivery.last_error, delivery.endpoint_id) == (1, "", made.endpoint.endpoint_id)


@pytest.mark.parametrize("trouble", ["500", "closed", "redirect", "down"])
async def test_what_is_not_taken_is_sent_again_the_same(mesh: Mesh, trouble: str) -> None:
    """A receiver that fails, closes, points elsewhere or is not there gets the same event later: same id, same body."""
    tenant, port = new_tenant(mesh), free_port()
    if trouble == "down":
        await receiver_at(mesh, tenant, f"http://127.0.0.1:{port}/events")
        await reach(mesh, tenant)

        async def failed_once() -> bool:
            return (await deliveries(mesh, tenant))[0].last_error != ""

        await eventually(failed_once, within_seconds=WAIT_SECONDS)
        assert "127.0.0.1" not in (await deliveries(mesh, tenant))[0].last_error
    async with running_receiver(port) as receiver:
        if trouble != "down":
            receiver.statuses = [{"500": 500, "closed": CLOSED, "redirect": 307}[trouble]]
            await receiver_at(mesh, tenant, receiver.url)
            await reach(mesh, tenant)
        [delivery] = await wait_delivered(mesh, tenant, 1)
    assert delivery.attempts >= 2
    assert len({(headers["webhook-id"], body) for headers, body in receiver.received}) == 1


async def test_who_hangs_holds_up_itself_alone(mesh: Mesh) -> None:
    """While one receiver does not answer, the other one of the same tenant is told, and so are other tenants."""
    tenant = new_tenant(mesh)
    async with running_receiver() as hanging, running_receiver() as receiver:
        hanging.delay_seconds = 60.0
        await receiver_at(mesh, tenant, hanging.url)
        await receiver_at(mesh, tenant, receiver.url)
        for name in ("one", "two"):
            await reach(mesh, tenant, name)
        await wait_received(receiver, 2)
        await wait_received(hanging, 1)
        assert hanging.most_at_once == 1
        states = sorted(each.state for each in await deliveries(mesh, tenant))
        assert states.count(pb.DELIVERY_STATE_PENDING) == 2


async def test_what_is_given_up_is_kept_and_replayed(mesh: Mesh) -> None:
    """After the last attempt it is dead, with the reason; an operator or the tenant's admin sends it again."""
    tenant = new_tenant(mesh)
    async with running_receiver() as receiver:
        receiver.statuses = [500, 500]
        made = await receiver_at(mesh, tenant, receiver.url)
        await reach(mesh, tenant)

        async def is_dead() -> bool:
            await mesh.admin.execute(LAST_ATTEMPT, tenant.id)
            return [each.state for each in await deliveries(mesh, tenant)] == [pb.DELIVERY_STATE_DEAD]

        await eventually(is_dead, within_seconds=WAIT_SECONDS)
        [dead] = await deliveries(mesh, tenant)
        assert dead.last_error == "the receiver answered 500"
        receiver.statuses = []
        foreign = pb.ReplayDeliveriesRequest(delivery_ids=[dead.delivery_id])
        assert (await ask(mesh, new_tenant(mesh), "ReplayDeliveries", foreign)).replayed_count == 0
        request = pb.ReplayDeliveriesRequest(dead_of_endpoint_id=made.endpoint.endpoint_id)
        assert (await ask(mesh, tenant, "ReplayDeliveries", request, credential=OPERATOR)).replayed_count == 1
        [taken] = await wait_delivered(mesh, tenant, 1)
        assert (taken.delivery_id, taken.attempts) == (dead.delivery_id, 1)
        before = len(receiver.received)
        assert (
            await ask(mesh, tenant, "ReplayDeliveries", pb.ReplayDeliveriesRequest(delivery_ids=[dead.delivery_id]))
        ).replayed_count == 1
        await wait_received(receiver, before + 1)
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 1
    for request in (
        pb.ReplayDeliveriesRequest(),
        pb.ReplayDeliveriesRequest(delivery_ids=[str(new_uuid7())], dead_of_endpoint_id=str(new_uuid7())),
    ):
        with pytest.raises(MeshError) as refused:
            await ask(mesh, tenant, "ReplayDeliveries", request)
        assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_secret_is_shown_once_and_changed_with_an_overlap(mesh: Mesh) -> None:
    """Until the overlap ends both secrets sign, after it the new one alone; neither is in a list, nor readable in the database."""
    tenant = new_tenant(mesh)
    async with running_receiver() as receiver:
        made = await receiver_at(mesh, tenant, receiver.url)
        rotate = pb.RotateWebhookSecretRequest(endpoint_id=made.endpoint.endpoint_id, overlap=Duration(seconds=3_600))
        rotated = await ask(mesh, tenant, "RotateWebhookSecret", rotate)
        assert rotated.secret != made.secret
        await reach(mesh, tenant, "one")
        await wait_received(receiver, 1)
        assert signers(receiver, made.secret, rotated.secret) == [True, True]
        rotate.overlap.FromSeconds(0)
        last = await ask(mesh, tenant, "RotateWebhookSecret", rotate)
        await reach(mesh, tenant, "two")
        await wait_received(receiver, 2)
        assert signers(receiver, made.secret, rotated.secret, last.secret) == [False, False, True]
    listed = await ask(mesh, tenant, "ListWebhookEndpoints", pb.ListWebhookEndpointsRequest())
    assert [each.endpoint_id for each in listed.endpoints] == [made.endpoint.endpoint_id]
    [row] = await mesh.admin.fetch("SELECT * FROM metering.webhook_endpoints WHERE tenant_id = $1", tenant.id)
    for secret in (made.secret, rotated.secret, last.secret):
        key = secret.removeprefix("whsec_")
        assert key not in str(listed)
        assert key.encode() not in row["secret"]
        assert base64.b64decode(key) not in row["secret"]


@pytest.mark.parametrize("of_one_tenant", [False, True])
async def test_a_secret_moved_to_another_row_opens_nothing(mesh: Mesh, of_one_tenant: bool) -> None:
    """A sealed secret belongs to its tenant and receiver: put into another row nothing is signed with it and nothing is sent."""
    tenant = new_tenant(mesh)
    thief = tenant if of_one_tenant else new_tenant(mesh)
    async with running_receiver() as receiver:
        owner = await receiver_at(mesh, tenant, f"http://127.0.0.1:{free_port()}/events")
        moved = await receiver_at(mesh, thief, receiver.url)
        await mesh.admin.execute(
            "UPDATE metering.webhook_endpoints SET secret = (SELECT secret FROM metering.webhook_endpoints WHERE endpoint_id = $1) "
            "WHERE endpoint_id = $2",
            UUID(owner.endpoint.endpoint_id),
            UUID(moved.endpoint.endpoint_id),
        )
        await reach(mesh, thief)

        told: list[pb.Delivery] = []

        async def tried_once() -> bool:
            told[:] = [each for each in await deliveries(mesh, thief) if each.endpoint_id == moved.endpoint.endpoint_id]
            return bool(told) and (told[0].last_error != "" or told[0].state == pb.DELIVERY_STATE_DELIVERED)

        await eventually(tried_once, within_seconds=WAIT_SECONDS)
        assert told[0].last_error == "the receiver's secret does not open under the keys configured"
        assert receiver.received == []


async def test_a_removed_receiver_is_sent_nothing_more(mesh: Mesh) -> None:
    """Its deliveries go with it; the alert stays; removing it again changes nothing, and another tenant's is not touched."""
    tenant = new_tenant(mesh)
    made = await receiver_at(mesh, tenant, f"http://127.0.0.1:{free_port()}/events")
    await reach(mesh, tenant)
    assert len(await deliveries(mesh, tenant)) == 1
    remove = pb.DeleteWebhookEndpointRequest(endpoint_id=made.endpoint.endpoint_id)
    await ask(mesh, new_tenant(mesh), "DeleteWebhookEndpoint", remove)
    assert len(await deliveries(mesh, tenant)) == 1
    for _ in range(2):
        await ask(mesh, tenant, "DeleteWebhookEndpoint", remove)
    assert await deliveries(mesh, tenant) == []
    assert len(await alerts(mesh, tenant)) == 1
    with pytest.raises(MeshError) as refused:
        await ask(mesh, tenant, "RotateWebhookSecret", pb.RotateWebhookSecretRequest(endpoint_id=made.endpoint.endpoint_id))
    assert refused.value.reason == reasons.ERROR_REASON_NOT_FOUND


async def test_receivers_are_an_admins_and_ten_at_most(mesh: Mesh) -> None:
    """Who only reads usage neither makes nor sees them; the eleventh is refused by its rule."""
    tenant = new_tenant(mesh)
    for method, request in (
        ("CreateWebhookEndpoint", pb.CreateWebhookEndpointRequest(url="https://hooks.example/x")),
        ("ListWebhookEndpoints", pb.ListWebhookEndpointsRequest()),
        ("ListDeliveries", pb.ListDeliveriesRequest()),
    ):
        with pytest.raises(MeshError) as refused:
            await ask(mesh, tenant, method, request, credential=f"key-{tenant.id}")
        assert refused.value.reason == reasons.ERROR_REASON_SCOPE_MISSING
    for number in range(10):
        await receiver_at(mesh, tenant, f"https://hooks.example/{number}")
    with pytest.raises(MeshError) as refused:
        await receiver_at(mesh, tenant, "https://hooks.example/10")
    assert refused.value.metadata["rule"] == "webhook_endpoints"


async def test_deliveries_page_by_state_and_receiver(mesh: Mesh) -> None:
    """A page goes on where the one before ended; the filters hold; a token of another filter is refused."""
    tenant = new_tenant(mesh)
    async with running_receiver() as receiver:
        made = await receiver_at(mesh, tenant, receiver.url)
        await put(mesh, tenant, thresholds_percent=[10, 20, 30])
        await use(mesh, tenant, 1_000)
        await wait_delivered(mesh, tenant, 3)
    asked = pb.ListDeliveriesRequest(state=pb.DELIVERY_STATE_DELIVERED, endpoint_id=made.endpoint.endpoint_id, page_size=2)
    first = await ask(mesh, tenant, "ListDeliveries", asked)
    asked.page_token = first.next_page_token
    second = await ask(mesh, tenant, "ListDeliveries", asked)
    assert len({each.delivery_id for each in (*first.deliveries, *second.deliveries)}) == 3
    assert second.next_page_token == ""
    asked.state = pb.DELIVERY_STATE_DEAD
    with pytest.raises(MeshError) as refused:
        await ask(mesh, tenant, "ListDeliveries", asked)
    assert refused.value.metadata["field"] == "page_token"
    assert not (await ask(mesh, tenant, "ListDeliveries", pb.ListDeliveriesRequest(state=pb.DELIVERY_STATE_DEAD))).deliveries


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example/x",
        "http://127.0.0.1/x",
        "https://127.0.0.1/x",
        "https://10.1.2.3/x",
        "https://[::1]/x",
        "https://[::ffff:169.254.169.254]/x",
        "https://user:word@hooks.example/x",
        "https://hooks.example/x#y",
        "ftp://hooks.example/x",
        "https:///x",
        "https://hooks.example:port/x",
        "https://hooks.example/ x",
        "https://höks.example/x",
    ],
)
def test_an_address_is_https_and_public(url: str) -> None:
    """Anything else is refused with the rule it breaks; a setting allows private ones, and http on loopback alone."""
    with pytest.raises(InvalidRequest) as refused:
        refuse_address(url, private_addresses=False)
    assert refused.value.metadata["field"] == "url"
    refuse_address("https://hooks.example:8443/x?y=z", private_addresses=False)
    refuse_address("http://127.0.0.1:9/x", private_addresses=True)
    with pytest.raises(InvalidRequest):
        refuse_address("http://10.1.2.3/x", private_addresses=True)


def test_seal_keys_are_read_or_refused_without_repeating_them() -> None:
    """The first one is active; a short key, a version twice or none is refused, and the refusal holds nothing of it."""
    one, other = base64.b64encode(bytes(32)).decode(), base64.b64encode(bytes(range(32))).decode()
    assert list(parse_seal_keys(f"2:{one},1:{other}")) == [2, 1]
    assert parse_seal_keys("") == {}
    for wrong in (f"1:{one},1:{other}", f"0:{one}", f"x:{one}", "1:c2hvcnQ=", "1:%%", one):
        with pytest.raises(ValueError, match="must list version:base64") as refused:
            parse_seal_keys(wrong)
        assert one not in str(refused.value)
