"""Payload indexes, from the wire to the engine's parameters and back as types. Refuses stop words, stemmers and scoring of text indexes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.message import Message
from qdrant_client import grpc as q
from qdrant_edge import (
    BoolIndexParams,
    DatetimeIndexParams,
    FloatIndexParams,
    IntegerIndexParams,
    KeywordIndexParams,
    PayloadSchemaType,
    TextIndexParams,
    TokenizerType,
    UuidIndexParams,
)

from .accepted import accept_only
from .failure import unimplemented, wrong_input

if TYPE_CHECKING:  # named by the engine's stubs, absent from its module
    from qdrant_edge import PayloadIndexInfo

EngineSchema = (
    PayloadSchemaType
    | KeywordIndexParams
    | IntegerIndexParams
    | FloatIndexParams
    | BoolIndexParams
    | TextIndexParams
    | UuidIndexParams
    | DatetimeIndexParams
)


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of index: the engine's type, its parameters' class and the plain fields both sides name alike."""

    schema: PayloadSchemaType
    wire_schema: q.PayloadSchemaType.ValueType
    params: type
    fields: tuple[str, ...]


_KINDS: Mapping[str, _Kind] = {
    "keyword": _Kind(PayloadSchemaType.Keyword, q.Keyword, KeywordIndexParams, ("is_tenant", "on_disk", "enable_hnsw")),
    "integer": _Kind(
        PayloadSchemaType.Integer, q.Integer, IntegerIndexParams, ("lookup", "range", "is_principal", "on_disk", "enable_hnsw")
    ),
    "float": _Kind(PayloadSchemaType.Float, q.Float, FloatIndexParams, ("is_principal", "on_disk", "enable_hnsw")),
    "bool": _Kind(PayloadSchemaType.Bool, q.Bool, BoolIndexParams, ("on_disk", "enable_hnsw")),
    "text": _Kind(
        PayloadSchemaType.Text,
        q.Text,
        TextIndexParams,
        ("min_token_len", "max_token_len", "lowercase", "ascii_folding", "phrase_matching", "on_disk", "enable_hnsw"),
    ),
    "datetime": _Kind(PayloadSchemaType.Datetime, q.Datetime, DatetimeIndexParams, ("is_principal", "on_disk", "enable_hnsw")),
    "uuid": _Kind(PayloadSchemaType.Uuid, q.Uuid, UuidIndexParams, ("is_tenant", "on_disk", "enable_hnsw")),
}
_FIELD_TYPES = {
    q.FieldTypeKeyword: "keyword",
    q.FieldTypeInteger: "integer",
    q.FieldTypeFloat: "float",
    q.FieldTypeBool: "bool",
    q.FieldTypeText: "text",
    q.FieldTypeDatetime: "datetime",
    q.FieldTypeUuid: "uuid",
}
_TOKENIZERS = {
    q.Prefix: TokenizerType.Prefix,
    q.Whitespace: TokenizerType.Whitespace,
    q.Word: TokenizerType.Word,
    q.Multilingual: TokenizerType.Multilingual,
}


def index_schema(request: q.CreateFieldIndexCollection) -> EngineSchema:
    """Return what the engine is to build: a bare type, or a type with its parameters when the request carries any.

    Raises:
        Failure: UNIMPLEMENTED for a kind or parameter not served, INVALID_ARGUMENT when type and parameters disagree.
    """
    declared = _declared_kind(request)
    variant = request.field_index_params.WhichOneof("index_params")
    if variant is None:
        if declared is None:
            raise wrong_input("field_type or field_index_params must be given")
        return _KINDS[declared].schema
    name = variant.removesuffix("_index_params")
    if name not in _KINDS:
        raise unimplemented(f"PayloadIndexParams.{variant}")
    if declared not in (None, name):
        raise wrong_input(f"field_type {declared} does not agree with {variant}")
    return _with_params(_KINDS[name], getattr(request.field_index_params, variant))


def _declared_kind(request: q.CreateFieldIndexCollection) -> str | None:
    if not request.HasField("field_type"):
        return None
    if request.field_type not in _FIELD_TYPES:
        raise unimplemented(f"CreateFieldIndexCollection.field_type {q.FieldType.Name(request.field_type)}")
    return _FIELD_TYPES[request.field_type]


def _with_params(kind: _Kind, params: Message) -> EngineSchema:
    arguments: dict[str, object] = {name: getattr(params, name) for name in kind.fields if params.HasField(name)}
    if isinstance(params, q.TextIndexParams):
        accept_only(params, "tokenizer", *kind.fields)
        if params.tokenizer:
            if params.tokenizer not in _TOKENIZERS:
                raise unimplemented(f"TextIndexParams.tokenizer {q.TokenizerType.Name(params.tokenizer)}")
            arguments["tokenizer"] = _TOKENIZERS[params.tokenizer]
    else:
        accept_only(params, *kind.fields)
    built: EngineSchema = kind.params(**arguments)
    return built


def schema_info(index: "PayloadIndexInfo") -> q.PayloadSchemaInfo:
    """Describe an index by its type and the number of points in it."""
    wire = next((kind.wire_schema for kind in _KINDS.values() if kind.schema == index.data_type), q.UnknownType)
    return q.PayloadSchemaInfo(data_type=wire, points=index.points)
