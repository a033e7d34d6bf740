"""Records of use as CloudEvents, in the structured JSON mode. Source: CloudEvents 1.0, JSON format."""

from collections.abc import Mapping
from datetime import UTC, datetime
from uuid import UUID

import orjson

from services.metering.exports.outgoing import Outgoing, Source

CONTENT_TYPE = "application/cloudevents+json"
_OF_CALLS = {1: "call.settled", 2: "call.reconciled", 3: "call.adjusted"}


def event_type(item: Outgoing, record: Mapping[str, object]) -> str:
    """Names what happened; of a call by the entry's kind."""
    match item.source:
        case Source.CALL:
            return _OF_CALLS[int(str(record["kind"]))]
        case Source.UNIT:
            return "units.used"
        case Source.EVENT:
            return "event.recorded" if record["reverses"] is None else "event.reversed"


def body_of(item: Outgoing, record: Mapping[str, object], region: str) -> bytes:
    """Returns the event: its id is the record's own, its subject the tenant, its time when it was recorded."""
    data = {name: _plain(value) for name, value in record.items() if name != "kind" and value is not None}
    return orjson.dumps(
        {
            "specversion": "1.0",
            "id": item.identifier,
            "source": f"tenantry/{region}",
            "type": event_type(item, record),
            "subject": str(item.key.tenant_id),
            "time": _plain(item.record_time),
            "datacontenttype": "application/json",
            "data": data,
        }
    )


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return str(value) if isinstance(value, UUID) else value
