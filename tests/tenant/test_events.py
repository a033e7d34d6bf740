"""Events of tenants' lives: written with the change, signed, delivered at least once and in order, given up after a bound, sent again."""

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from uuid import UUID

import grpc
import pytest

from devstack.ports import free_port
from mesh.tenant.v1 import event_service_pb2, tenant_service_pb2
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.kernel.webhook_sender import WebhookSender
from services.kernel.webhook_signing import read_webhook_secret, signature_of
from services.tenant.adapters.postgres_events import PostgresOutbox
from services.tenant.adapters.smtp_mail import Addressee, PostgresOwners, SmtpMail, welcome
from services.tenant.adapters.webhook import Webhook
from services.tenant.events import EventRelay, EventSink, EventState, Sink
from tests.tenant.harness import Harness, call, refusal
from tests.tenant.receivers import Receiver, running_mailbox, running_receiver

SECRET = "whsec_" + base64.b64encode(b"a secret of the operator").decode()
PARK_OTHERS = "UPDATE tenant.events SET state = 'DELIVERED' WHERE state = 'PENDING' AND tenant_id <> $1"
MAKE_DUE = "UPDATE tenant.events SET due_time = now() WHERE tenant_id = $1"


@asynccontextmanager
async def relay(
    harness: Harness, sinks: Mapping[Sink, EventSink], *, max_attempts: int = 3
) -> AsyncIterator[tuple[EventRelay, PostgresOutbox]]:
    """A relay of its own on the harness's database."""
    jobs = await JobsDatabase.open(harness.settings.postgres_jobs_dsn.get_secret_value(), max_size=2)
    outbox = PostgresOutbox(jobs)
    yield EventRelay(outbox, sinks, poll_seconds=0.1, max_attempts=max_attempts), outbox
    await jobs.close()


@asynccontextmanager
async def to_webhook(harness: Harness, url: str, *, timeout_seconds: float = 5.0, max_attempts: int = 3) -> AsyncIterator[EventRelay]:
    """A relay that delivers to one receiver."""
    sender = WebhookSender(private_addresses=True, timeout_seconds=timeout_seconds)
    hook = Webhook(sender, url, read_webhook_secret(SECRET), region="local")
    async with relay(harness, {Sink.WEBHOOK: hook}, max_attempts=max_attempts) as (found, _):
        yield found
    await sender.close()


async def only_tenant(harness: Harness) -> str:
    """A tenant whose events are the only ones that wait."""
    tenant_id = (await harness.create()).tenant.tenant_id
    await harness.execute(PARK_OTHERS, UUID(tenant_id))
    return tenant_id


async def events_of(harness: Harness, tenant_id: str) -> list[event_service_pb2.Event]:
    """A tenant's events, oldest first, as an operator lists them."""
    listed = await call(harness.events.ListEvents, event_service_pb2.ListEventsRequest(page_size=1000), harness.as_operator())
    return [event for event in reversed(listed.events) if event.tenant_id == tenant_id]


async def change(harness: Harness, tenant_id: str, *, suspend: bool) -> None:
    """Suspends or resumes."""
    if suspend:
        await call(harness.tenants.SuspendTenant, tenant_service_pb2.SuspendTenantRequest(tenant_id=tenant_id), harness.as_operator())
    else:
        await call(harness.tenants.ResumeTenant, tenant_service_pb2.ResumeTenantRequest(tenant_id=tenant_id), harness.as_operator())


