"""Events of the product: recorded once for ever whatever time a repeat tells, each answered by itself, taken back once, listed in pages."""

import asyncio
import hashlib
import random
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from mesh.metering.v1 import event_service_pb2 as pb
from services.kernel.errors import MeshError
from tests.metering.events import (
    CONFLICT,
    DUPLICATE,
    PRODUCT,
    RECORDED,
    TIME_IN_FUTURE,
    TYPE,
    UNKNOWN_TYPE,
    ask,
    event,
    listed,
    outcomes,
    record,
    register,
    reverse,
    totals,
)
from tests.metering.mesh import Mesh

pytestmark = pytest.mark.usefixtures("known_type")


@pytest.fixture(scope="module")
async def known_type(mesh: Mesh) -> None:
    """The type that all events here are of."""
    await register(mesh)


async def test_an_event_is_recorded_whole_and_listed(mesh: Mesh) -> None:
    """Every attribute comes back as it was sent, with the ledger's own id and the time it was recorded."""
    tenant, time = mesh.new_tenant(), datetime(2026, 3, 1, 12, 30, 0, 123_456, tzinfo=UTC)
    sent = event("one", quantity=7, time=time, metadata={"room": "7", "ort": "Köln"})
    (result,) = await record(mesh, tenant, [sent])
    assert result.outcome == RECORDED
    (found,) = await listed(mesh, tenant)
    assert (found.event, found.event_id, found.reverses) == (sent, result.event_id, "")
    assert abs(found.record_time.ToDatetime(UTC) - datetime.now(UTC)) < timedelta(minutes=5)


ODD = (*"(){},;:'`\"\\\\\t\n\r\x01\x7f \ufeff\u2028ßЖ中𝄞", "NULL", "NaN", "\\\\x00", "\\\\u0000", "(,)", '""', "{}", "")


@pytest.mark.parametrize("count", [1, 15, 16, 200])
async def test_texts_of_any_letters_come_back_as_they_were_sent(mesh: Mesh, count: int) -> None:
    """Whatever stands for something in a row, in a list of rows or in JSON stands for itself in an event, few or many at once."""
    tenant, rng = mesh.new_tenant(), random.Random(count)

    def text(most: int) -> str:
        return "".join(rng.choices(ODD, k=rng.randrange(1, 40)))[:most]

    def odd(index: int) -> pb.Event:
        # Of some so much that the store keeps it outside of its row.
        metadata = {f"{pair}{text(9)}": text(80) * rng.choice((1, 6)) for pair in range(rng.choice((0, 1, 32)))}
        metadata = {key: value[:512] for key, value in metadata.items()}
        return event(
            f"{index}{text(50)}", source=text(50) or "/s", subject=text(200), feature=text(100), metadata=metadata, quantity=10**12
        )

    sent = [odd(index) for index in range(count)]
    results = await record(mesh, tenant, sent)
    assert [result.outcome for result in results] == [RECORDED] * count
    found = {item.event_id: item.event for item in await listed(mesh, tenant)}
    assert [found[result.event_id] for result in results] == sent
    assert await outcomes(mesh, tenant, *sent) == [DUPLICATE] * count


async def test_a_repeat_is_a_duplicate_whatever_its_time(mesh: Mesh) -> None:
    """The same id with the same content is recorded once: the first time stands, also within one batch."""
    tenant, first = mesh.new_tenant(), datetime(2026, 3, 1, tzinfo=UTC)
    one = event("one", time=first)
    later = event("one", time=first + timedelta(days=40))
    (recorded,) = await record(mesh, tenant, [one])
    (repeated,) = await record(mesh, tenant, [later])
    assert (repeated.outcome, repeated.event_id) == (DUPLICATE, recorded.event_id)
    assert await outcomes(mesh, tenant, event("two"), event("two"), later) == [RECORDED, DUPLICATE, DUPLICATE]
    assert [item.event.time.ToDatetime(UTC) for item in await listed(mesh, tenant) if item.event.id == "one"] == [first]


@pytest.mark.parametrize(
    "change",
    [
        {"quantity": 2},
        {"subject": "user-2"},
        {"feature": "other"},
        {"type": "interview.begun"},
        {"metadata": {"room": "8"}},
        {"metadata": {"roo": "m7"}},
        {"metadata": {}},
    ],
    ids=str,
)
async def test_the_same_id_with_other_content_is_a_conflict(mesh: Mesh, change: dict[str, object]) -> None:
    """Nothing is recorded, the first stands, and both digests are told; its neighbours are recorded."""
    await register(mesh, "interview.begun")
    tenant, one = mesh.new_tenant(), event("one", metadata={"room": "7"})
    (recorded,) = await record(mesh, tenant, [one])
    other = event("one", **({"metadata": {"room": "7"}} | change))
    conflict, neighbour = await record(mesh, tenant, [other, event("two")])
    assert (conflict.outcome, conflict.event_id, neighbour.outcome) == (CONFLICT, recorded.event_id, RECORDED)
    assert len(conflict.recorded_digest) == len(conflict.sent_digest) == 32
    assert conflict.recorded_digest != conflict.sent_digest
    (again,) = await record(mesh, tenant, [other])
    assert (again.recorded_digest, again.sent_digest) == (conflict.recorded_digest, conflict.sent_digest)
    assert sorted(item.event.data.quantity for item in await listed(mesh, tenant)) == [1, 1]


