"""The rules of reconciliation as functions: which request is which call's, what that concludes, and what a difference amounts to."""

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kernel.errors import Unavailable
from services.kernel.telemetry.metrics import Counter, otlp_counters
from services.metering.call import CallState, PriceKey, TokenUsage
from services.metering.outbox import CallEnd
from services.metering.price_book import PriceVersion
from services.metering.price_catalog import PriceCatalog
from services.metering.rating import ClassPrices, cost_nano_usd
from services.metering.reconciliation import by_requests_report, by_sums
from services.metering.reconciliation.bucket import Bucket, BucketWidth, bucket_count, buckets
from services.metering.reconciliation.by_requests import MARGIN, Requests, closings, match
from services.metering.reconciliation.comparing import Outcome, RequestsComparison, Terms, too_many
from services.metering.reconciliation.feed import Accounts, BilledRequest, FeedSum, RequestPage, UnreadRow
from services.metering.reconciliation.job import ReconciliationJob
from services.metering.reconciliation.ledger_call import LedgerCall, LedgerSum, RatedClosing
from services.metering.reconciliation.reconciler import Reconciler
from services.metering.reconciliation.report import Counts, Rates, Report, Thresholds

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
BUCKET = Bucket(NOON, NOON + timedelta(hours=1))
FOREVER = datetime(2100, 1, 1, tzinfo=UTC)
MODEL, KEY = "claude-haiku-4-5", PriceKey("2026-01", "anthropic", "claude-haiku-4-5")
PRICES = ClassPrices(1_000_000_000, 5_000_000_000, 100_000_000, 1_250_000_000, 2_000_000_000)
RATES = Rates({KEY: PRICES}, {MODEL: PRICES})
ONE, STRICT = Accounts({}), Thresholds(0, 0)


def call(number: int, state: CallState = CallState.UNRESOLVED, **changes: object) -> LedgerCall:
    """A call of noon, told apart by its number."""
    usage = TokenUsage(100, 50) if state in (CallState.SETTLED, CallState.RECONCILED) else TokenUsage()
    made = LedgerCall(
        tenant_id=bytes(16),
        reservation_id=number.to_bytes(16, "big"),
        call_id=UUID(int=number),
        state=state,
        provider_account="",
        bills_tenant_account=False,
        price=KEY,
        reserve_time=NOON,
        dispatch_deadline=NOON + timedelta(minutes=1),
        provider_request_id="",
        usage=usage,
        cost_nano_usd=cost_nano_usd(usage, PRICES),
        bound_nano_usd=10_000_000,
    )
    return replace(made, **changes)  # type: ignore[arg-type] # the changes are the test's own


def request(number: int, name: str = "", **changes: object) -> BilledRequest:
    """The request of the call of that number."""
    made = BilledRequest(name or f"req_{number}", UUID(int=number), "", MODEL, TokenUsage(100, 50), True, NOON + timedelta(seconds=1))
    return replace(made, **changes)  # type: ignore[arg-type] # the changes are the test's own


def concluded(
    calls: Sequence[LedgerCall],
    *requests: BilledRequest,
    until: datetime | None = FOREVER,
    accounts: Accounts = ONE,
    unread: Sequence[UnreadRow] = (),
) -> dict[int, int]:
    """Which calls are closed, by number, and with how many tokens."""
    feed = Requests(requests, until, unread)
    found = closings(calls, match(calls, feed, accounts), feed, BUCKET, accounts)
    return {int.from_bytes(item.call.reservation_id, "big"): item.usage.total for item in found}


def reported(calls: Sequence[LedgerCall], *requests: BilledRequest, until: datetime | None = FOREVER, rates: Rates = RATES) -> Report:
    """The report of these."""
    feed = Requests(requests, until)
    compared = by_requests_report.Compared("anthropic", BUCKET, calls, match(calls, feed, ONE), feed)
    return by_requests_report.report(compared, "", ONE, rates, STRICT, NOON)


def test_a_request_is_the_call_that_names_it() -> None:
    """The provider's own id decides before the call id: a settled call's request is not another call's of the same id."""
    settled = call(1, CallState.SETTLED, provider_request_id="req_1")
    rival = call(2, call_id=UUID(int=1))
    assert concluded([settled, rival], request(1)) == {2: 0}
    assert concluded([settled, rival], request(1), request(1, "req_9")) == {2: 150}


def test_an_id_that_two_calls_name_decides_nothing() -> None:
    """Then their call ids do."""
    twins = [call(number, CallState.SETTLED, provider_request_id="req_x") for number in (1, 2)]
    report = reported(twins, request(1, "req_x"), request(2, "req_y"))
    assert (report.drift_nano_usd, report.counts) == (0, Counts())


