"""Anthropic's usage and cost report, from a scripted server: pages, throttling, breakage and rubbish; and the ledger's sums beside it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
from aiohttp import web

from mesh.metering.v1 import ledger_service_pb2 as pb
from mesh.metering.v1 import reconciliation_service_pb2 as reports_pb
from services.kernel.errors import Unavailable
from services.metering.adapters import json_pages
from services.metering.adapters.anthropic_usage_report import COST_PATH, USAGE_PATH, AnthropicUsageReport
from services.metering.adapters.request_feed import RequestFeed
from services.metering.call import TokenUsage
from services.metering.reconciliation.bucket import Bucket, BucketWidth
from services.metering.reconciliation.feed import Accounts, FeedSum
from tests.metering.feeds import KEY, Answers, cut_at, opened_at, served
from tests.metering.mesh import bill, mesh_of_its_own
from tests.metering.peers import Peers
from tests.metering.test_reconciliation import asked
from tests.support.stores import PostgresStore

DAY = datetime(2026, 3, 1, tzinfo=UTC)
BUCKET = Bucket(DAY, DAY + timedelta(days=1))
HAIKU, SONNET = "claude-haiku-4-5-20251001", "claude-sonnet-4-6"


def result(model: str = HAIKU, tokens: tuple[int, int, int, int, int] = (100, 50, 7, 5, 3), **changes: object) -> dict[str, object]:
    """One row of the usage report."""
    row: dict[str, object] = {
        "model": model,
        "api_key_id": "apikey_1",
        "workspace_id": "wrkspc_1",
        "uncached_input_tokens": tokens[0],
        "output_tokens": tokens[1],
        "cache_read_input_tokens": tokens[2],
        "cache_creation": {"ephemeral_5m_input_tokens": tokens[3], "ephemeral_1h_input_tokens": tokens[4]},
        "server_tool_use": {"web_search_requests": 10},
    }
    return row | changes


def cost(amount: str, model: str | None = HAIKU, **changes: object) -> dict[str, object]:
    """One row of the cost report."""
    return {"amount": amount, "currency": "USD", "cost_type": "tokens", "model": model, "workspace_id": "wrkspc_1"} | changes


def told(*results: object, more: str | None = None, start: datetime = DAY) -> dict[str, object]:
    """A page with one bucket."""
    bucket = {"starting_at": start.isoformat(), "ending_at": (start + timedelta(days=1)).isoformat(), "results": list(results)}
    return {"data": [bucket], "has_more": more is not None, "next_page": more}


@asynccontextmanager
async def reporting(answers: Answers, accounts: Accounts, width: BucketWidth = BucketWidth.HOUR) -> AsyncIterator[AnthropicUsageReport]:
    """The adapter against a server that answers in that order."""
    async with served(answers.answer) as url:
        report = AnthropicUsageReport(base_url=url, admin_key=KEY, accounts=accounts, width=width)
        yield report
        await report.close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that nobody asked for are short here."""
    monkeypatch.setattr(json_pages, "_FIRST_WAIT_SECONDS", 0.001)


async def test_pages_are_added_up_by_model() -> None:
    """Every page is read, with the key and the version, and the same model under its alias is the same model."""
    answers = Answers(told(result(), more="p2"), told(result("claude-haiku-4-5"), result(SONNET)))
    async with reporting(answers, Accounts({})) as report:
        sums = {row.model: row for row in await report.sums(BUCKET)}
    assert sums["claude-haiku-4-5"] == FeedSum("", "claude-haiku-4-5", TokenUsage(200, 100, 14, 10, 6), None)
    assert sums[SONNET].usage == TokenUsage(100, 50, 7, 5, 3)
    first, second = answers.asked
    assert (first.path, first.headers["x-api-key"], first.headers["anthropic-version"]) == (USAGE_PATH, KEY, "2023-06-01")
    assert (first.query["starting_at"], first.query["ending_at"]) == ("2026-03-01T00:00:00Z", "2026-03-02T00:00:00Z")
    assert first.query.getall("group_by[]") == ["model", "api_key_id", "workspace_id"]
    assert (first.query.get("page"), second.query["page"], first.query["bucket_width"]) == (None, "p2", "1h")