async def test_an_event_arrives_signed_and_as_a_cloud_event(harness: Harness) -> None:
    """The receiver proves by HMAC over id, time and body that the event is ours, and reads a CloudEvent without personal data."""
    tenant_id = await only_tenant(harness)
    async with running_receiver() as receiver, to_webhook(harness, receiver.url) as found:
        assert await found.deliver_due() == 1
    [(headers, body)] = receiver.received
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(b"a secret of the operator", signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert signature_of(b"another", headers["webhook-id"], int(headers["webhook-timestamp"]), body) != headers["webhook-signature"]
    event = json.loads(body)
    assert (event["specversion"], event["type"], event["subject"]) == ("1.0", "tenant.provisioned", tenant_id)
    assert event["id"] == headers["webhook-id"]
    assert "@example.com" not in body.decode()
    [kept] = await events_of(harness, tenant_id)
    assert (kept.state, kept.attempts) == (event_service_pb2.EVENT_STATE_DELIVERED, 1)


async def test_events_of_one_tenant_arrive_in_order_and_wait_for_each_other(harness: Harness) -> None:
    """While the first is refused the later ones wait; then all arrive in the order of the changes, each once."""
    tenant_id = await only_tenant(harness)
    await change(harness, tenant_id, suspend=True)
    await change(harness, tenant_id, suspend=True)
    await change(harness, tenant_id, suspend=False)
    async with running_receiver() as receiver, to_webhook(harness, receiver.url) as found:
        receiver.statuses = [500]
        assert await found.deliver_due() == 1
        assert await found.deliver_due() == 0
        await harness.execute(MAKE_DUE, UUID(tenant_id))
        while await found.deliver_due():
            continue
    types = [json.loads(body)["type"] for _, body in receiver.received]
    assert types == ["tenant.provisioned", "tenant.provisioned", "tenant.suspended", "tenant.resumed"]
    assert receiver.received[0][0]["webhook-id"] == receiver.received[1][0]["webhook-id"]


@pytest.mark.parametrize("trouble", ["down", "500", "slow", "redirect"])
async def test_what_is_not_taken_is_tried_again_and_at_last_kept_as_dead(harness: Harness, trouble: str) -> None:
    """A receiver that is down, fails, is slow or points elsewhere gets it again; after the bound it is DEAD and replayable."""
    tenant_id = await only_tenant(harness)
    async with running_receiver() as receiver:
        receiver.statuses = {"500": [500, 503], "redirect": [307, 302]}.get(trouble, [])
        receiver.delay_seconds = 2.0 if trouble == "slow" else 0.0
        url = f"http://127.0.0.1:{free_port()}/events" if trouble == "down" else receiver.url
        async with to_webhook(harness, url, timeout_seconds=0.5, max_attempts=2) as found:
            for attempt in (1, 2):
                assert await found.deliver_due() == 1
                [event] = await events_of(harness, tenant_id)
                assert event.attempts == attempt
                assert event.last_error
                assert url not in event.last_error
                await harness.execute(MAKE_DUE, UUID(tenant_id))
            assert event.state == event_service_pb2.EVENT_STATE_DEAD
            assert await found.deliver_due() == 0
        if trouble == "redirect":
            assert len(receiver.received) == 2
        await _replayed(harness, tenant_id, event.event_id, receiver)


async def _replayed(harness: Harness, tenant_id: str, event_id: str, receiver: Receiver) -> None:
    dead = event_service_pb2.ListEventsRequest(state=event_service_pb2.EVENT_STATE_DEAD)
    assert event_id in [event.event_id for event in (await call(harness.events.ListEvents, dead, harness.as_operator())).events]
    request = event_service_pb2.ReplayEventRequest(tenant_id=tenant_id, event_id=event_id)
    replayed = (await call(harness.events.ReplayEvent, request, harness.as_operator())).event
    assert (replayed.state, replayed.attempts) == (event_service_pb2.EVENT_STATE_PENDING, 0)
    receiver.delay_seconds, before = 0.0, len(receiver.received)
    async with to_webhook(harness, receiver.url) as found:
        assert await found.deliver_due() == 1
    assert len(receiver.received) == before + 1
    assert receiver.received[-1][0]["webhook-id"] == event_id


async def test_two_relays_never_send_one_event_at_once(harness: Harness) -> None:
    """A taken event is under its lease: another replica's relay passes it by, and takes it once the lease is over."""
    tenant_id = await only_tenant(harness)
    async with relay(harness, {}) as (_, one), relay(harness, {}) as (_, two):
        [event] = await one.take_due([Sink.WEBHOOK], 10)
        assert await two.take_due([Sink.WEBHOOK], 10) == []
        await harness.execute("UPDATE tenant.events SET lease_until = now() WHERE tenant_id = $1", UUID(tenant_id))
        [again] = await two.take_due([Sink.WEBHOOK], 10)
        assert (again.event_id, again.attempts) == (event.event_id, 2)
        await one.delivered(event)
        assert [item.state for item in await one.list_page(EventState.DELIVERED, None, 1)] == [EventState.DELIVERED]


async def test_events_page_and_a_foreign_id_is_not_found(harness: Harness) -> None:
    """Lists go on where they ended, a malformed token is refused, and an event is found under its own tenant alone."""
    one, other = await only_tenant(harness), await only_tenant(harness)
    listing = event_service_pb2.ListEventsRequest(page_size=1)
    first = await call(harness.events.ListEvents, listing, harness.as_operator())
    listing.page_token = first.next_page_token
    second = await call(harness.events.ListEvents, listing, harness.as_operator())
    assert [first.events[0].tenant_id, second.events[0].tenant_id] == [other, one]
    listing.page_token = "nonsense"
    assert (await refusal(call(harness.events.ListEvents, listing, harness.as_operator()))).code is grpc.StatusCode.INVALID_ARGUMENT
    request = event_service_pb2.ReplayEventRequest(tenant_id=one, event_id=first.events[0].event_id)
    assert (await refusal(call(harness.events.ReplayEvent, request, harness.as_operator()))).code is grpc.StatusCode.NOT_FOUND


async def test_the_owner_is_welcomed_by_mail(harness: Harness) -> None:
    """The mail goes to the owner's address, names the tenant and holds no key; a server that refuses is tried again later."""
    created = await harness.create(display_name="Größe & Söhne", owner_email="owner@example.com")
    tenant_id = UUID(created.tenant.tenant_id)
    await harness.execute(PARK_OTHERS, tenant_id)
    await harness.execute("UPDATE tenant.events SET sink = 'mail' WHERE tenant_id = $1", tenant_id)
    database = await TenantDatabase.open(harness.settings.postgres_dsn.get_secret_value())
    async with running_mailbox() as mailbox:
        mail = SmtpMail(f"smtp://127.0.0.1:{mailbox.port}", "hello@example.org", PostgresOwners(database).find)
        async with relay(harness, {Sink.MAIL: mail}) as (found, _):
            mailbox.refuse = True
            assert await found.deliver_due() == 1
            assert mailbox.taken == []
            mailbox.refuse = False
            await harness.execute(MAKE_DUE, tenant_id)
            assert await found.deliver_due() == 1
    await database.close()
    [(recipients, message)] = mailbox.taken
    assert recipients == ["owner@example.com"]
    assert message["From"] == "hello@example.org"
    assert created.api_key not in str(message)
    [event] = await events_of(harness, created.tenant.tenant_id)
    assert (event.state, event.attempts) == (event_service_pb2.EVENT_STATE_DELIVERED, 2)


def test_no_line_break_becomes_a_header() -> None:
    """An address or name with a line break is refused before anything is sent."""
    for owner in (Addressee("a@example.com\r\nBcc: thief@example.com", "A", "a"), Addressee("a@example.com", "A\nBcc: t@example.com", "a")):
        with pytest.raises(ValueError, match=r"linefeed|newline|carriage"):
            welcome("hello@example.org", owner, "id")
