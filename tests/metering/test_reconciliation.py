"""The ledger beside a provider's feed of single requests: what closes a call, what never does, and what raises the alarm."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
import structlog
from pydantic import ValidationError

from mesh.metering.v1 import ledger_service_pb2 as pb
from mesh.metering.v1 import reconciliation_service_pb2 as reports_pb
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from services.kernel.rpc import metadata as keys
from services.kernel.rpc.wire_status import decode_rpc_error
from services.metering.adapters import postgres_reconciliation_ledger
from services.metering.adapters.postgres_reconciliations import PostgresReconciliations
from services.metering.reconciliation import comparing
from services.metering.reconciliation.bucket import BucketWidth
from services.metering.settings import MeteringSettings
from tests.metering.feeds import HOUSE, KEY, TENANTS_KEY, RequestLedger, cut_at, opened_at, served
from tests.metering.mesh import MODEL, Mesh, Tenant, bill, mesh_of_its_own
from tests.metering.peers import DONE, OPERATOR, RETRY, Peers
from tests.metering.rerating import load_versions, order, rerated, total
from tests.support.stores import PostgresStore
from tests.support.waiting import eventually

HOUR = timedelta(hours=1)
ACCOUNT = "house"
# Haiku: 1,000 nano-USD an input token, 5,000 an output token; cache 100 read, 1,250 and 2,000 written.
TOKENS, COST = (70, 30, 10, 4, 2), 70_000 + 150_000 + 1_000 + 5_000 + 4_000


@dataclass(frozen=True, slots=True)
class World:
    """A service with a feed, and an hour of its own for one test."""

    mesh: Mesh
    feed: RequestLedger
    hour: datetime

    async def reconcile(self, hours: int = 1, timeout: float = 30) -> reports_pb.ReconcileProviderResponse:
        """Reconciles the hours from this one on, as an operator."""
        request = reports_pb.ReconcileProviderRequest()
        request.start_time.FromDatetime(self.hour)
        request.end_time.FromDatetime(self.hour + hours * HOUR)
        return await asked(self.mesh.outside.reconciliations.ReconcileProvider, request, timeout=timeout)

    async def report(self) -> reports_pb.Reconciliation:
        """The report of this hour."""
        listed = await asked(self.mesh.outside.reconciliations.ListReconciliations, reports_pb.ListReconciliationsRequest(page_size=1000))
        (found,) = [report for report in listed.reconciliations if report.start_time.ToDatetime(tzinfo=UTC) == self.hour]
        return found

    async def entries(self, tenant: Tenant) -> list[tuple[int, int, int]]:
        """Kind, tokens and cost of the tenant's entries."""
        sql = "SELECT kind, total_tokens, cost_nano_usd FROM metering.entries WHERE tenant_id = $1 ORDER BY record_time"
        return [tuple(row) for row in await self.mesh.admin.fetch(sql, tenant.id)]


async def asked(call, request, *, timeout: float = 30, reason: str = "monthly check"):
    """Asks as an operator does."""
    metadata = ((keys.AUTHORIZATION, f"Bearer {OPERATOR}"), (keys.OPERATOR_REASON, reason))
    try:
        return await call(request, metadata=metadata if reason else metadata[:1], timeout=timeout)
    except Exception as error:
        raise decode_rpc_error(error, "metering") from None


@pytest.fixture(scope="module")
async def service(postgres: PostgresStore, peers: Peers) -> AsyncIterator[tuple[Mesh, RequestLedger]]:
    """One service and its feed, for all tests of this file."""
    feed = RequestLedger()
    async with served(feed.answer) as url:
        settings = {
            "reconciliation_feed": "requests",
            "reconciliation_url": f"{url}/ledger",
            "reconciliation_api_key": KEY,
            "reconciliation_accounts": {ACCOUNT: (HOUSE,)},
            "reconciliation_drift_nano_usd": 100_000,
        }
        async with mesh_of_its_own(postgres, peers, **settings) as mesh:
            yield mesh, feed


HOURS: Iterator[datetime] = iter(datetime(2026, 2, 1, tzinfo=UTC) + 4 * number * HOUR for number in range(1000))


