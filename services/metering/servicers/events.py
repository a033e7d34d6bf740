"""mesh.metering.v1.EventService: messages in, the log's answers out."""

import structlog

from mesh.metering.v1 import event_service_pb2 as pb
from mesh.metering.v1 import event_service_pb2_grpc
from services.kernel.paging import cut_page, page_size
from services.kernel.request_context import current_tenant, current_tenant_id, operator_reason
from services.metering.event_log import EventLog, event_page_token
from services.metering.event_types import EventTypeCatalog, type_page_token
from services.metering.servicers import event_messages as messages

log = structlog.get_logger(__name__)

# Events come by the thousand: they are held to the contract while they are read.
OWN_CHECKS = frozenset(("/mesh.metering.v1.EventService/RecordEvents",))


class EventServicer(event_service_pb2_grpc.EventServiceServicer):
    """Records events of one tenant, and knows the types of all."""

    def __init__(self, events: EventLog, types: EventTypeCatalog) -> None:
        self._events = events
        self._types = types

    async def RegisterEventType(self, request: pb.RegisterEventTypeRequest, context: object) -> pb.RegisterEventTypeResponse:
        """Makes a type known."""
        wanted = messages.event_type(request.event_type)
        await self._types.register(wanted)
        log.info("event_type_registered", **wanted.name._asdict(), operator=current_tenant().subject, reason=operator_reason())
        return pb.RegisterEventTypeResponse(event_type=request.event_type)

    async def ListEventTypes(self, request: pb.ListEventTypesRequest, context: object) -> pb.ListEventTypesResponse:
        """Lists types by name."""
        size = page_size(request.page_size)
        page, following = cut_page(await self._types.page(request.page_token, size + 1), size, type_page_token)
        return pb.ListEventTypesResponse(event_types=[messages.event_type_message(item) for item in page], next_page_token=following)

    async def RecordEvents(self, request: pb.RecordEventsRequest, context: object) -> pb.RecordEventsResponse:
        """Records events of the call's tenant."""
        events = messages.events(request, current_tenant_id().bytes)
        return messages.record_response(events, await self._events.record(events))

    async def ReverseEvents(self, request: pb.ReverseEventsRequest, context: object) -> pb.ReverseEventsResponse:
        """Takes events of the call's tenant back."""
        return messages.reverse_response(await self._events.reverse(messages.reversals(request, current_tenant_id().bytes)))

    async def ListEvents(self, request: pb.ListEventsRequest, context: object) -> pb.ListEventsResponse:
        """Lists the tenant's events, last recorded first."""
        tenant_id, size = current_tenant_id(), page_size(request.page_size)
        found = await self._events.page(tenant_id, request.page_token, size + 1)
        page, following = cut_page(found, size, lambda last: event_page_token(last, tenant_id))
        return pb.ListEventsResponse(events=[messages.recorded_event(row) for row in page], next_page_token=following)
