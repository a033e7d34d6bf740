"""Point ids and payloads, both ways between the wire and the engine's Python values."""

from collections.abc import Mapping, MutableMapping
from uuid import UUID

from qdrant_client import grpc as q
from qdrant_client.grpc import json_with_int_pb2 as wire

from .access import Json
from .failure import wrong_input

EngineId = int | str | UUID


def point_id(sent: q.PointId) -> EngineId:
    """Read an id: an unsigned integer, or a UUID in its canonical text."""
    match sent.WhichOneof("point_id_options"):
        case "num":
            return sent.num
        case "uuid":
            try:
                return str(UUID(sent.uuid))
            except ValueError:
                raise wrong_input(f"Unable to parse UUID: {sent.uuid}") from None
    raise wrong_input("No ID options provided")


def wire_point_id(known: EngineId) -> q.PointId:
    """Write an id."""
    return q.PointId(num=known) if isinstance(known, int) else q.PointId(uuid=str(known))


def payload(sent: Mapping[str, wire.Value]) -> dict[str, Json]:
    """Read a payload."""
    return {key: _value(value) for key, value in sent.items()}


def _value(sent: wire.Value) -> Json:
    match sent.WhichOneof("kind"):
        case "struct_value":
            return payload(sent.struct_value.fields)
        case "list_value":
            return [_value(item) for item in sent.list_value.values]
        case None | "null_value":
            return None
        case kind:
            scalar: Json = getattr(sent, kind)
            return scalar


def fill_payload(target: MutableMapping[str, wire.Value], known: Mapping[str, Json] | None) -> None:
    """Write a payload into a message's map."""
    for key, value in (known or {}).items():
        _fill(target[key], value)


def _fill(target: wire.Value, known: Json) -> None:
    match known:
        case None:
            target.null_value = wire.NULL_VALUE
        case bool():  # before int: a bool is one
            target.bool_value = known
        case int():
            target.integer_value = known
        case float():
            target.double_value = known
        case str():
            target.string_value = known
        case list():
            target.list_value.SetInParent()
            for item in known:
                _fill(target.list_value.values.add(), item)
        case _:
            target.struct_value.SetInParent()
            fill_payload(target.struct_value.fields, known)