@pytest.mark.parametrize("off", [timedelta(minutes=-2), timedelta(minutes=3)])
def test_a_request_of_another_time_is_not_the_calls(off: timedelta) -> None:
    """A call is sent between its reservation and its deadline, give or take a minute of clocks."""
    assert concluded([call(1)], request(1, start_time=NOON + off)) == {1: 0}
    assert concluded([call(1)], request(1, start_time=NOON - timedelta(seconds=59))) == {1: 150}


def test_two_requests_of_one_call_close_nothing() -> None:
    """A call is sent once; two requests with its id are a riddle, not a sum."""
    assert concluded([call(1)], request(1), request(1, "req_9")) == {}
    assert reported([call(1)], request(1), request(1, "req_9")).counts.ambiguous == 1


def test_a_row_that_cannot_be_read_keeps_what_it_may_be_open() -> None:
    """It may be any call's bill, so none was never billed; and nothing else is the bill of a call that it names."""
    calls = [call(1), call(2), call(3, provider_request_id="req_x")]
    anybodys = UnreadRow("no count", None, None)
    assert concluded(calls, request(1), unread=[anybodys]) == {1: 150}
    assert concluded(calls, request(1), request(2), unread=[UnreadRow("no count", "req_2", UUID(int=2))]) == {1: 150}
    assert concluded(calls, request(3, "req_x"), unread=[UnreadRow("no model", "req_x", None), anybodys]) == {}
    feed = Requests([], FOREVER, [anybodys])
    compared = by_requests_report.Compared("anthropic", BUCKET, [call(1, CallState.SETTLED)], match([], feed, ONE), feed)
    report = by_requests_report.report(compared, "", ONE, RATES, STRICT, NOON)
    assert (report.set_aside_count, report.is_complete, report.counts.missing, report.is_drifting) == (1, False, 0, False)


def test_a_call_that_outlives_the_margin_is_not_closed_to_nothing() -> None:
    """Its request may be one that was not looked at."""
    assert concluded([call(1, dispatch_deadline=BUCKET.end + MARGIN)]) == {}
    assert concluded([call(1, dispatch_deadline=BUCKET.end + MARGIN - timedelta(minutes=1))]) == {1: 0}


def test_only_unresolved_calls_of_the_bucket_are_closed() -> None:
    """Open ones may be settled yet, and the neighbours' turn comes."""
    others = [call(1, CallState.OPEN), call(2, reserve_time=BUCKET.end), call(3, CallState.SETTLED)]
    assert concluded(others, request(1), request(2)) == {}


@pytest.mark.parametrize("nameless", [request(9, call_id=None), request(9, call_id=None, is_final=False)])
def test_a_nameless_request_of_another_time_hinders_nothing(nameless: BilledRequest) -> None:
    """Only one that could be the call's does."""
    assert concluded([call(1)], nameless) == {}
    assert concluded([call(1)], replace(nameless, start_time=NOON + timedelta(minutes=30))) == {1: 0}


NUMBERS = st.integers(1, 4)
STATES = st.sampled_from([CallState.OPEN, CallState.SETTLED, CallState.UNRESOLVED, CallState.RECONCILED])
CALLS = st.lists(
    st.builds(lambda number, state, name: (number, state, name), NUMBERS, STATES, st.sampled_from(["", "req_1", "req_2"])), max_size=6
)
REQUESTS = st.lists(st.tuples(st.one_of(st.none(), NUMBERS), st.booleans()), max_size=6)


@given(calls=CALLS, requests=REQUESTS)
def test_whatever_the_feed_says_no_request_closes_two_calls(
    calls: list[tuple[int, CallState, str]], requests: list[tuple[int | None, bool]]
) -> None:
    """Each closed call has one final request of its own or certainly none; and what is closed so agrees with the feed afterwards."""
    ledger = [
        call(index + 100, state, call_id=UUID(int=number), provider_request_id=name if state is CallState.SETTLED else "")
        for index, (number, state, name) in enumerate(calls)
    ]
    feed = [
        request(0, f"req_{index}", call_id=None if number is None else UUID(int=number), is_final=is_final)
        for index, (number, is_final) in enumerate(requests)
    ]
    told = Requests(feed, FOREVER)
    found = closings(ledger, match(ledger, told, ONE), told, BUCKET, ONE)
    used = [item.provider_request_id for item in found if item.provider_request_id]
    assert len(set(used)) == len(used)
    assert not {item.call.reservation_id for item in found} & {
        item.reservation_id for item in ledger if item.state is not CallState.UNRESOLVED
    }
    by_name = {item.request_id: item for item in feed}
    assert all(by_name[item.provider_request_id].is_final for item in found if item.provider_request_id)
    closed = {item.call.reservation_id: item for item in found}
    after = [
        replace(
            item,
            state=CallState.RECONCILED,
            usage=closed[item.reservation_id].usage,
            provider_request_id=closed[item.reservation_id].provider_request_id,
            cost_nano_usd=cost_nano_usd(closed[item.reservation_id].usage, PRICES),
        )
        if item.reservation_id in closed
        else item
        for item in ledger
    ]
    matching = match(after, told, ONE)
    for item in after:
        if item.reservation_id in closed and not matching.is_ambiguous(item):
            assert sum(of.usage.total for of in matching.of(item)) == item.usage.total