@pytest.fixture
def world(service: tuple[Mesh, RequestLedger]) -> Iterator[World]:
    """An hour that nobody else uses, nor the three after it."""
    mesh, feed = service
    yield World(mesh, feed, next(HOURS))
    feed.complete_until, feed.broken_from = datetime(2100, 1, 1, tzinfo=UTC), None
    mesh.limits.answer = lambda commit: DONE


async def test_unresolved_call_is_closed_with_the_providers_figures(world: World) -> None:
    """RECONCILED with exactly its tokens, rated by the price of its open, told to the limits as any end, and the request is remembered."""
    mesh, tenant = world.mesh, world.mesh.new_tenant()
    call = await cut_at(mesh, tenant, world.hour, provider_account=ACCOUNT)
    request_id = world.feed.bill(call, TOKENS)
    assert (await world.reconcile()).reconciled_count == 1
    row = await mesh.row(call.ref)
    assert (row["state"], row["provider_request_id"], row["cost_nano_usd"]) == (pb.CALL_STATE_RECONCILED, request_id, COST)
    assert await world.entries(tenant) == [(2, sum(TOKENS), COST)]
    told = (await mesh.limits.wait_for(tenant.id, 2))[-1]
    assert (told.actual.tokens, told.actual.cost_nano_usd, told.output_tokens) == (sum(TOKENS), COST, TOKENS[1])
    report = await world.report()
    assert (report.reconciled_count, report.unresolved_count, report.drift.nano_usd) == (1, 0, 0)
    assert (report.settled.nano_usd, report.feed.nano_usd, report.is_complete) == (COST, COST, True)
    (line,) = report.lines
    assert line.settled == line.feed
    assert line.model == "claude-haiku-4-5"


async def test_request_that_is_not_over_closes_nothing(world: World) -> None:
    """Its output is not known yet: the call stays unresolved and is counted as unfinished."""
    call = await cut_at(world.mesh, world.mesh.new_tenant(), world.hour, provider_account=ACCOUNT)
    world.feed.bill(call, TOKENS, outcome="started")
    assert (await world.reconcile()).reconciled_count == 0
    assert await world.mesh.state(call.ref) == pb.CALL_STATE_UNRESOLVED
    report = await world.report()
    assert (report.unresolved_count, report.unfinished_count, report.is_drifting) == (1, 1, False)
    assert report.unresolved.nano_usd == call.bound_nano_usd


async def test_call_the_provider_never_saw_is_closed_to_nothing(world: World) -> None:
    """Only once every request is known that it could have been: a minute after the last moment it could be dispatched."""
    mesh, tenant = world.mesh, world.mesh.new_tenant()
    call = await cut_at(mesh, tenant, world.hour, provider_account=ACCOUNT)
    last_moment = world.hour + timedelta(minutes=2)
    for known_until in (None, last_moment - timedelta(microseconds=1)):
        world.feed.complete_until = known_until
        assert (await world.reconcile()).reconciled_count == 0
    assert not (await world.report()).is_complete
    world.feed.complete_until = last_moment
    assert (await world.reconcile()).reconciled_count == 1
    assert await mesh.state(call.ref) == pb.CALL_STATE_RECONCILED
    assert await world.entries(tenant) == [(2, 0, 0)]


async def test_call_that_may_still_be_dispatched_is_never_closed(world: World) -> None:
    """The database's own clock decides, whatever the feed says: neither to nothing nor with figures."""
    mesh, tenant, now = world.mesh, world.mesh.new_tenant(), datetime.now(UTC)
    silent = await cut_at(mesh, tenant, now, provider_account=ACCOUNT)
    billed = await cut_at(mesh, tenant, now, provider_account=ACCOUNT)
    world.feed.bill(billed, TOKENS)
    here = World(mesh, world.feed, now.replace(minute=0, second=0, microsecond=0))
    assert (await here.reconcile()).reconciled_count == 0
    assert {await mesh.state(call.ref) for call in (silent, billed)} == {pb.CALL_STATE_UNRESOLVED}


async def test_request_without_a_call_id_keeps_silent_calls_open(world: World) -> None:
    """It could be any of them, so none is closed to nothing; it is billing that nobody recorded."""
    call = await cut_at(world.mesh, world.mesh.new_tenant(), world.hour, provider_account=ACCOUNT)
    world.feed.bill(call, TOKENS, call_id="not-an-id")
    await world.reconcile()
    assert await world.mesh.state(call.ref) == pb.CALL_STATE_UNRESOLVED
    assert (await world.report()).unknown_count == 1


