"""Short ways to register types of events and to record, take back and list events, as operators and tenants do."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import grpc

from mesh.metering.v1 import event_service_pb2 as pb
from services.kernel.ids import new_uuid7
from services.kernel.rpc import metadata as keys
from services.kernel.rpc.wire_status import decode_rpc_error
from tests.metering.mesh import Mesh, Tenant
from tests.metering.peers import OPERATOR

RECORDED, DUPLICATE = pb.RECORD_EVENT_OUTCOME_RECORDED, pb.RECORD_EVENT_OUTCOME_DUPLICATE
CONFLICT, UNKNOWN_TYPE = pb.RECORD_EVENT_OUTCOME_CONFLICT, pb.RECORD_EVENT_OUTCOME_UNKNOWN_TYPE
TIME_IN_FUTURE = pb.RECORD_EVENT_OUTCOME_TIME_IN_FUTURE
PRODUCT, TYPE = "screening", "interview.completed"
SECONDS = 20.0


def event(name: str = "", **changes: Any) -> pb.Event:
    """An event that nothing is wrong with, unless changed; `quantity` and `metadata` are its data."""
    data = pb.EventData(quantity=changes.pop("quantity", 1), metadata=changes.pop("metadata", {}))
    time = changes.pop("time", None) or datetime.now(UTC)
    fields = {"source": "/interviews", "product": PRODUCT, "type": TYPE, "subject": "user-1", "feature": "hiring"} | changes
    made = pb.Event(id=name or str(new_uuid7()), data=data, **fields)
    made.time.FromDatetime(time)
    return made


async def ask(mesh: Mesh, tenant: Tenant, method: str, request: object) -> Any:
    """Calls EventService as the tenant's own application does: from outside, with its key."""
    try:
        metadata = ((keys.AUTHORIZATION, f"Bearer key-{tenant.id}"),)
        return await getattr(mesh.outside.events, method)(request, metadata=metadata, timeout=SECONDS)
    except grpc.aio.AioRpcError as error:
        raise decode_rpc_error(error, "metering") from None


async def register(mesh: Mesh, event_type: str = TYPE, **changes: Any) -> pb.EventType:
    """Registers a type as an operator."""
    fields = {"product": PRODUCT, "unit": "ai_interviews", "aggregation": pb.AGGREGATION_SUM} | changes
    metadata = ((keys.AUTHORIZATION, f"Bearer {OPERATOR}"), (keys.OPERATOR_REASON, "a new product"))
    request = pb.RegisterEventTypeRequest(event_type=pb.EventType(type=event_type, **fields))
    try:
        return (await mesh.outside.events.RegisterEventType(request, metadata=metadata, timeout=SECONDS)).event_type
    except grpc.aio.AioRpcError as error:
        raise decode_rpc_error(error, "metering") from None


async def record(mesh: Mesh, tenant: Tenant, events: Sequence[pb.Event]) -> list[pb.RecordEventResult]:
    """Records events of a tenant; what came of each."""
    return list((await ask(mesh, tenant, "RecordEvents", pb.RecordEventsRequest(events=events))).results)


async def outcomes(mesh: Mesh, tenant: Tenant, *events: pb.Event) -> list[int]:
    """Records events of a tenant; what came of each, without the rest."""
    return [result.outcome for result in await record(mesh, tenant, events)]


async def reverse(mesh: Mesh, tenant: Tenant, *events: pb.Event, reason: str = "counted by mistake") -> list[pb.ReverseEventResult]:
    """Takes events of a tenant back; what came of each."""
    reversals = [pb.EventReversal(id=item.id, source=item.source, reason=reason) for item in events]
    return list((await ask(mesh, tenant, "ReverseEvents", pb.ReverseEventsRequest(reversals=reversals))).results)


async def listed(mesh: Mesh, tenant: Tenant, size: int = 1_000) -> list[pb.RecordedEvent]:
    """Everything that is recorded of a tenant, page by page."""
    found: list[pb.RecordedEvent] = []
    token = ""
    while True:
        page = await ask(mesh, tenant, "ListEvents", pb.ListEventsRequest(page_size=size, page_token=token))
        found += page.events
        token = page.next_page_token
        if not token:
            return found


async def totals(mesh: Mesh, tenant: Tenant) -> list[tuple[object, ...]]:
    """Count and quantity by type, user and feature, past row-level security."""
    rows = await mesh.admin.fetch(
        "SELECT product, event_type, user_name, feature, count(*), sum(quantity)::bigint FROM metering.events WHERE tenant_id = $1 "
        "GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4",
        tenant.id,
    )
    return [tuple(row) for row in rows]