async def test_accounts_are_told_apart_by_key_and_workspace() -> None:
    """What belongs to none of them is other products' use, the console's among it."""
    rows = (
        result(),
        result(api_key_id="apikey_2"),
        result(api_key_id="apikey_3", workspace_id="wrkspc_9"),
        result(api_key_id=None, workspace_id=None),
    )
    async with reporting(Answers(told(*rows)), Accounts({"keys": ["apikey_2"], "space": ["wrkspc_9"]})) as report:
        sums = await report.sums(BUCKET)
    assert {row.account for row in sums} == {"keys", "space"}
    assert {row.usage.input for row in sums} == {100}


async def test_whole_days_are_compared_in_money_too() -> None:
    """Cents as decimal text become nano-dollars exactly, half to even; what is not for tokens is not the calls' cost."""
    searches, others, unused = cost("9", None, cost_type="web_search"), cost("5", workspace_id="wrkspc_2"), cost("1", SONNET)
    costs = (cost("0.035"), cost("0.00000015"), searches, others, unused)
    answers = Answers(told(result()), told(*costs))
    async with reporting(answers, Accounts({"space": ["wrkspc_1"]}), BucketWidth.DAY) as report:
        sums = await report.sums(BUCKET)
    assert [(row.model, row.usage.input, row.cost_nano_usd) for row in sums] == [
        ("claude-haiku-4-5", 100, 350_002),
        (SONNET, 0, 10_000_000),
    ]
    assert answers.asked[1].path == COST_PATH
    assert answers.asked[1].query.getall("group_by[]") == ["description", "workspace_id"]


async def test_costs_are_not_asked_for_where_they_are_not_told() -> None:
    """By the hour, or by key, the report has tokens alone."""
    for width, accounts in ((BucketWidth.HOUR, Accounts({})), (BucketWidth.DAY, Accounts({"keys": ["apikey_1"]}))):
        answers = Answers(told(result()))
        async with reporting(answers, accounts, width) as report:
            (row,) = await report.sums(BUCKET)
        assert (row.cost_nano_usd, len(answers.asked)) == (None, 1)


async def test_throttling_and_failures_are_waited_out() -> None:
    """429 with its retry-after, 5xx and a connection that breaks: the same page is asked for again."""
    failures = (web.Response(status=429, headers={"retry-after": "0"}), web.Response(status=529), None, web.Response(status=500))
    answers = Answers(*failures, told(result()))
    async with reporting(answers, Accounts({})) as report:
        assert len(await report.sums(BUCKET)) == 1
    assert len(answers.asked) == 5


@pytest.mark.parametrize(("status", "times"), [(503, 5), (429, 5), (401, 1), (404, 1), (302, 1)])
async def test_a_server_that_keeps_failing_is_unavailable(status: int, times: int) -> None:
    """A few times for what may pass, once for what will not; no redirect is followed, and no error says the key."""
    headers = {"retry-after": "0", "location": "/elsewhere"}
    answers = Answers(*(web.Response(status=status, headers=headers) for _ in range(times)))
    async with reporting(answers, Accounts({})) as report:
        with pytest.raises(Unavailable, match=str(status)) as refused:
            await report.sums(BUCKET)
    assert not answers.answers
    assert KEY not in str(refused.value)


