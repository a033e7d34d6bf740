"""The ledger as a usage feed: the requests of a stretch of time in pages, in the order they began. Pure."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from devstack.provider_stub.errors import invalid

LIMIT_MAX = 1000


def page(lines: Sequence[Mapping[str, object]], query: Mapping[str, str], read_time: datetime) -> dict[str, object]:
    """Return the requests that began from `starting_at` to before `ending_at`, `limit` of them after `page`; all without a query.

    `complete_until` is when the ledger was read: whatever had begun by then is in it. Raises: ApiError 400 for a query it cannot read.
    """
    start, end = _moment(query, "starting_at"), _moment(query, "ending_at")
    wanted = [line for line in lines if _is_within(datetime.fromisoformat(str(line["started_at"])), start, end)]
    limit, after = _number(query, "limit", len(wanted)), _number(query, "page", 0)
    shown = wanted[after : after + limit]
    has_more = after + limit < len(wanted)
    return {
        "data": shown,
        "has_more": has_more,
        # Requests are only ever added at the end: a position stays true.
        "next_page": str(after + limit) if has_more else None,
        "complete_until": read_time.isoformat(),
    }


def _is_within(moment: datetime, start: datetime | None, end: datetime | None) -> bool:
    return (start is None or moment >= start) and (end is None or moment < end)


def _moment(query: Mapping[str, str], name: str) -> datetime | None:
    if name not in query:
        return None
    try:
        moment = datetime.fromisoformat(query[name])
    except ValueError:
        raise invalid(f"{name}: Input should be a valid datetime") from None
    if moment.tzinfo is None:
        raise invalid(f"{name}: Input should have timezone info")
    return moment


def _number(query: Mapping[str, str], name: str, otherwise: int) -> int:
    value = query.get(name)
    if value is None:
        return otherwise
    if not (value.isascii() and value.isdecimal() and len(value) <= 9) or (name == "limit" and not 1 <= int(value) <= LIMIT_MAX):
        raise invalid(f"{name}: Input should be a whole number" + (f" from 1 to {LIMIT_MAX}" if name == "limit" else ""))
    return int(value)
