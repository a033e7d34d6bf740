"""Filters, clause by clause, to the engine's own filter classes. Refuses the slice condition, which the engine does not have."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from qdrant_client import grpc as q
from qdrant_edge import (
    FieldCondition,
    Filter,
    GeoBoundingBox,
    GeoPoint,
    GeoPolygon,
    GeoRadius,
    HasIdCondition,
    HasVectorCondition,
    IsEmptyCondition,
    IsNullCondition,
    MatchAny,
    MatchExcept,
    MatchPhrase,
    MatchPrefix,
    MatchSubstring,
    MatchText,
    MatchTextAny,
    MatchValue,
    MinShould,
    NestedCondition,
    RangeDateTime,
    RangeFloat,
    ValuesCount,
)

from .accepted import accept_only
from .convert_values import point_id
from .failure import unimplemented, wrong_input

DEEPEST_NESTING = 32

Condition = FieldCondition | IsEmptyCondition | IsNullCondition | HasIdCondition | HasVectorCondition | NestedCondition | Filter
Match = MatchValue | MatchText | MatchTextAny | MatchPhrase | MatchPrefix | MatchSubstring | MatchAny | MatchExcept


def engine_filter(sent: q.Filter, depth: int = 0) -> Filter:
    """Read a filter; an empty one matches everything."""
    if depth > DEEPEST_NESTING:
        raise wrong_input(f"filter is nested deeper than {DEEPEST_NESTING}")
    accept_only(sent, "should", "must", "must_not", "min_should")
    min_should = None
    if sent.HasField("min_should"):
        min_should = MinShould(_conditions(sent.min_should.conditions, depth), sent.min_should.min_count)
    return Filter(
        must=_conditions(sent.must, depth) or None,
        should=_conditions(sent.should, depth) or None,
        must_not=_conditions(sent.must_not, depth) or None,
        min_should=min_should,
    )


def _conditions(sent: Iterable[q.Condition], depth: int) -> list[Condition]:
    return [_condition(condition, depth) for condition in sent]


def _condition(sent: q.Condition, depth: int) -> Condition:
    match sent.WhichOneof("condition_one_of"):
        case "field":
            return _field(sent.field)
        case "is_empty":
            return IsEmptyCondition(sent.is_empty.key)
        case "is_null":
            return IsNullCondition(sent.is_null.key)
        case "has_id":
            return HasIdCondition({point_id(known) for known in sent.has_id.has_id})
        case "has_vector":
            return HasVectorCondition(sent.has_vector.has_vector)
        case "nested":
            return NestedCondition(sent.nested.key, engine_filter(sent.nested.filter, depth + 1))
        case "filter":
            return engine_filter(sent.filter, depth + 1)
        case None:
            raise wrong_input("a filter condition is empty")
        case other:
            raise unimplemented(f"Condition.{other}")


def _field(sent: q.FieldCondition) -> FieldCondition:
    accept_only(
        sent,
        *("key", "match", "range", "datetime_range", "is_empty", "is_null"),
        *("geo_bounding_box", "geo_radius", "geo_polygon", "values_count"),
    )
    if len(sent.ListFields()) < 2:
        raise wrong_input(f"the condition on field {sent.key} asks for nothing")
    if sent.HasField("range") and sent.HasField("datetime_range"):
        raise wrong_input(f"the condition on field {sent.key} has both range and datetime_range")
    return FieldCondition(
        sent.key,
        match=_match(sent.match) if sent.HasField("match") else None,
        range=_range(sent),
        geo_bounding_box=_box(sent.geo_bounding_box) if sent.HasField("geo_bounding_box") else None,
        geo_radius=GeoRadius(_geo(sent.geo_radius.center), sent.geo_radius.radius) if sent.HasField("geo_radius") else None,
        geo_polygon=_polygon(sent.geo_polygon) if sent.HasField("geo_polygon") else None,
        values_count=ValuesCount(**_bounds(sent.values_count)) if sent.HasField("values_count") else None,
        is_empty=sent.is_empty if sent.HasField("is_empty") else None,
        is_null=sent.is_null if sent.HasField("is_null") else None,
    )


# The engine tries an integer before a bool, and Python's bool is one, so True would match nothing; numpy's is not.
_MATCHES: Mapping[str, Callable[[q.Match], Match]] = {
    "keyword": lambda sent: MatchValue(sent.keyword),
    "integer": lambda sent: MatchValue(sent.integer),
    "boolean": lambda sent: MatchValue(cast(bool, numpy.bool_(sent.boolean))),
    "text": lambda sent: MatchText(sent.text),
    "text_any": lambda sent: MatchTextAny(sent.text_any),
    "phrase": lambda sent: MatchPhrase(sent.phrase),
    "prefix": lambda sent: MatchPrefix(sent.prefix),
    "substring": lambda sent: MatchSubstring(sent.substring),
    "keywords": lambda sent: MatchAny(list(sent.keywords.strings)),
    "integers": lambda sent: MatchAny(list(sent.integers.integers)),
    "except_keywords": lambda sent: MatchExcept(list(sent.except_keywords.strings)),
    "except_integers": lambda sent: MatchExcept(list(sent.except_integers.integers)),
}


def _match(sent: q.Match) -> Match:
    kind = sent.WhichOneof("match_value")
    if kind is None:
        raise wrong_input("a match condition is empty")
    if kind not in _MATCHES:
        raise unimplemented(f"Match.{kind}")
    return _MATCHES[kind](sent)


def _range(sent: q.FieldCondition) -> RangeFloat | RangeDateTime | None:
    if sent.HasField("range"):
        return RangeFloat(**_bounds(sent.range))
    if sent.HasField("datetime_range"):
        return RangeDateTime(**{name: _rfc3339(bound) for name, bound in _bounds(sent.datetime_range).items()})
    return None


def _bounds(sent: Message) -> dict[str, Any]:
    return {name: getattr(sent, name) for name in ("lt", "gt", "gte", "lte") if sent.HasField(name)}


def _rfc3339(bound: Timestamp) -> str:
    return bound.ToJsonString()


def _geo(sent: q.GeoPoint) -> GeoPoint:
    return GeoPoint(lon=sent.lon, lat=sent.lat)


def _box(sent: q.GeoBoundingBox) -> GeoBoundingBox:
    return GeoBoundingBox(_geo(sent.top_left), _geo(sent.bottom_right))


def _polygon(sent: q.GeoPolygon) -> GeoPolygon:
    rings = [[_geo(corner) for corner in line.points] for line in sent.interiors]
    return GeoPolygon([_geo(corner) for corner in sent.exterior.points], rings or None)