def test_a_bill_beyond_the_bound_is_a_drift() -> None:
    """A call that is not closed yet explains what it holds, and no more."""
    long = request(1, usage=TokenUsage(20_000, 0), is_final=False)
    report = reported([call(1)], long)
    assert (report.drift_nano_usd, report.is_drifting) == (10_000_000, True)


def test_a_request_of_a_model_without_a_price_raises_the_alarm() -> None:
    """It cannot be weighed, so someone has to look, whatever the thresholds."""
    assert not reported([]).is_drifting
    assert reported([], request(1, model="unheard-of")).is_drifting


def test_unclear_requests_are_the_feeds_and_nobodys_drift() -> None:
    """Two calls hold their bounds for it."""
    report = reported([call(1), call(2, call_id=UUID(int=1))], request(1))
    assert (report.drift_nano_usd, report.feed_nano_usd, report.counts.ambiguous) == (0, 350_000, 2)


def sums(settled: TokenUsage, feed: TokenUsage, bound: int = 0, told: int | None = None, model: str = MODEL) -> Report:
    """The report of one model's sums."""
    ledger = [LedgerSum("", model, settled, cost_nano_usd(settled, PRICES), 0, 1, bound)]
    compared = by_sums.ComparedSums("anthropic", BUCKET, ledger, [FeedSum("", f"{model}-20251001", feed, told)], True)
    return by_sums.report(compared, "", ONE, RATES, STRICT, NOON)


@pytest.mark.parametrize(
    ("feed", "bound", "told", "drift"),
    [
        (TokenUsage(100, 50), 0, None, 0),
        (TokenUsage(110, 50), 10_000, None, 0),
        (TokenUsage(110, 50), 9_999, None, 1),
        (TokenUsage(90, 50), 10**9, None, 10_000),
        # More input and less output: neither makes up for the other.
        (TokenUsage(105, 49), 0, None, 10_000),
        # The tokens agree and the money does not: a price is wrong.
        (TokenUsage(100, 50), 0, 400_000, 50_000),
        (TokenUsage(100, 50), 10**9, 300_000, 50_000),
        (TokenUsage(100, 50), 50_000, 400_000, 0),
    ],
)
def test_sums_drift_by_what_nothing_explains(feed: TokenUsage, bound: int, told: int | None, drift: int) -> None:
    """Unresolved calls explain more than was settled, up to their bounds; nothing explains less."""
    assert sums(TokenUsage(100, 50), feed, bound, told).drift_nano_usd == drift


def test_sums_of_a_model_without_a_price_raise_the_alarm_where_they_differ() -> None:
    """And only there."""
    assert sums(TokenUsage(100), TokenUsage(101), model="unheard-of").is_drifting
    assert not sums(TokenUsage(100), TokenUsage(100), model="unheard-of", told=100_000).is_drifting


@pytest.mark.parametrize(("drift", "of", "exceeded"), [(11, 1_000, True), (10, 1_000, False), (11, 1_101, False), (11, 0, True)])
def test_a_drift_must_be_over_both_thresholds(drift: int, of: int, exceeded: bool) -> None:
    """Nano-dollars, and a hundredth of what the larger side says."""
    assert Thresholds(10, 10_000).exceeded_by(drift, of) is exceeded


@pytest.mark.parametrize("width", BucketWidth)
def test_buckets_cover_the_stretch_without_gaps(width: BucketWidth) -> None:
    """They begin where UTC's do, follow each other, and are as many as is said."""
    start, end = NOON + timedelta(seconds=30), NOON + timedelta(days=1, seconds=30)
    found = list(buckets(start, end, width))
    assert found[0].start <= start < found[0].end
    assert found[-1].start < end <= found[-1].end
    assert all(one.end == following.start for one, following in pairwise(found))
    assert (len(found), bucket_count(end, start, width)) == (bucket_count(start, end, width), 0)