async def test_the_digest_is_what_anybody_can_compute(mesh: Mesh) -> None:
    """SHA-256 of source, id, product, type, quantity, subject, feature and the sorted metadata, with NUL between them."""
    tenant = mesh.new_tenant()
    await record(mesh, tenant, [event("one")])
    (conflict,) = await record(mesh, tenant, [event("one", quantity=12, metadata={"b": "2", "a": "1"})])
    texts = ("/interviews", "one", PRODUCT, TYPE, "12", "user-1", "hiring", "a", "1", "b", "2")
    assert conflict.sent_digest == hashlib.sha256("\x00".join(texts).encode()).digest()


async def test_of_many_events_those_that_are_taken_are_told_and_the_others_recorded(mesh: Mesh) -> None:
    """One that was recorded before, one with other content and one that comes twice do not keep the rest from being recorded, once each."""
    await register(mesh)
    tenant, now = mesh.new_tenant(), datetime.now(UTC)
    many = [event(f"{index:03}", time=now) for index in range(100)]
    assert await outcomes(mesh, tenant, many[50], event("070", time=now, quantity=2)) == [RECORDED, RECORDED]
    wanted = [RECORDED] * 100 + [DUPLICATE]
    wanted[50], wanted[70] = DUPLICATE, CONFLICT
    assert await outcomes(mesh, tenant, *many, many[20]) == wanted
    assert await totals(mesh, tenant) == [(PRODUCT, TYPE, "user-1", "hiring", 100, 101)]


async def test_ids_are_of_their_source(mesh: Mesh) -> None:
    """Two sources, and two tenants, may use one id for different events."""
    tenant, other = mesh.new_tenant(), mesh.new_tenant()
    assert await outcomes(mesh, tenant, event("one"), event("one", source="/other", quantity=5)) == [RECORDED, RECORDED]
    assert await outcomes(mesh, other, event("one", quantity=9)) == [RECORDED]


async def test_an_unknown_type_and_a_time_to_come_are_told_one_by_one(mesh: Mesh) -> None:
    """What is refused leaves no trace and no claim on its id; the others are recorded. A day ahead, and any past, is taken."""
    tenant, now = mesh.new_tenant(), datetime.now(UTC)
    batch = [
        event("a", type="nobody.knows"),
        event("b"),
        event("c", time=now + timedelta(days=1, minutes=10)),
        event("d", time=now + timedelta(hours=23)),
        event("e", time=datetime(1970, 1, 1, tzinfo=UTC)),
    ]
    assert await outcomes(mesh, tenant, *batch) == [UNKNOWN_TYPE, RECORDED, TIME_IN_FUTURE, RECORDED, RECORDED]
    assert {item.event.id for item in await listed(mesh, tenant)} == {"b", "d", "e"}
    assert await outcomes(mesh, tenant, event("a", quantity=3), event("c", quantity=3)) == [RECORDED, RECORDED]


async def test_a_type_is_known_as_soon_as_it_is_registered(mesh: Mesh) -> None:
    """Having been unknown a moment ago is not remembered."""
    tenant, late = mesh.new_tenant(), event("one", type="interview.archived")
    assert await outcomes(mesh, tenant, late) == [UNKNOWN_TYPE]
    await register(mesh, "interview.archived")
    assert await outcomes(mesh, tenant, late) == [RECORDED]


async def test_a_type_never_changes(mesh: Mesh) -> None:
    """Registering it again is a no-op; with another unit or aggregation it is ALREADY_EXISTS, and the first stands."""
    first = await register(mesh, "interview.scored")
    assert await register(mesh, "interview.scored") == first
    for change in ({"unit": "scores"}, {"aggregation": pb.AGGREGATION_MAX}):
        with pytest.raises(MeshError) as refused:
            await register(mesh, "interview.scored", **change)
        assert (refused.value.code, refused.value.reason_name) == (grpc.StatusCode.ALREADY_EXISTS, "CONTENT_CONFLICT")
        assert dict(refused.value.metadata) == {"resource": "event_type", "unit": "ai_interviews", "aggregation": "SUM"}


