"""The models on offer: what each is called, how much it reads and writes, and the page `GET /v1/models` answers with."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from devstack.provider_stub.errors import ApiError, invalid

PAGE_SIZE_DEFAULT = 20
PAGE_SIZE_MAX = 1000


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of the catalogue; both token limits are inclusive."""

    id: str
    display_name: str
    created_at: str
    line: str | None
    max_input_tokens: int = 200_000
    max_tokens: int = 64_000
    prefill: bool = False


KNOWN = (
    Model("claude-sonnet-4-6", "Claude Sonnet 4.6", "2026-02-17T00:00:00Z", "sonnet"),
    Model("claude-opus-4-6", "Claude Opus 4.6", "2026-02-04T00:00:00Z", "opus", max_tokens=128_000),
    Model("claude-haiku-4-5-20251001", "Claude Haiku 4.5", "2025-10-15T00:00:00Z", "haiku", prefill=True),
    Model("claude-haiku-4-5", "Claude Haiku 4.5", "2025-10-15T00:00:00Z", "haiku", prefill=True),
)


def catalogue(model_ids: Iterable[str]) -> Mapping[str, Model]:
    """Return the models with these ids in their order; an id not known here gets the usual limits."""
    known = {model.id: model for model in KNOWN}
    return {model_id: known.get(model_id, Model(model_id, model_id, "1970-01-01T00:00:00Z", None)) for model_id in model_ids}


def find(models: Mapping[str, Model], model_id: str) -> Model:
    """Return the model. Raises: ApiError 404 when it is not on offer."""
    if (model := models.get(model_id)) is None:
        raise ApiError(404, f"model: {model_id}")
    return model


def describe(model: Model) -> dict[str, object]:
    """Return the model as the API shows it."""
    return {
        "type": "model",
        "id": model.id,
        "display_name": model.display_name,
        "created_at": model.created_at,
        "lifecycle": "active",
        "line": model.line,
        "max_input_tokens": model.max_input_tokens,
        "max_tokens": model.max_tokens,
        "capabilities": None,
        "deprecated_at": None,
        "retires_at": None,
    }


def page(models: Mapping[str, Model], query: Mapping[str, str]) -> dict[str, object]:
    """Return one page of models, cut by `limit`, `after_id` and `before_id`."""
    ids = list(models)
    limit = _limit(query.get("limit"))
    before = query.get("before_id")
    start = _position(ids, query.get("after_id"), -1) + 1
    end = _position(ids, before, len(ids))
    window = ids[start:end]
    # A page before a cursor is the one that touches it, so it is cut at its front.
    shown = window[-limit:] if before else window[:limit]
    return {
        "data": [describe(models[model_id]) for model_id in shown],
        "has_more": len(shown) < len(window),
        "first_id": shown[0] if shown else None,
        "last_id": shown[-1] if shown else None,
    }


def _limit(value: str | None) -> int:
    if value is None:
        return PAGE_SIZE_DEFAULT
    if not value.isdecimal() or not 1 <= int(value) <= PAGE_SIZE_MAX:
        raise invalid(f"limit: must be between 1 and {PAGE_SIZE_MAX}")
    return int(value)


def _position(ids: list[str], cursor: str | None, absent: int) -> int:
    if cursor is None:
        return absent
    if cursor not in ids:
        raise invalid("cursor: not a model id")
    return ids.index(cursor)
