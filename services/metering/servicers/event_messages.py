"""Messages of events as values, and values as messages. Refuses what the contract's rules cannot say: NUL in a text, times out of range."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import orjson

from mesh.metering.v1 import event_service_pb2 as pb
from services.kernel.ids import new_uuid7_texts
from services.kernel.rpc.validation import refuse_broken
from services.kernel.timestamps import to_timestamp
from services.metering.event import Event, LedgerEvent, Recorded, RecordOutcome, Reversal, Reversed, content_digest
from services.metering.event_types import Aggregation, EventType, TypeName
from services.metering.servicers.ledger_messages import LAST_SECOND, micros, refuse_nul

# The bounds of the contract; a test holds them together.
_MAX_EVENTS, _MAX_NAME, _MAX_FEATURE, _MAX_QUANTITY = 5_000, 200, 100, 10**12
_MAX_PAIRS, _MAX_KEY, _MAX_VALUE, _MAX_PRODUCT, _MAX_TYPE = 32, 64, 512, 63, 100
_PRODUCT, _TYPE = re.compile("[a-z][a-z0-9_]*"), re.compile("[a-z][a-z0-9_.]*")
_LAST_NANO = 999_999_999
# Looked up once and not for each event.
_CONFLICT = RecordOutcome.CONFLICT
_OUTCOMES = {outcome: pb.RecordEventOutcome.ValueType(outcome) for outcome in RecordOutcome}


def event_type(message: pb.EventType) -> EventType:
    """Reads a type."""
    return EventType(TypeName(message.product, message.type), message.unit, Aggregation(message.aggregation))


def event_type_message(value: EventType) -> pb.EventType:
    """Writes a type."""
    return pb.EventType(
        product=value.name.product, type=value.name.event_type, unit=value.unit, aggregation=pb.Aggregation.ValueType(value.aggregation)
    )


def events(request: pb.RecordEventsRequest, tenant_id: bytes) -> list[Event]:
    """Reads the events and gives each the id it will have. Holds them to the contract. Raises: InvalidRequest."""
    minted = new_uuid7_texts(len(request.events))
    numbered = list(zip(request.events, minted, strict=True))
    try:
        if not 1 <= len(minted) <= _MAX_EVENTS:
            raise _Doubt
        return [_event(message, tenant_id, event_id, is_checked=False) for message, event_id in numbered]
    except _Doubt:
        refuse_broken(request)
        for index, message in enumerate(request.events):
            _refuse_unstorable(message, f"events[{index}]")
        return [_event(message, tenant_id, event_id, is_checked=True) for message, event_id in numbered]


class _Doubt(Exception):
    """It is not plain that the contract is kept: ask `refuse_broken`."""


def _event(message: pb.Event, tenant_id: bytes, event_id: str, *, is_checked: bool) -> Event:
    source, name, product, kind, user, feature = message.source, message.id, message.product, message.type, message.subject, message.feature
    stamp, data = message.time, message.data
    seconds, nanos, quantity, metadata = stamp.seconds, stamp.nanos, data.quantity, data.metadata
    # The rules of the contract, as far as they are plain. What is remembered of types is short.
    if not is_checked and not (
        0 < len(source) <= _MAX_NAME
        and 0 < len(name) <= _MAX_NAME
        and len(user) <= _MAX_NAME
        and len(feature) <= _MAX_FEATURE
        and 0 < quantity <= _MAX_QUANTITY
        and 0 < seconds <= LAST_SECOND
        and 0 <= nanos <= _LAST_NANO
        and len(product) <= _MAX_PRODUCT
        and len(kind) <= _MAX_TYPE
        and _is_type(product, kind)
        and (not metadata or _is_metadata(metadata))
    ):
        raise _Doubt
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
        raise _Doubt
    occurred_us = seconds * 1_000_000 + nanos // 1_000
    return Event(tenant_id, source, name, event_id, digest, product, kind, quantity, occurred_us, user, feature, extra)


@lru_cache(maxsize=1_024)
def _is_type(product: str, kind: str) -> bool:
    return _PRODUCT.fullmatch(product) is not None and _TYPE.fullmatch(kind) is not None


def _is_metadata(metadata: Mapping[str, str]) -> bool:
    return len(metadata) <= _MAX_PAIRS and all(0 < len(key) <= _MAX_KEY and len(value) <= _MAX_VALUE for key, value in metadata.items())


def _refuse_unstorable(message: pb.Event, where: str) -> None:
    texts = [message.source, message.id, message.product, message.type, message.subject, message.feature]
    for pair in message.data.metadata.items():
        texts += pair
    refuse_nul(tuple(texts), where)
    micros(message.time, f"{where}.time")


def record_response(sent: Sequence[Event], recorded: Sequence[Recorded]) -> pb.RecordEventsResponse:
    """Writes what came of each event."""
    response = pb.RecordEventsResponse()
    add = response.results.add
    for event, (outcome, event_id, digest) in zip(sent, recorded, strict=True):
        result = add()
        result.outcome, result.event_id = _OUTCOMES[outcome], event_id
        if outcome is _CONFLICT:
            result.recorded_digest, result.sent_digest = digest, event.digest
    return response


def reversals(request: pb.ReverseEventsRequest, tenant_id: bytes) -> list[Reversal]:
    """Reads the reversals and gives each the id it will have. Raises: InvalidRequest."""
    minted = new_uuid7_texts(len(request.reversals))
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
        response.results.add(outcome=pb.ReverseEventOutcome.ValueType(result.outcome), event_id=result.event_id)
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
