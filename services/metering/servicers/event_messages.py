"""Messages of events as values, and values as messages. Refuses what the contract's rules cannot say: NUL in a text, times out of range."""

from collections.abc import Sequence

import orjson

from mesh.metering.v1 import event_service_pb2 as pb
from services.kernel.errors import InvalidRequest
from services.kernel.ids import new_uuid7s
from services.kernel.timestamps import to_timestamp
from services.metering.event import Event, LedgerEvent, Recorded, RecordOutcome, Reversal, Reversed, content_digest
from services.metering.event_types import Aggregation, EventType, TypeName
from services.metering.servicers.ledger_messages import micros, refuse_nul


def event_type(message: pb.EventType) -> EventType:
    """Reads a type."""
    return EventType(TypeName(message.product, message.type), message.unit, Aggregation(message.aggregation))


def event_type_message(value: EventType) -> pb.EventType:
    """Writes a type."""
    return pb.EventType(
        product=value.name.product, type=value.name.event_type, unit=value.unit, aggregation=pb.Aggregation.ValueType(value.aggregation)
    )


def events(request: pb.RecordEventsRequest, tenant_id: bytes) -> list[Event]:
    """Reads the events and gives each the id it will have. Raises: InvalidRequest."""
    minted = new_uuid7s(len(request.events))
    return [_event(message, index, tenant_id, minted[index]) for index, message in enumerate(request.events)]


def _event(message: pb.Event, index: int, tenant_id: bytes, event_id: bytes) -> Event:
    source, name, product, kind = message.source, message.id, message.product, message.type
    user, feature, quantity, metadata = message.subject, message.feature, message.data.quantity, message.data.metadata
    # What the event is. When it happened is no part of it.
    texts = [source, name, product, kind, str(quantity), user, feature]
    extra = None
    if metadata:
        pairs = dict(metadata)
        for key in sorted(pairs):
            texts += (key, pairs[key])
        extra = orjson.dumps(pairs).decode()
    digest = content_digest(texts)
    if digest is None:
        raise InvalidRequest(f"events[{index}]", "texts must not contain the NUL character")
    occurred_us = micros(message.time, f"events[{index}].time")
    return Event(tenant_id, source, name, event_id, digest, product, kind, quantity, occurred_us, user, feature, extra)


def record_response(sent: Sequence[Event], recorded: Sequence[Recorded]) -> pb.RecordEventsResponse:
    """Writes what came of each event."""
    response = pb.RecordEventsResponse()
    add = response.results.add
    for event, result in zip(sent, recorded, strict=True):
        if result.outcome is RecordOutcome.CONFLICT:
            add(outcome=result.outcome, event_id=_text(result.event_id), recorded_digest=result.digest, sent_digest=event.digest)
        else:
            add(outcome=result.outcome, event_id=_text(result.event_id))
    return response


def reversals(request: pb.ReverseEventsRequest, tenant_id: bytes) -> list[Reversal]:
    """Reads the reversals and gives each the id it will have. Raises: InvalidRequest."""
    minted = new_uuid7s(len(request.reversals))
    for index, message in enumerate(request.reversals):
        refuse_nul((message.id, message.source, message.reason), f"reversals[{index}]")
    return [
        Reversal(tenant_id, message.source, message.id, event_id, message.reason)
        for message, event_id in zip(request.reversals, minted, strict=True)
    ]


def reverse_response(outcomes: Sequence[Reversed]) -> pb.ReverseEventsResponse:
    """Writes what came of each reversal."""
    response = pb.ReverseEventsResponse()
    for result in outcomes:
        response.results.add(outcome=pb.ReverseEventOutcome.ValueType(result.outcome), event_id=_text(result.event_id))
    return response


def recorded_event(row: LedgerEvent) -> pb.RecordedEvent:
    """Writes a row of the ledger."""
    metadata = {} if row.metadata is None else orjson.loads(row.metadata)
    event = pb.Event(
        id=row.id,
        source=row.source,
        product=row.product,
        type=row.event_type,
        subject=row.user,
        time=to_timestamp(row.occurred_at),
        feature=row.feature,
        data=pb.EventData(quantity=row.quantity, metadata=metadata),
    )
    return pb.RecordedEvent(
        event_id=str(row.event_id),
        event=event,
        record_time=to_timestamp(row.record_time),
        reverses="" if row.reverses is None else str(row.reverses),
    )


def _text(event_id: bytes) -> str:
    # As a UUID writes itself, at a third of the price: thousands are written at once.
    digits = event_id.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}" if digits else ""
