"""EventService on the wire."""

from mesh.tenant.v1 import event_service_pb2 as messages
from mesh.tenant.v1 import event_service_pb2_grpc
from services.kernel.ids import TenantId, parse_uuid
from services.kernel.paging import cut_page, decode_page_token, encode_page_token, page_size, refused_page_token
from services.tenant.events import EventDesk
from services.tenant.servicers.life_messages import event_message, event_state

_LISTING = "events"
_MAX_DIGITS = 18


class EventServicer(event_service_pb2_grpc.EventServiceServicer):
    """Lists and replays events of all tenants, for operators."""

    def __init__(self, desk: EventDesk) -> None:
        self._desk = desk

    async def ListEvents(self, request: messages.ListEventsRequest, context: object) -> messages.ListEventsResponse:
        """Lists events, newest first."""
        size = page_size(request.page_size)
        found = await self._desk.list(event_state(request.state), _before(request.page_token), size + 1)
        page, following = cut_page(found, size, lambda last: encode_page_token(_LISTING, [str(last.position)]))
        return messages.ListEventsResponse(events=[event_message(event) for event in page], next_page_token=following)

    async def ReplayEvent(self, request: messages.ReplayEventRequest, context: object) -> messages.ReplayEventResponse:
        """Sends an event again."""
        tenant_id = TenantId(parse_uuid(request.tenant_id, "tenant_id"))
        event = await self._desk.replay(tenant_id, parse_uuid(request.event_id, "event_id"))
        return messages.ReplayEventResponse(event=event_message(event))


def _before(page_token: str) -> int | None:
    position = decode_page_token(page_token, _LISTING, 1)
    if position is None:
        return None
    [text] = position
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS):
        raise refused_page_token()
    return int(text)