async def test_request_that_two_calls_could_be_closes_neither(world: World) -> None:
    """Call ids are callers' own: two tenants may use the same one, and neither pays the other's bill."""
    mesh, call_id = world.mesh, new_uuid7().bytes
    mine = await cut_at(mesh, mesh.new_tenant(), world.hour, call_id=call_id, provider_account=ACCOUNT)
    # Beyond the bucket's end, but still the same request's time.
    theirs = await cut_at(mesh, mesh.new_tenant(), world.hour + timedelta(seconds=5), call_id=call_id, provider_account=ACCOUNT)
    world.feed.bill(mine, TOKENS, after=timedelta(seconds=10))
    assert (await world.reconcile()).reconciled_count == 0
    assert {await mesh.state(call.ref) for call in (mine, theirs)} == {pb.CALL_STATE_UNRESOLVED}
    assert (await world.report()).ambiguous_count == 2


async def test_calls_on_a_tenants_own_account_are_left_out(world: World) -> None:
    """Their requests are on another bill: neither they nor calls on other accounts are compared or closed by this one."""
    mesh, tenant = world.mesh, world.mesh.new_tenant()
    own = await cut_at(mesh, tenant, world.hour, bills_tenant_account=True)
    other = await cut_at(mesh, tenant, world.hour, provider_account="another")
    world.feed.bill(own, TOKENS, api_key_hash=TENANTS_KEY)
    world.feed.bill(other, TOKENS, api_key_hash=TENANTS_KEY)
    assert (await world.reconcile()).reconciled_count == 0
    assert {await mesh.state(call.ref) for call in (own, other)} == {pb.CALL_STATE_UNRESOLVED}
    report = await world.report()
    assert (report.unresolved_count, report.unknown_count, list(report.lines)) == (0, 0, [])


async def test_every_difference_counts_by_itself_and_raises_the_alarm_once(world: World) -> None:
    """A bill nobody recorded and one the provider lacks do not make up for each other; the alarm says what to do, and is not repeated."""
    mesh, tenant = world.mesh, world.mesh.new_tenant()
    agreed = await opened_at(mesh, tenant, world.hour, provider_account=ACCOUNT)
    request_id = world.feed.bill(agreed, (100, 50, 0, 0, 0))
    lacking = await opened_at(mesh, tenant, world.hour, provider_account=ACCOUNT)
    other = await opened_at(mesh, tenant, world.hour, provider_account=ACCOUNT)
    other_id = world.feed.bill(other, (100, 90, 0, 0, 0))
    for call, name in ((agreed, request_id), (lacking, "req_lost"), (other, other_id)):
        settled = bill(call.ref)
        settled.provider_request_id = name
        await mesh.settle(settled)
    world.feed.bill(mesh.opening(tenant, reserve_time=world.hour), (100, 50, 0, 0, 0))
    with structlog.testing.capture_logs() as logs:
        first, second = await world.reconcile(), await world.reconcile()
    assert (first.drifting_count, second.drifting_count) == (1, 1)
    (alarm,) = [line for line in logs if line["event"] == "provider_usage_drifts"]
    assert (alarm["log_level"], alarm["drift_nano_usd"]) == ("error", 350_000 + 200_000 + 350_000)
    assert "ListReconciliations" in alarm["next_step"]
    report = await world.report()
    assert (report.unknown_count, report.missing_count, report.differing_count) == (1, 1, 1)
    assert report.is_drifting


async def test_nothing_is_missing_while_the_feed_is_not_complete(world: World) -> None:
    """A provisional report raises no alarm, and the complete one takes its place."""
    mesh, tenant = world.mesh, world.mesh.new_tenant()
    await mesh.settle(bill((await opened_at(mesh, tenant, world.hour, provider_account=ACCOUNT)).ref))
    world.feed.bill(mesh.opening(tenant, reserve_time=world.hour), (1_000, 0, 0, 0, 0))
    world.feed.complete_until = world.hour + HOUR
    assert (await world.reconcile()).drifting_count == 0
    assert ((await world.report()).is_complete, (await world.report()).missing_count) == (False, 0)
    world.feed.complete_until = world.hour + 2 * HOUR
    assert (await world.reconcile()).drifting_count == 1
    assert ((await world.report()).is_complete, (await world.report()).missing_count) == (True, 1)


