"""A feed of single requests over HTTP: what the provider stub tells of its ledger, and what a gateway with a log of its own could.

Asked for `starting_at`, `ending_at`, `limit` and `page`; a page is `{"data": […], "has_more", "next_page", "complete_until"}`, an item
`{"request_id", "call_id", "api_key_hash", "model", "input_tokens", "output_tokens", "cache_read", "cache_creation_5m", "cache_creation_1h",
"outcome", "started_at"}`. An outcome `started` is one that is not over. An item of another shape is set aside;
a page of another shape is refused whole.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from urllib.parse import urlsplit
from uuid import UUID

from services.metering.adapters.json_pages import (
    MOST_TOKENS_OF_A_REQUEST,
    JsonPages,
    Unreadable,
    listed,
    moment,
    rfc3339,
    text,
    token_count,
)
from services.metering.call import TokenUsage
from services.metering.reconciliation.feed import Accounts, BilledRequest, RequestPage, UnreadRow

_PAGE = "1000"
_NOT_OVER = "started"


class RequestFeed:
    """Reads requests in pages."""

    def __init__(self, *, url: str, api_key: str, accounts: Accounts) -> None:
        parts = urlsplit(url)
        self._path = parts.path
        self._pages = JsonPages(f"{parts.scheme}://{parts.netloc}", {"x-api-key": api_key})
        self._accounts = accounts

    async def close(self) -> None:
        """Closes the connections."""
        await self._pages.close()

    async def requests(self, start: datetime, end: datetime) -> AsyncIterator[RequestPage]:
        """Yields what began from `start` to before `end`, in pages, of the operator's accounts alone. Raises: Unavailable."""
        query = [("starting_at", rfc3339(start)), ("ending_at", rfc3339(end)), ("limit", _PAGE)]
        async for page in self._pages.pages(self._path, query):
            found, unread = self._read(listed(page, "data"))
            complete_until = moment(page, "complete_until") if page.get("complete_until") is not None else None
            yield RequestPage(found, complete_until, unread)

    def _read(self, items: Sequence[object]) -> tuple[list[BilledRequest], list[UnreadRow]]:
        found: list[BilledRequest] = []
        unread: list[UnreadRow] = []
        for item in items:
            row: Mapping[str, object] = item if isinstance(item, dict) else {}
            try:
                request = self._request(row)
            except Unreadable as error:
                unread.append(UnreadRow(error.message, _name(row), _call_id(row.get("call_id"))))
            else:
                found += [] if request is None else [request]
        return found, unread

    def _request(self, item: Mapping[str, object]) -> BilledRequest | None:
        account = self._accounts.of_feed(text(item, "api_key_hash"))
        if account is None:
            return None
        return BilledRequest(
            request_id=text(item, "request_id"),
            call_id=_call_id(item.get("call_id")),
            account=account,
            model=text(item, "model"),
            usage=TokenUsage(
                input=token_count(item, "input_tokens", MOST_TOKENS_OF_A_REQUEST),
                output=token_count(item, "output_tokens", MOST_TOKENS_OF_A_REQUEST),
                cache_read=token_count(item, "cache_read", MOST_TOKENS_OF_A_REQUEST),
                cache_write_5m=token_count(item, "cache_creation_5m", MOST_TOKENS_OF_A_REQUEST),
                cache_write_1h=token_count(item, "cache_creation_1h", MOST_TOKENS_OF_A_REQUEST),
            ),
            is_final=text(item, "outcome") != _NOT_OVER,
            start_time=moment(item, "started_at"),
        )


def _name(row: Mapping[str, object]) -> str | None:
    told = row.get("request_id")
    return told if isinstance(told, str) else None


def _call_id(told: object) -> UUID | None:
    # Whatever is no call id of the mesh's names no call.
    try:
        return UUID(told) if isinstance(told, str) else None
    except ValueError:
        return None
