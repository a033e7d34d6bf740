"""Questions to the audit log: who did what and who saw what, each tenant's own and nobody else's."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import grpc
import pytest

from mesh.common.v1 import error_reason_pb2
from mesh.tenant.v1 import audit_service_pb2 as messages
from services.kernel.ids import new_uuid7
from tests.tenant.harness import Harness, Metadata, as_service, call, refusal, with_key

RECORDED, NOT_PROVEN = messages.AUDIT_OUTCOME_RECORDED, messages.AUDIT_OUTCOME_TENANT_NOT_PROVEN


def item(tenant_id: str, token: str, **changes: object) -> messages.AuditItem:
    """Something a service saw happen now."""
    made = messages.AuditItem(
        tenant_id=UUID(tenant_id).bytes, audit_id=new_uuid7().bytes, context_token=token, action="DOCUMENTS_READ", user="carol"
    )
    made.occur_time.GetCurrentTime()
    for name, value in changes.items():
        if isinstance(value, list):
            getattr(made, name).extend(value)
        elif isinstance(value, datetime):
            getattr(made, name).FromDatetime(value)
        else:
            setattr(made, name, value)
    return made


async def record(harness: Harness, *items: messages.AuditItem, caller: str = "inference") -> Sequence[int]:
    """Records as a service does."""
    return (await call(harness.audits.RecordAudit, messages.RecordAuditRequest(items=items), as_service(caller))).outcomes


async def query(harness: Harness, metadata: Metadata, **wanted: object) -> messages.QueryAuditResponse:
    """Asks the log."""
    return await call(harness.audits.QueryAudit, messages.QueryAuditRequest(**wanted), metadata)  # type: ignore[arg-type] # fields by name


async def test_one_question_answers_who_saw_a_document(harness: Harness) -> None:
    """A document's id leads to user, key, call and time; the call's id leads to all that is known of the call."""
    created = await harness.create()
    authenticated = await harness.authenticate(created.api_key)
    document, call_id = uuid4(), uuid4()
    token, tenant_id = authenticated.context_token, created.tenant.tenant_id
    read = item(tenant_id, token, call_id=call_id.bytes, document_ids=[document.bytes, uuid4().bytes], detail_json='{"n": 1}')
    ended = item(tenant_id, token, call_id=call_id.bytes, action="CALL_ENDED", detail_json='{"outcome": "settled"}')
    unread = item(tenant_id, token, document_ids=[uuid4().bytes])
    assert list(await record(harness, read, ended, unread)) == [RECORDED] * 3
    [found] = (await query(harness, with_key(created.api_key), document_id=str(document))).records
    assert (found.user, found.call_id, found.action, found.source) == ("carol", str(call_id), "DOCUMENTS_READ", "inference")
    assert found.subject.startswith("key:")
    assert found.subject.removeprefix("key:") in created.api_key
    assert found.detail_json == '{"n": 1}'
    of_call = (await query(harness, with_key(created.api_key), call_id=str(call_id))).records
    assert {entry.action for entry in of_call} == {"DOCUMENTS_READ", "CALL_ENDED"}


async def test_every_filter_narrows(harness: Harness) -> None:
    """Time, action, subject and user each leave only what fits, newest first."""
    created = await harness.create()
    token = (await harness.authenticate(created.api_key)).context_token
    now, tenant_id, metadata = datetime.now(UTC), created.tenant.tenant_id, with_key(created.api_key)
    moments = [now + timedelta(milliseconds=number) for number in range(4)]
    items = [item(tenant_id, token, occur_time=moment, user=f"user-{n % 2}", action="CALL_ENDED") for n, moment in enumerate(moments)]
    assert set(await record(harness, *items)) == {RECORDED}
    tested = (await query(harness, metadata, action="CALL_ENDED")).records
    assert [entry.occur_time.ToDatetime(tzinfo=UTC) for entry in tested] == moments[::-1]
    assert {entry.user for entry in (await query(harness, metadata, user="user-1")).records} == {"user-1"}
    assert len((await query(harness, metadata, action="CALL_ENDED", start_time=moments[1], end_time=moments[3])).records) == 2
    assert (await query(harness, metadata, action="CALL_ENDED", subject="key:other")).records == []
    subject = tested[0].subject
    assert len((await query(harness, metadata, action="CALL_ENDED", subject=subject)).records) == 4
    assert (await query(harness, metadata, action="TENANT_CREATED")).records[0].subject.startswith("operator:")


async def test_pages_go_on_where_the_last_one_ended(harness: Harness) -> None:
    """Pages together are the whole list, and a token is good for its own list alone."""
    created = await harness.create()
    metadata = with_key(created.api_key)
    token = (await harness.authenticate(created.api_key)).context_token
    # Equal times: the place in the chain decides.
    now = datetime.now(UTC)
    items = [item(created.tenant.tenant_id, token, action="CALL_ENDED", occur_time=now) for _ in range(7)]
    await record(harness, *items)
    seen: list[int] = []
    page_token = ""
    while True:
        page = await query(harness, metadata, action="CALL_ENDED", page_size=3, page_token=page_token)
        seen += [entry.sequence for entry in page.records]
        page_token = page.next_page_token
        if not page_token:
            break
        first_token = page_token
    assert len(seen) == 7
    assert seen == sorted(seen, reverse=True)
    refused = await refusal(query(harness, metadata, action="OTHER", page_token=first_token))
    assert refused.reason == error_reason_pb2.ERROR_REASON_INVALID_REQUEST
    other = await harness.create()
    refused = await refusal(query(harness, with_key(other.api_key), action="CALL_ENDED", page_token=first_token))
    assert refused.reason == error_reason_pb2.ERROR_REASON_INVALID_REQUEST


async def test_a_foreign_document_leads_nowhere(harness: Harness) -> None:
    """Another tenant's document, call, user and subject find nothing."""
    created, other = await harness.create(), await harness.create()
    token = (await harness.authenticate(created.api_key)).context_token
    document, call_id = uuid4(), uuid4()
    await record(harness, item(created.tenant.tenant_id, token, call_id=call_id.bytes, document_ids=[document.bytes], user="only-here"))
    metadata = with_key(other.api_key)
    assert (await query(harness, metadata, document_id=str(document))).records == []
    assert (await query(harness, metadata, call_id=str(call_id))).records == []
    assert (await query(harness, metadata, user="only-here")).records == []
    mismatch = await refusal(query(harness, [*metadata, ("x-tenant-id", created.tenant.tenant_id)], document_id=str(document)))
    assert mismatch.reason == error_reason_pb2.ERROR_REASON_TENANT_MISMATCH