def test_whose_call_is_compared_where() -> None:
    """By the account's name; never a call on a tenant's own; and where the feed is one, in the one."""
    told_apart = Accounts({"house": ["apikey_1"]})
    assert told_apart.of_call("house", bills_tenant_account=False) == "house"
    assert told_apart.of_call("", bills_tenant_account=False) is None
    assert told_apart.of_call("house", bills_tenant_account=True) is None
    assert (ONE.of_call("house", bills_tenant_account=False), ONE.of_feed("whatever")) == ("", "")
    assert (told_apart.of_feed("", "apikey_1"), told_apart.of_feed("apikey_2")) == ("house", None)


class Behind:
    """Prices of which the version of a call has not come yet."""

    async def versions(self) -> Sequence[PriceVersion]:
        return [PriceVersion("2026-01", NOON - timedelta(days=1), "test", NOON.date(), {("anthropic", MODEL): PRICES})]


async def test_a_price_that_is_not_loaded_yet_is_waited_for() -> None:
    """It is in the database, or the call would not have been opened: nothing is rated by another."""
    terms = Terms("anthropic", ONE, PriceCatalog(Behind()), STRICT)
    assert (await terms.rates([KEY])).of_calls == {KEY: PRICES}
    with pytest.raises(Unavailable, match="2026-02"):
        await terms.rates([replace(KEY, version="2026-02")])


class Scripted:
    """A comparison that remembers what it was asked, and the reports that are there."""

    def __init__(self, complete: Sequence[Bucket], too_large: Sequence[Bucket] = ()) -> None:
        self.asked: list[Bucket] = []
        self._complete = complete
        self._too_large = too_large

    async def compare(self, bucket: Bucket, now: datetime) -> Outcome:
        self.asked.append(bucket)
        if bucket in self._too_large:
            raise too_many(1)
        return Outcome([], 0)

    async def put(self, report: Report) -> bool:
        raise AssertionError

    async def page(self, after: object, size: int, *, drifting_only: bool) -> Sequence[Report]:
        raise AssertionError

    async def complete(self, provider: str, accounts: Sequence[str], start: datetime, end: datetime) -> Sequence[Bucket]:
        return self._complete


def job_of(scripted: Scripted) -> ReconciliationJob:
    """A job at half past three that looks back to noon, in hours."""
    counter: Counter = otlp_counters("metering", "").counter("tenantry.test", "none")
    return ReconciliationJob(
        Reconciler(scripted, scripted, counter, counter),
        scripted,
        "anthropic",
        ONE,
        width=BucketWidth.HOUR,
        lookback=timedelta(hours=3, minutes=30),
        poll_seconds=1.0,
        clock=lambda: NOON + timedelta(hours=3, minutes=30),
    )


async def test_the_job_does_what_has_no_complete_report() -> None:
    """As far back as it was told, oldest first, the running bucket too."""
    day = list(buckets(NOON, NOON + timedelta(hours=4), BucketWidth.HOUR))
    scripted = Scripted(day[:2])
    assert await job_of(scripted).round() == 2
    assert scripted.asked == day[2:]


async def test_a_bucket_that_does_not_fit_keeps_none_after_it_waiting() -> None:
    """It would be refused in every round, and the job would never come to the others."""
    day = list(buckets(NOON, NOON + timedelta(hours=4), BucketWidth.HOUR))
    scripted = Scripted([], too_large=day[1:2])
    assert await job_of(scripted).round() == 3
    assert scripted.asked == day


class Quicker:
    """A feed and a ledger whose calls another replica closes first; and whoever is told of ends."""

    def __init__(self, *calls: LedgerCall) -> None:
        self._calls = list(calls)
        self.told: list[CallEnd] = []

    async def requests(self, start: datetime, end: datetime) -> AsyncIterator[RequestPage]:
        yield RequestPage([request(1)], FOREVER)

    async def calls(self, provider: str, reserved: Bucket) -> Sequence[LedgerCall]:
        return list(self._calls)

    async def sums(self, provider: str, bucket: Bucket) -> Sequence[LedgerSum]:
        raise AssertionError

    async def close(self, found: Sequence[RatedClosing]) -> Sequence[CallEnd]:
        self._calls = [call(1, CallState.RECONCILED, provider_request_id="req_1")]
        return []

    def send(self, ends: Iterable[CallEnd]) -> None:
        self.told += ends


async def test_what_another_replica_closed_is_reported_as_closed() -> None:
    """And not told, logged or counted twice."""
    both = Quicker(call(1))
    terms = Terms("anthropic", ONE, PriceCatalog(Behind()), STRICT)
    outcome = await RequestsComparison(both, both, terms, both).compare(BUCKET, NOON)
    (report,) = outcome.reports
    assert (outcome.closed_count, both.told, report.counts) == (0, [], Counts(reconciled=1))