RUBBISH = {
    "no JSON": b"<html>",
    "no object": b"[]",
    "no data": {"has_more": False},
    "data of no objects": {"data": ["x"], "has_more": False},
    "a negative count": told(result(uncached_input_tokens=-1)),
    "a count with a point": told(result(output_tokens=1.0)),
    "a truth for a count": told(result(output_tokens=True)),
    "a count beyond counting": told(result(output_tokens=10**13 + 1)),
    "a model without end": told(result("x" * 201)),
    "no cache": told(result(cache_creation=None)),
    "no model": told(result(model="")),
    "a key id that is a number": told(result(api_key_id=7)),
    "another time": told(result(), start=DAY + timedelta(days=1)),
    "no time": {"data": [{"starting_at": "today", "results": []}], "has_more": False},
    "a time of no zone": {"data": [{"starting_at": "2026-03-01T00:00:00", "results": []}], "has_more": False},
    "more of nothing": told(result()) | {"has_more": True},
}


@pytest.mark.parametrize("answer", RUBBISH.values(), ids=RUBBISH)
async def test_rubbish_concludes_nothing(answer: object) -> None:
    """An answer that is not what the report's contract says is refused as a whole."""
    async with reporting(Answers(answer), Accounts({})) as report:
        with pytest.raises(Unavailable, match="cannot be read"):
            await report.sums(BUCKET)


@pytest.mark.parametrize("amount", ["", "1e400", "NaN", "Infinity", "twelve"])
async def test_an_amount_that_is_no_number_is_refused(amount: str) -> None:
    """Money is never guessed."""
    async with reporting(Answers(told(result()), told(cost(amount))), Accounts({}), BucketWidth.DAY) as report:
        with pytest.raises(Unavailable, match="amount"):
            await report.sums(BUCKET)


async def test_another_currency_is_refused() -> None:
    """US dollars alone."""
    async with reporting(Answers(told(result()), told(cost("1", currency="EUR"))), Accounts({}), BucketWidth.DAY) as report:
        with pytest.raises(Unavailable, match="US dollars"):
            await report.sums(BUCKET)


async def test_pages_that_go_round_or_back_are_refused() -> None:
    """A page told twice would be counted twice."""
    async with reporting(Answers(told(result(), more="a"), told(result(), more="a")), Accounts({})) as report:
        with pytest.raises(Unavailable, match="twice"):
            await report.sums(BUCKET)
    later = told(result(), more="b", start=DAY + timedelta(hours=2))
    async with reporting(Answers(later, told(result())), Accounts({})) as report:
        with pytest.raises(Unavailable, match="order"):
            await report.sums(BUCKET)