async def test_types_are_listed_in_pages(mesh: Mesh) -> None:
    """By product and type, each once, across pages."""
    for name in ("a.b", "a_b", "z"):
        await register(mesh, name, product="paging", aggregation=pb.AGGREGATION_COUNT)
    tenant, found, token = mesh.new_tenant(), list[pb.EventType](), ""
    while True:
        page = await ask(mesh, tenant, "ListEventTypes", pb.ListEventTypesRequest(page_size=2, page_token=token))
        found += page.event_types
        token = page.next_page_token
        if not token:
            break
    assert [item.type for item in found if item.product == "paging"] == ["a.b", "a_b", "z"]
    assert [(item.product, item.type) for item in found] == sorted({(item.product, item.type) for item in found})


async def test_an_event_is_taken_back_once_for_ever(mesh: Mesh) -> None:
    """Its quantity once more, negative, at the same time of use; repeated, at once or for another reason, it is the same reversal."""
    tenant, time = mesh.new_tenant(), datetime(2026, 2, 3, tzinfo=UTC)
    sent = event("one", quantity=5, time=time, metadata={"room": "7"})
    await record(mesh, tenant, [sent, event("two", quantity=2)])
    first, second = await reverse(mesh, tenant, sent, sent)
    (again,) = await reverse(mesh, tenant, sent, reason="another")
    assert {(item.outcome, item.event_id) for item in (first, second, again)} == {(pb.REVERSE_EVENT_OUTCOME_REVERSED, first.event_id)}
    reversal, *_ = [item for item in await listed(mesh, tenant) if item.reverses]
    assert (reversal.event_id, reversal.event.id, reversal.event.data.quantity) == (first.event_id, "one", -5)
    assert (reversal.event.time, dict(reversal.event.data.metadata)) == (sent.time, {"reason": "counted by mistake"})
    assert await totals(mesh, tenant) == [(PRODUCT, TYPE, "user-1", "hiring", 3, 2)]
    assert await outcomes(mesh, tenant, sent) == [DUPLICATE]


async def test_only_ones_own_events_can_be_taken_back(mesh: Mesh) -> None:
    """What was never recorded, or is another tenant's, is NOT_FOUND, and nothing is written."""
    tenant, other, sent = mesh.new_tenant(), mesh.new_tenant(), event("one")
    await record(mesh, tenant, [sent])
    assert [item.outcome for item in await reverse(mesh, other, sent, event("none"))] == [pb.REVERSE_EVENT_OUTCOME_NOT_FOUND] * 2
    assert len(await listed(mesh, tenant)) == 1
    assert await listed(mesh, other) == []


async def test_events_are_listed_in_pages_last_recorded_first(mesh: Mesh) -> None:
    """Each once, and none of another tenant; a token of another tenant's list is refused."""
    tenant, other = mesh.new_tenant(), mesh.new_tenant()
    names = [f"{index:02}" for index in range(23)]
    for name in names[:3]:
        await record(mesh, tenant, [event(name)])
    await record(mesh, tenant, [event(name) for name in names[3:]])
    await record(mesh, other, [event("foreign")])
    found = [item.event.id for item in await listed(mesh, tenant, size=5)]
    assert (sorted(found), found[-3:]) == (names, names[2::-1])
    page = await ask(mesh, tenant, "ListEvents", pb.ListEventsRequest(page_size=5))
    with pytest.raises(MeshError) as refused:
        await ask(mesh, other, "ListEvents", pb.ListEventsRequest(page_token=page.next_page_token))
    assert refused.value.metadata["field"] == "page_token"


async def test_services_record_for_the_tenant_they_act_for(mesh: Mesh) -> None:
    """Inference records by the context of its call; ratelimit, which has no business here, may not."""
    tenant, request = mesh.new_tenant(), pb.RecordEventsRequest(events=[event("one")])
    caller = mesh.inference
    response = await caller.channel.unary(caller.events.RecordEvents, request, timeout_seconds=10, tenant=tenant.context)
    assert [result.outcome for result in response.results] == [RECORDED]
    caller = mesh.ratelimit
    with pytest.raises(MeshError) as refused:
        await caller.channel.unary(caller.events.RecordEvents, request, timeout_seconds=10, tenant=tenant.context)
    assert refused.value.reason_name == "CALLER_NOT_ALLOWED"


async def test_concurrent_repeats_record_each_event_once(mesh: Mesh) -> None:
    """Sixty callers with overlapping halves of the same events, small and large batches in any order: one row each, everybody answered."""
    tenant, chance = mesh.new_tenant(), random.Random(7)
    log = [event(f"{index:03}", quantity=index + 1) for index in range(400)]
    results: list[list[int]] = []

    async def send(size: int) -> None:
        results.append(await outcomes(mesh, tenant, *chance.sample(log, size)))

    async with asyncio.TaskGroup() as group:
        for size in [*[5, 40] * 26, *[300] * 8]:
            group.create_task(send(size))
    assert {outcome for answers in results for outcome in answers} <= {RECORDED, DUPLICATE}
    await record(mesh, tenant, log)
    assert sum(answers.count(RECORDED) for answers in results) <= 400
    assert await totals(mesh, tenant) == [(PRODUCT, TYPE, "user-1", "hiring", 400, 400 * 401 // 2)]