async def test_two_at_once_close_each_call_once(world: World) -> None:
    """Replicas that reconcile the same time do no harm: one entry a call, one end told, one report."""
    mesh, tenant = world.mesh, world.mesh.new_tenant()
    mesh.limits.answer = lambda commit: RETRY if commit.reservation.tenant_id == tenant.id.bytes else DONE
    calls = [await cut_at(mesh, tenant, world.hour, provider_account=ACCOUNT) for _ in range(5)]
    for call in calls:
        world.feed.bill(call, TOKENS)
    async with asyncio.TaskGroup() as group:
        runs = [group.create_task(world.reconcile()) for _ in range(4)]
    assert sum(run.result().reconciled_count for run in runs) == len(calls)
    assert await world.entries(tenant) == [(2, sum(TOKENS), COST)] * len(calls)
    settled = "SELECT count(*) FROM metering.outbox WHERE tenant_id = $1 AND kind = 1"
    assert await mesh.admin.fetchval(settled, tenant.id) == len(calls)
    assert (await world.report()).reconciled_count == len(calls)


async def test_late_settlement_of_a_reconciled_call_is_an_adjustment(world: World) -> None:
    """What the replica tells late is recorded as a difference, and the next report is of what it cost in the end."""
    mesh, tenant = world.mesh, world.mesh.new_tenant()
    call = await cut_at(mesh, tenant, world.hour, provider_account=ACCOUNT)
    world.feed.bill(call, TOKENS)
    await world.reconcile()
    (late,) = await mesh.settle(bill(call.ref, input_tokens=TOKENS[0], output_tokens=TOKENS[1]))
    assert late.outcome == pb.SETTLE_OUTCOME_ADJUSTED
    await world.reconcile()
    assert ((await world.report()).differing_count, (await world.report()).drift.nano_usd) == (1, 10_000)


async def test_a_call_that_was_rated_anew_is_no_drift(world: World) -> None:
    """Both sides are weighed with the prices that the call is rated by now, not with those of its open."""
    mesh, tenant = world.mesh, world.mesh.new_tenant()
    call = await opened_at(mesh, tenant, world.hour, provider_account=ACCOUNT)
    settled = bill(call.ref, input_tokens=1_000_000, output_tokens=0)
    settled.provider_request_id = world.feed.bill(call, (1_000_000, 0, 0, 0, 0))
    await mesh.settle(settled)
    await load_versions(mesh)
    await rerated(mesh, tenant, order(start=world.hour, end=world.hour + HOUR))
    assert (await world.reconcile()).drifting_count == 0
    report, cost = await world.report(), await total(mesh, tenant)
    assert (report.settled.nano_usd, report.feed.nano_usd, report.drift.nano_usd, report.differing_count) == (cost, cost, 0, 0)


async def test_a_feed_that_breaks_leaves_what_was_done_and_is_gone_on_with(world: World) -> None:
    """Rubbish concludes nothing: UNAVAILABLE, the buckets before it are stored, and the next request goes on."""
    mesh, tenant = world.mesh, world.mesh.new_tenant()
    calls = [await cut_at(mesh, tenant, world.hour + number * HOUR, provider_account=ACCOUNT) for number in range(2)]
    for call in calls:
        world.feed.bill(call, TOKENS)
    world.feed.broken_from = world.hour + timedelta(minutes=30)
    with pytest.raises(MeshError, match="usage feed"):
        await world.reconcile(hours=2)
    assert [await mesh.state(call.ref) for call in calls] == [pb.CALL_STATE_RECONCILED, pb.CALL_STATE_UNRESOLVED]
    world.feed.broken_from = None
    done = await world.reconcile(hours=2)
    assert (done.bucket_count, done.reconciled_count) == (2, 1)
    assert not done.HasField("next_start_time")


