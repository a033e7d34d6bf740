"""Events that are wrong in themselves: refused with a type, whole, and nothing is written, neither a row nor a claim."""

from collections.abc import Callable
from datetime import UTC, datetime

import grpc
import pytest

from mesh.metering.v1 import event_service_pb2 as pb
from services.kernel.errors import MeshError
from services.kernel.rpc import metadata as keys
from services.kernel.rpc.validation import parse_valid
from services.kernel.rpc.wire_status import decode_rpc_error
from tests.metering.events import RECORDED, ask, event, listed, outcomes, record, register, reverse
from tests.metering.mesh import Mesh

TEN_MEGABYTES = "x" * 10_000_000


def at(seconds: int, nanos: int = 0) -> pb.Event:
    """An event at any time that can be written down."""
    made = event("one")
    made.time.seconds, made.time.nanos = seconds, nanos
    return made


def without(field: str) -> pb.Event:
    """An event that lacks a part."""
    made = event("one")
    made.ClearField(field)  # type: ignore[arg-type] # a field's name
    return made


WRONG: dict[str, tuple[Callable[[], pb.Event], str]] = {
    "a negative quantity": (lambda: event("one", quantity=-1), "events[1].data.quantity"),
    "no quantity": (lambda: event("one", quantity=0), "events[1].data.quantity"),
    "too high a quantity": (lambda: event("one", quantity=10**12 + 1), "events[1].data.quantity"),
    "no data": (lambda: without("data"), "events[1].data"),
    "no time": (lambda: without("time"), "events[1].time"),
    "a time before 1970": (lambda: at(-1), "events[1].time"),
    "a time that is none": (lambda: at(1, 2_000_000_000), "events[1].time"),
    "no id": (lambda: without("id"), "events[1].id"),
    "no source": (lambda: without("source"), "events[1].source"),
    "too long an id": (lambda: event("i" * 201), "events[1].id"),
    "too long a subject": (lambda: event("one", subject="s" * 201), "events[1].subject"),
    "a type that can be none": (lambda: event("one", type="Interview Completed"), "events[1].type"),
    "a NUL in a text": (lambda: event("one", subject="a\x00b"), "events[1]"),
    "a NUL in metadata": (lambda: event("one", metadata={"k": "a\x00b"}), "events[1]"),
    "too much metadata": (lambda: event("one", metadata={str(index): "" for index in range(33)}), "events[1].data.metadata"),
    "too long a value": (lambda: event("one", metadata={"k": "v" * 513}), "events[1].data.metadata['k']"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_malformed_event_refuses_its_whole_batch(mesh: Mesh, case: str) -> None:
    """INVALID_ARGUMENT that names the field; the neighbours are not recorded either, and may be sent again as they are."""
    make, field = WRONG[case]
    await register(mesh)
    tenant, neighbours = mesh.new_tenant(), [event("before"), event("after")]
    with pytest.raises(MeshError) as refused:
        await record(mesh, tenant, [neighbours[0], make(), neighbours[1]])
    assert (refused.value.code, refused.value.reason_name) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert refused.value.metadata["field"] == field
    assert await listed(mesh, tenant) == []
    assert await outcomes(mesh, tenant, *neighbours) == [RECORDED, RECORDED]


async def test_five_thousand_events_are_taken_and_one_more_is_not(mesh: Mesh) -> None:
    """The bound is the contract's; nothing of a batch beyond it is written. An empty batch is refused too."""
    await register(mesh)
    tenant, now = mesh.new_tenant(), datetime.now(UTC)
    log = [event(str(index), time=now) for index in range(5_001)]
    for wrong in (log, []):
        with pytest.raises(MeshError) as refused:
            await record(mesh, tenant, wrong)
        assert (refused.value.reason_name, refused.value.metadata["field"]) == ("INVALID_REQUEST", "events")
    assert await listed(mesh, tenant) == []
    assert await outcomes(mesh, tenant, *log[:5_000]) == [RECORDED] * 5_000


async def test_ten_megabytes_of_metadata_are_refused(mesh: Mesh) -> None:
    """Beyond the largest message RESOURCE_EXHAUSTED, and how large it may be; where such a message is taken, INVALID_REQUEST."""
    await register(mesh)
    tenant, huge = mesh.new_tenant(), pb.RecordEventsRequest(events=[event("one", metadata={"k": TEN_MEGABYTES})])
    with pytest.raises(grpc.aio.AioRpcError) as exhausted:
        await mesh.outside.events.RecordEvents(huge, metadata=((keys.AUTHORIZATION, f"Bearer key-{tenant.id}"),), timeout=20)
    told = decode_rpc_error(exhausted.value, "metering")
    assert (told.code, told.reason_name) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE")
    assert told.metadata == {"rule": "max_message_bytes", "limit": "4194304", "requested": str(huge.ByteSize())}
    with pytest.raises(MeshError) as refused:
        parse_valid(huge.SerializeToString(), pb.RecordEventsRequest.FromString)
    assert (refused.value.reason_name, refused.value.metadata["field"]) == ("INVALID_REQUEST", "events[0].data.metadata['k']")
    assert await listed(mesh, tenant) == []


@pytest.mark.parametrize(
    ("change", "field"), [({"reason": ""}, "reason"), ({"source": ""}, "source"), ({"id": ""}, "id"), ({"reason": "\x00"}, "")]
)
async def test_a_malformed_reversal_takes_nothing_back(mesh: Mesh, change: dict[str, str], field: str) -> None:
    """INVALID_ARGUMENT that names the field. A reversal has no source that could be named, so none is taken back."""
    await register(mesh)
    tenant, sent = mesh.new_tenant(), event("one")
    await record(mesh, tenant, [sent])
    good = {"id": "one", "source": "/interviews", "reason": "mistake"}
    request = pb.ReverseEventsRequest(reversals=[pb.EventReversal(**good), pb.EventReversal(**good | change)])
    with pytest.raises(MeshError) as refused:
        await ask(mesh, tenant, "ReverseEvents", request)
    assert refused.value.metadata["field"] == f"reversals[1].{field}".rstrip(".")
    assert len(await listed(mesh, tenant)) == 1
    assert [item.outcome for item in await reverse(mesh, tenant, sent)] == [pb.REVERSE_EVENT_OUTCOME_REVERSED]


async def test_only_an_operator_registers_a_type(mesh: Mesh) -> None:
    """A tenant's own key is refused, and so is an operator who does not say why; the type stays unknown."""
    tenant, wanted = mesh.new_tenant(), pb.EventType(product="p", type="stolen", unit="u", aggregation=pb.AGGREGATION_SUM)
    with pytest.raises(MeshError) as refused:
        await ask(mesh, tenant, "RegisterEventType", pb.RegisterEventTypeRequest(event_type=wanted))
    assert refused.value.reason_name == "CALLER_NOT_ALLOWED"
    assert await mesh.admin.fetchval("SELECT count(*) FROM metering.event_types WHERE product = 'p'") == 0


async def test_a_key_that_only_reads_records_nothing_and_takes_nothing_back(mesh: Mesh) -> None:
    """Without usage:write both are SCOPE_MISSING; listing is for usage:read."""
    await register(mesh)
    tenant, sent = mesh.new_tenant(), event("one")
    mesh.peers.tenants.readers.add(f"key-{tenant.id}")
    for attempt in (record(mesh, tenant, [sent]), reverse(mesh, tenant, sent)):
        with pytest.raises(MeshError) as refused:
            await attempt
        assert (refused.value.reason_name, dict(refused.value.metadata)) == ("SCOPE_MISSING", {"scope": "usage:write"})
    assert await listed(mesh, tenant) == []