async def test_sums_agree_within_what_is_unresolved_and_close_nothing(postgres: PostgresStore, peers: Peers) -> None:
    """More than was settled is explained by calls whose bill is not known, up to their bounds; no call is closed by a sum."""
    settled, unresolved = (100, 50, 0, 0, 0), (10, 5, 0, 0, 0)
    both = tuple(one + other for one, other in zip(settled, unresolved, strict=True))
    beyond = (both[0] + 10_000, *both[1:])
    answers = Answers(told(result(tokens=both)), told(result(tokens=beyond)), told(result(tokens=unresolved)))
    async with served(answers.answer) as url:
        settings = {
            "reconciliation_feed": "anthropic",
            "reconciliation_url": url,
            "reconciliation_api_key": KEY,
            "reconciliation_bucket": "1h",
        }
        async with mesh_of_its_own(postgres, peers, reconciliation_drift_nano_usd=100_000, **settings) as mesh:
            tenant = mesh.new_tenant()
            await mesh.settle(bill((await opened_at(mesh, tenant, DAY)).ref))
            call = await cut_at(mesh, tenant, DAY)
            await mesh.settle(bill((await opened_at(mesh, tenant, DAY, bills_tenant_account=True)).ref))
            request = reports_pb.ReconcileProviderRequest()
            request.start_time.FromDatetime(DAY)
            request.end_time.FromDatetime(DAY + timedelta(hours=1))
            drifts = []
            for _ in range(3):
                done = await asked(mesh.outside.reconciliations.ReconcileProvider, request)
                listed = await asked(mesh.outside.reconciliations.ListReconciliations, reports_pb.ListReconciliationsRequest())
                (report,) = listed.reconciliations
                drifts.append((report.drift.nano_usd, report.is_drifting, done.reconciled_count))
            assert await mesh.state(call.ref) == pb.CALL_STATE_UNRESOLVED
            # A sum without one of its rows is none: its bucket has no report, and the next has one.
            answers.answers += [
                told(result(output_tokens=-1), start=DAY + timedelta(hours=1)),
                told(result(), start=DAY + timedelta(hours=2)),
            ]
            request.start_time.FromDatetime(DAY + timedelta(hours=1))
            request.end_time.FromDatetime(DAY + timedelta(hours=3))
            done = await asked(mesh.outside.reconciliations.ReconcileProvider, request)
            assert (done.bucket_count, done.set_aside_count) == (2, 1)
            listed = await asked(mesh.outside.reconciliations.ListReconciliations, reports_pb.ListReconciliationsRequest())
            assert [item.start_time.ToDatetime(UTC) for item in listed.reconciliations] == [DAY + timedelta(hours=2), DAY]
    # In all 350,000 settled and 5,000,000 at most unresolved; then 10,035,000 more than settled, then 315,000 less.
    assert drifts == [(0, False, 0), (5_035_000, True, 0), (315_000, True, 0)]
    assert (report.kind, report.unresolved_count, report.settled.nano_usd) == (reports_pb.RECONCILIATION_KIND_SUMS, 1, 350_000)


def line(**changes: object) -> dict[str, object]:
    """One request, as a feed of requests tells it."""
    names = ("input_tokens", "output_tokens", "cache_read", "cache_creation_5m", "cache_creation_1h")
    told_ids = {"request_id": "req_1", "call_id": None, "api_key_hash": "k", "model": HAIKU, "outcome": "complete"}
    return told_ids | dict.fromkeys(names, 1) | {"started_at": DAY.isoformat()} | changes


UNREADABLE = {
    "an id that no ledger holds": line(request_id="x" * 201),
    "more tokens than a call has": line(output_tokens=10**8 + 1),
    "no outcome": line(outcome=None),
    "no beginning": line(started_at="soon"),
}


@pytest.mark.parametrize("told_line", UNREADABLE.values(), ids=UNREADABLE)
async def test_a_request_that_no_ledger_could_take_is_set_aside(told_line: dict[str, object]) -> None:
    """With the reason, and with what says which call it may be; the rest of its page is read."""
    answers = Answers({"data": [line(), told_line, "no object"], "has_more": False})
    async with served(answers.answer) as url:
        feed = RequestFeed(url=f"{url}/ledger", api_key=KEY, accounts=Accounts({}))
        page = await anext(feed.requests(BUCKET.start, BUCKET.end))
        await feed.close()
    assert [request.request_id for request in page.requests] == ["req_1"]
    assert [row.request_id for row in page.unread] == [told_line["request_id"], None]
    assert all("cannot be read" in row.why for row in page.unread)


async def test_requests_are_read_as_they_are_told() -> None:
    """Whatever is no call id names no call; without `complete_until` nothing is known to be complete; other keys' requests are left out."""
    rows = [line(call_id="00000000-0000-0000-0000-000000000007"), line(call_id="7", outcome="started"), line(api_key_hash="other")]
    async with served(Answers({"data": rows, "has_more": False}).answer) as url:
        feed = RequestFeed(url=f"{url}/ledger", api_key=KEY, accounts=Accounts({"house": ["k"]}))
        (page,) = [page async for page in feed.requests(BUCKET.start, BUCKET.end)]
        await feed.close()
    assert page.complete_until is None
    assert [(item.call_id and item.call_id.int, item.is_final, item.account) for item in page.requests] == [
        (7, True, "house"),
        (None, False, "house"),
    ]