@pytest.mark.parametrize("broken", [{"output_tokens": -1}, {"model": None}, {"api_key_hash": 7}], ids=str)
async def test_a_row_that_cannot_be_read_is_set_aside(world: World, broken: dict[str, object]) -> None:
    """It closes nothing: it is counted, logged and in the report, which stays provisional; the other rows and buckets go on."""
    mesh, tenant = world.mesh, world.mesh.new_tenant()
    calls = [await cut_at(mesh, tenant, world.hour + number * HOUR, provider_account=ACCOUNT) for number in (0, 0, 1)]
    for call, changes in zip(calls, ({}, broken, {}), strict=True):
        world.feed.bill(call, TOKENS, **changes)
    with structlog.testing.capture_logs() as logs:
        done = await world.reconcile(hours=2)
    assert (done.bucket_count, done.reconciled_count, done.set_aside_count, done.drifting_count) == (2, 2, 1, 0)
    states = [await mesh.state(call.ref) for call in calls]
    assert states == [pb.CALL_STATE_RECONCILED, pb.CALL_STATE_UNRESOLVED, pb.CALL_STATE_RECONCILED]
    (line,) = [line for line in logs if line["event"] == "provider_rows_set_aside"]
    assert (line["count"], line["start_time"]) == (1, world.hour.isoformat()) and "cannot be read" in line["first_why"]
    report = await world.report()
    assert (report.set_aside_count, report.is_complete, report.reconciled_count, report.unresolved_count) == (1, False, 1, 1)
    # The row is put right, and the call is closed as any other.
    world.feed.lines[-2] |= {"output_tokens": TOKENS[1], "model": MODEL, "api_key_hash": HOUSE}
    done = await world.reconcile()
    assert (done.reconciled_count, done.set_aside_count, (await world.report()).is_complete) == (1, 0, True)


async def test_buckets_of_the_future_are_left_out_and_counted(world: World) -> None:
    """Nothing was billed there yet; a stretch that begins there is refused."""
    now = datetime.now(UTC)
    request = reports_pb.ReconcileProviderRequest()
    request.start_time.FromDatetime(now - 2 * HOUR)
    request.end_time.FromDatetime(now + 5 * HOUR)
    done = await asked(world.mesh.outside.reconciliations.ReconcileProvider, request)
    # The hour may have ended meanwhile.
    assert done.future_bucket_count in (4, 5) and done.bucket_count + done.future_bucket_count == 8
    request.start_time.FromDatetime(now + HOUR)
    with pytest.raises(MeshError, match="future") as refused:
        await asked(world.mesh.outside.reconciliations.ReconcileProvider, request)
    assert refused.value.metadata["field"] == "start_time"


async def test_a_short_deadline_is_told_where_to_go_on(world: World) -> None:
    """Of a long stretch as much is done as there is time for, one bucket at least."""
    done = await world.reconcile(hours=900, timeout=2)
    assert 1 <= done.bucket_count < 900
    assert done.next_start_time.ToDatetime(tzinfo=UTC) == world.hour + done.bucket_count * HOUR


async def test_reports_are_listed_last_bucket_first_in_pages(world: World) -> None:
    """Each once, whatever the size of the pages; a filter leaves those that raise no alarm out."""
    await world.reconcile(hours=3)
    found, request = [], reports_pb.ListReconciliationsRequest(page_size=2)
    while True:
        page = await asked(world.mesh.outside.reconciliations.ListReconciliations, request)
        found += [(report.start_time.ToDatetime(tzinfo=UTC), report.account) for report in page.reconciliations]
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    assert found == sorted(set(found), reverse=True)
    assert {(world.hour + number * HOUR, ACCOUNT) for number in range(3)} <= set(found)
    request = reports_pb.ListReconciliationsRequest(drifting_only=True, page_size=1000)
    drifting = (await asked(world.mesh.outside.reconciliations.ListReconciliations, request)).reconciliations
    assert all(report.is_drifting for report in drifting)
    request.page_token = "rubbish"
    with pytest.raises(MeshError, match="page_token"):
        await asked(world.mesh.outside.reconciliations.ListReconciliations, request)


async def test_what_cannot_be_reconciled_is_refused(world: World, mesh: Mesh) -> None:
    """A stretch without end or of too many buckets, an operator without a reason, and a service without a feed."""
    for hours in (0, 1001):
        with pytest.raises(MeshError, match="INVALID_ARGUMENT"):
            await world.reconcile(hours=hours)
    request = reports_pb.ReconcileProviderRequest()
    request.start_time.FromDatetime(world.hour)
    with pytest.raises(MeshError, match="reason"):
        await asked(world.mesh.outside.reconciliations.ReconcileProvider, request, reason="")
    with pytest.raises(MeshError, match="TENANTRY_RECONCILIATION_FEED"):
        await asked(mesh.outside.reconciliations.ReconcileProvider, request)


