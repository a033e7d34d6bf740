"""The columns of exported rows: one list for every form of file. Times are of UTC, amounts integers of nano-USD."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from mesh.metering.v1 import invoice_service_pb2

# A row as the contract has it: which fields it has is the columns' to know.
Message = Any
Value = str | int | datetime


class Kind(Enum):
    """What a column holds."""

    TEXT = "text"
    INTEGER = "integer"
    TIME = "time"


@dataclass(frozen=True, slots=True)
class Column:
    """A column, and how its value is read of a row."""

    name: str
    kind: Kind
    read: Callable[[Message], Value]


def _text(name: str) -> Column:
    return Column(name, Kind.TEXT, lambda row: str(getattr(row, name)))


def _integer(name: str) -> Column:
    return Column(name, Kind.INTEGER, lambda row: int(getattr(row, name)))


def _time(name: str) -> Column:
    return Column(name, Kind.TIME, lambda row: _moment(getattr(row, name)))


def _moment(stamp: Timestamp) -> datetime:
    moment: datetime = stamp.ToDatetime(tzinfo=UTC)
    return moment


def _tokens(name: str) -> Column:
    return Column(name, Kind.INTEGER, lambda row: int(getattr(row.tokens, name)))


_ALL_TOKENS = tuple(map(_tokens, ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens")))
_COST = Column("cost_nano_usd", Kind.INTEGER, lambda row: int(row.cost.nano_usd))
_SOURCE = Column(
    "source", Kind.TEXT, lambda row: str(invoice_service_pb2.UsageSource.Name(row.source).removeprefix("USAGE_SOURCE_").lower())
)
COLUMNS: dict[str, Sequence[Column]] = {
    "entries": (
        _text("entry_id"),
        _SOURCE,
        *map(_text, ("reservation_id", "call_id")),
        _integer("number"),
        *map(_time, ("use_time", "record_time")),
        *map(_text, ("provider", "model", "price_version", "feature", "user", "prompt_version", "tier")),
        *_ALL_TOKENS,
        _COST,
        _text("product_unit"),
        _integer("quantity"),
    ),
    "events": (
        *map(_text, ("event_id", "id", "source", "product", "type", "user", "feature")),
        _integer("quantity"),
        *map(_time, ("use_time", "record_time")),
        *map(_text, ("reverses", "metadata_json")),
    ),
    "usage": (
        Column("day", Kind.TIME, lambda row: _moment(row.bucket_start_time)),
        *map(_text, ("user", "feature", "model", "prompt_version", "provider", "tier", "product_unit")),
        *map(_text, ("event_type", "refusal_reason", "refusal_rule")),
        *map(_integer, ("settled_count", "void_count", "unresolved_count", "reconciled_count", "retry_count")),
        *_ALL_TOKENS,
        _COST,
        *map(_integer, ("quantity", "refusal_count")),
    ),
}