async def test_an_operator_reads_a_named_tenant_and_leaves_a_trace(harness: Harness) -> None:
    """An operator's look into the log stands in the log it looked into, with its reason."""
    created = await harness.create()
    metadata = harness.as_operator(created.tenant.tenant_id, reason="audit of the year")
    found = (await query(harness, metadata, action="OPERATOR_ACCESS")).records
    assert found[0].reason == "audit of the year"


async def test_records_need_the_tenants_own_token(harness: Harness) -> None:
    """A token of another tenant, a forged one and one that was not valid then record nothing; the rest of the batch does."""
    created, other = await harness.create(), await harness.create()
    token = (await harness.authenticate(created.api_key)).context_token
    foreign = (await harness.authenticate(other.api_key)).context_token
    tenant_id = created.tenant.tenant_id
    early = datetime.now(UTC) - timedelta(hours=3)
    outcomes = await record(
        harness,
        item(tenant_id, foreign),
        item(tenant_id, token[:-4] + "AAAA"),
        item(tenant_id, token, occur_time=early),
        item(tenant_id, ""),
        item(tenant_id, token),
    )
    assert list(outcomes) == [NOT_PROVEN] * 4 + [RECORDED]
    assert len((await query(harness, with_key(created.api_key), action="DOCUMENTS_READ")).records) == 1


async def test_a_record_delivered_twice_is_there_once(harness: Harness) -> None:
    """The audit id makes a repeated delivery harmless: the same answer, no second record, no gap in the chain."""
    created = await harness.create()
    token = (await harness.authenticate(created.api_key)).context_token
    once = item(created.tenant.tenant_id, token)
    for _ in range(3):
        assert list(await record(harness, once, once)) == [RECORDED, RECORDED]
    await record(harness, item(created.tenant.tenant_id, token))
    assert len((await query(harness, with_key(created.api_key), action="DOCUMENTS_READ")).records) == 2
    proven = await call(harness.audits.VerifyAuditChain, messages.VerifyAuditChainRequest(), with_key(created.api_key))
    assert proven.first_broken_sequence == 0


async def test_only_services_record_and_only_administrators_ask(harness: Harness) -> None:
    """A key of the tenant writes nothing into its log, and one without tenant:admin reads nothing of it."""
    created = await harness.create()
    token = (await harness.authenticate(created.api_key)).context_token
    request = messages.RecordAuditRequest(items=[item(created.tenant.tenant_id, token)])
    refused = await refusal(call(harness.audits.RecordAudit, request, with_key(created.api_key)))
    assert refused.reason == error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED
    refused = await refusal(query(harness, as_service("inference", token)))
    assert refused.reason == error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED


@pytest.mark.parametrize(
    ("caller", "action"), [("inference", "KEY_REVOKED"), ("inference", "OPERATOR_ACCESS"), ("retrieval", "CALL_ENDED")]
)
async def test_a_service_records_its_own_kinds_of_things(harness: Harness, caller: str, action: str) -> None:
    """A service that was taken over writes no record of a kind it never sees happen; a batch with one is refused whole."""
    created = await harness.create()
    token, tenant_id = (await harness.authenticate(created.api_key)).context_token, created.tenant.tenant_id
    refused = await refusal(record(harness, item(tenant_id, token), item(tenant_id, token, action=action), caller=caller))
    assert (refused.code, refused.reason_name) == (grpc.StatusCode.PERMISSION_DENIED, "CALLER_NOT_ALLOWED")
    assert (refused.metadata["caller"], refused.metadata["action"]) == (caller, action)
    assert refused.metadata["field"] == "items[1].action"
    assert "DOCUMENTS_READ" in refused.message
    found = (await query(harness, with_key(created.api_key))).records
    assert {"DOCUMENTS_READ", action}.isdisjoint({entry.action for entry in found})


@pytest.mark.parametrize("caller", ["metering"])
async def test_a_service_that_sees_nothing_records_nothing(harness: Harness, caller: str) -> None:
    """Services without a kind of record of their own may not call the method at all."""
    created = await harness.create()
    token = (await harness.authenticate(created.api_key)).context_token
    refused = await refusal(record(harness, item(created.tenant.tenant_id, token), caller=caller))
    assert refused.reason == error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED


@pytest.mark.parametrize(
    ("away", "says"), [(timedelta(minutes=2), "in the future"), (-timedelta(days=7, minutes=1), "older than 7 days")], ids=["early", "late"]
)
async def test_nothing_is_recorded_for_another_time(harness: Harness, away: timedelta, says: str) -> None:
    """What happens later, and what happened more than seven days ago, is refused whole: nobody writes history or the future."""
    created = await harness.create()
    token, tenant_id = (await harness.authenticate(created.api_key)).context_token, created.tenant.tenant_id
    refused = await refusal(record(harness, item(tenant_id, token), item(tenant_id, token, occur_time=datetime.now(UTC) + away)))
    assert refused.reason == error_reason_pb2.ERROR_REASON_INVALID_REQUEST
    assert refused.metadata["field"] == "items[1].occur_time"
    assert says in refused.message
    assert not (await query(harness, with_key(created.api_key), action="DOCUMENTS_READ")).records


@pytest.mark.parametrize("text", ["[1]", "1", '"text"', "{", "{'a': 1}", '{"a": NaN}', '{"a": 1} {}', " "])
async def test_a_detail_that_is_no_object_is_refused(harness: Harness, text: str) -> None:
    """INVALID_ARGUMENT names the item, and nothing of the batch is recorded."""
    created = await harness.create()
    token, tenant_id = (await harness.authenticate(created.api_key)).context_token, created.tenant.tenant_id
    refused = await refusal(record(harness, item(tenant_id, token), item(tenant_id, token, detail_json=text)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, error_reason_pb2.ERROR_REASON_INVALID_REQUEST)
    assert refused.metadata["field"] == "items[1].detail_json"
    assert not (await query(harness, with_key(created.api_key), action="DOCUMENTS_READ")).records


async def test_clocks_may_differ_a_little(harness: Harness) -> None:
    """A service whose clock is some seconds ahead records; the token must have been valid then all the same."""
    created = await harness.create()
    token = (await harness.authenticate(created.api_key)).context_token
    ahead = item(created.tenant.tenant_id, token, occur_time=datetime.now(UTC) + timedelta(seconds=20))
    assert list(await record(harness, ahead)) == [RECORDED]


async def test_a_period_that_ends_before_it_starts_is_refused(harness: Harness) -> None:
    """Such a question could only find nothing, which would look like an answer: INVALID_ARGUMENT names the end and says what to do."""
    created, now = await harness.create(), datetime.now(UTC)
    error = await refusal(query(harness, with_key(created.api_key), start_time=now, end_time=now - timedelta(seconds=1)))
    assert (error.reason, error.metadata["field"]) == (error_reason_pb2.ERROR_REASON_INVALID_REQUEST, "end_time")
    assert "before start_time" in error.message
    assert (await query(harness, with_key(created.api_key), start_time=now, end_time=now)).records == []