async def test_whose_account_is_billed_is_recorded_at_the_open(world: World) -> None:
    """By its name where it is the operator's; as the tenant's where it is not."""
    tenant = world.mesh.new_tenant()
    house = await world.mesh.row((await opened_at(world.mesh, tenant, world.hour, provider_account=ACCOUNT)).ref)
    own = await world.mesh.row((await opened_at(world.mesh, tenant, world.hour, bills_tenant_account=True)).ref)
    assert (house["provider_account"], house["bills_tenant_account"]) == (ACCOUNT, False)
    assert (own["provider_account"], own["bills_tenant_account"]) == ("", True)
    assert UUID(bytes=tenant.id.bytes) == house["tenant_id"]


async def test_a_report_of_an_earlier_run_replaces_none_of_a_later(world: World) -> None:
    """A replica that was slow tells what it saw too late: the newer report stands, and no alarm is raised for the old one."""
    await world.reconcile()
    reports = PostgresReconciliations(world.mesh.app.jobs)
    (newer,) = [report for report in await reports.page(None, 1000, drifting_only=False) if report.bucket.start == world.hour]
    older = replace(newer, run_time=newer.run_time - timedelta(seconds=1), is_drifting=True, drift_nano_usd=7)
    assert not await reports.put(older)
    assert not (await world.report()).is_drifting
    assert await reports.put(replace(older, run_time=newer.run_time))


async def test_the_job_closes_calls_by_itself(postgres: PostgresStore, peers: Peers) -> None:
    """With a pause set, nobody has to ask; a feed that is away for a while is come back to."""
    feed, hour = RequestLedger(), datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - 3 * HOUR
    feed.broken_from = datetime(1970, 1, 1, tzinfo=UTC)
    async with served(feed.answer) as url:
        settings = {"reconciliation_feed": "requests", "reconciliation_url": url, "reconciliation_api_key": KEY}
        pace = {"reconciliation_poll_seconds": 0.05, "reconciliation_lookback_hours": 5.0}
        async with mesh_of_its_own(postgres, peers, **pace, **settings) as mesh:
            call = await cut_at(mesh, mesh.new_tenant(), hour)
            feed.bill(call, TOKENS)
            feed.broken_from = None

            async def is_closed() -> bool:
                return await mesh.state(call.ref) == pb.CALL_STATE_RECONCILED

            await eventually(is_closed, within_seconds=30)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"reconciliation_feed": "anthropic"}, "API_KEY"),
        ({"reconciliation_feed": "requests", "reconciliation_api_key": "k"}, "RECONCILIATION_URL"),
        ({"reconciliation_feed": "requests", "reconciliation_api_key": "k", "reconciliation_url": "http://a.example/ledger"}, "https"),
        ({"reconciliation_feed": "anthropic", "reconciliation_api_key": "k", "reconciliation_url": "ftp://127.0.0.1"}, "https"),
    ],
)
def test_a_feed_is_configured_whole_or_not_at_all(settings: dict[str, str], why: str) -> None:
    """A key goes there: never without one, never in plaintext beyond this machine."""
    with pytest.raises(ValidationError, match=why):
        MeteringSettings.model_validate(settings)


def test_what_is_configured_for_no_feed_does_not_matter() -> None:
    """And Anthropic's own address needs not be written down."""
    assert MeteringSettings().reconciliation_feed == "none"
    report = MeteringSettings.model_validate({"reconciliation_feed": "anthropic", "reconciliation_api_key": "k"})
    assert report.reconciliation_bucket is BucketWidth.HOUR


async def test_a_bucket_that_does_not_fit_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is held in memory: of too many calls or requests it is said what to set instead."""
    mesh, tenant = world.mesh, world.mesh.new_tenant()
    for _ in range(2):
        world.feed.bill(await cut_at(mesh, tenant, world.hour, provider_account=ACCOUNT), TOKENS)
    for limit in (postgres_reconciliation_ledger, "MOST_CALLS"), (comparing, "MOST_REQUESTS"):
        with monkeypatch.context() as patched:
            patched.setattr(*limit, 1)
            with pytest.raises(MeshError, match="TENANTRY_RECONCILIATION_BUCKET"):
                await world.reconcile()
    assert (await world.reconcile()).reconciled_count == 2
