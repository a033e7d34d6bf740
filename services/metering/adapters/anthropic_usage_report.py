"""Anthropic's own account of usage: the Admin API's usage report by tokens, and for whole days its cost report in money.

Source: "Get Messages Usage Report" and "Get Cost Report", platform.claude.com/docs/en/api/admin/usage_report/retrieve_messages and
…/cost_report/retrieve, as published in February 2026: buckets of 1m, 1h or 1d snapped to UTC, `group_by[]`, pages by `has_more` and
`next_page`; the amount is in cents, as decimal text; cost is told by day, workspace and description, never by key.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from itertools import pairwise

from services.metering.adapters.json_pages import (
    FEED,
    MOST_TOKENS_OF_A_BUCKET,
    JsonPages,
    Unreadable,
    moment,
    objects,
    rfc3339,
    text,
    token_count,
    unreadable,
)
from services.metering.call import TokenUsage
from services.metering.reconciliation.bucket import Bucket, BucketWidth
from services.metering.reconciliation.feed import Accounts, FeedSum, RowUnreadable
from services.metering.reconciliation.report import add, undated

ANTHROPIC_URL = "https://api.anthropic.com"
USAGE_PATH = "/v1/organizations/usage_report/messages"
COST_PATH = "/v1/organizations/cost_report"
_VERSION = "2023-06-01"
_WORKSPACE = "wrkspc_"
_NANO_USD_PER_CENT = 10_000_000
# A hundred million dollars: in nano-dollars the sum of many still fits 64 bits.
_MOST_CENTS = 10**10


class AnthropicUsageReport:
    """Reads the sums of one bucket at a time, with an Admin API key."""

    def __init__(self, *, base_url: str, admin_key: str, accounts: Accounts, width: BucketWidth) -> None:
        self._pages = JsonPages(base_url or ANTHROPIC_URL, {"x-api-key": admin_key, "anthropic-version": _VERSION})
        self._accounts = accounts
        self._width = width

    async def close(self) -> None:
        """Closes the connections."""
        await self._pages.close()

    async def sums(self, bucket: Bucket) -> Sequence[FeedSum]:
        """Returns what was used in the bucket, by account and model. Raises: Unavailable; RowUnreadable where it is this bucket's alone."""
        usage: dict[str, dict[str, TokenUsage]] = {}
        groups = [("group_by[]", name) for name in ("model", "api_key_id", "workspace_id")]
        for result in await self._results(USAGE_PATH, bucket, groups):
            with _one_row():
                account = self._accounts.of_feed(_id(result, "api_key_id"), _id(result, "workspace_id"))
                if account is not None:
                    add(usage.setdefault(account, {}), text(result, "model"), _usage(result))
        sums = [FeedSum(account, model, tokens, None) for account, models in usage.items() for model, tokens in models.items()]
        return await self._with_costs(bucket, sums) if self._tells_costs else sums

    @property
    def _tells_costs(self) -> bool:
        # Costs are told by day, and by workspace but not by key.
        by_workspace = all(feed_id.startswith(_WORKSPACE) for feed_id in self._accounts.ids)
        return self._width is BucketWidth.DAY and by_workspace

    async def _with_costs(self, bucket: Bucket, sums: Sequence[FeedSum]) -> Sequence[FeedSum]:
        costs: dict[tuple[str, str], Decimal] = {}
        groups = [("group_by[]", name) for name in ("description", "workspace_id")]
        for result in await self._results(COST_PATH, bucket, groups):
            with _one_row():
                account = self._accounts.of_feed(_id(result, "workspace_id"))
                # Searches and code execution are no tokens, and no call of the ledger's.
                if account is not None and result.get("cost_type") == "tokens":
                    key = account, undated(text(result, "model"))
                    costs[key] = costs.get(key, Decimal(0)) + _cents(result)
        told = {(row.account, row.model): row for row in sums}
        # What costs and has no tokens, or the other way round, is a difference to be seen.
        keys = sorted(told.keys() | costs.keys())
        return [
            replace(told.get(key) or FeedSum(*key, TokenUsage(), None), cost_nano_usd=_nano_usd(costs.get(key, Decimal(0)))) for key in keys
        ]

    async def _results(self, path: str, bucket: Bucket, groups: Sequence[tuple[str, str]]) -> list[Mapping[str, object]]:
        query = [
            ("starting_at", rfc3339(bucket.start)),
            ("ending_at", rfc3339(bucket.end)),
            ("bucket_width", self._width.value),
            *groups,
        ]
        found: list[Mapping[str, object]] = []
        starts = []
        async for page in self._pages.pages(path, query):
            for item in objects(page, "data"):
                start = moment(item, "starting_at")
                if not bucket.holds(start):
                    raise unreadable("it tells of a time it was not asked for")
                starts.append(start)
                found += objects(item, "results")
        # One bucket may go over several pages, but never come again after another.
        if any(later < earlier for earlier, later in pairwise(starts)):
            raise unreadable("its buckets are out of order")
        return found


@contextmanager
def _one_row() -> Iterator[None]:
    try:
        yield
    except Unreadable as error:
        raise RowUnreadable(FEED, error.message, error.retry_after_seconds) from None


def _id(result: Mapping[str, object], name: str) -> str:
    # The console and the default workspace have none.
    return "" if result.get(name) is None else text(result, name)


def _usage(result: Mapping[str, object]) -> TokenUsage:
    written = result.get("cache_creation")
    if not isinstance(written, dict):
        raise unreadable("cache_creation is no object")
    return TokenUsage(
        input=token_count(result, "uncached_input_tokens", MOST_TOKENS_OF_A_BUCKET),
        output=token_count(result, "output_tokens", MOST_TOKENS_OF_A_BUCKET),
        cache_read=token_count(result, "cache_read_input_tokens", MOST_TOKENS_OF_A_BUCKET),
        cache_write_5m=token_count(written, "ephemeral_5m_input_tokens", MOST_TOKENS_OF_A_BUCKET),
        cache_write_1h=token_count(written, "ephemeral_1h_input_tokens", MOST_TOKENS_OF_A_BUCKET),
    )


def _cents(result: Mapping[str, object]) -> Decimal:
    if result.get("currency") != "USD":
        raise unreadable("an amount is not in US dollars")
    try:
        amount = Decimal(text(result, "amount"))
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or abs(amount) > _MOST_CENTS:
        raise unreadable("amount is no number")
    return amount


def _nano_usd(cents: Decimal) -> int:
    return int((cents * _NANO_USD_PER_CENT).to_integral_value(ROUND_HALF_EVEN))
