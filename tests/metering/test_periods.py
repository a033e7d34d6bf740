"""What the limits ask a new epoch for: sums of any unit over any period, and recent calls one by one."""

import random
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from mesh.common.v1 import lifecycle_service_pb2 as lifecycle_pb
from mesh.common.v1 import limit_rule_pb2 as rule
from mesh.metering.v1 import ledger_service_pb2 as pb
from services.kernel.errors import MeshError
from tests.metering.mesh import Mesh, Tenant, bill, not_billed, period, ref, unknown

REQUESTS, TOKENS, COST = rule.LIMIT_UNIT_REQUESTS, rule.LIMIT_UNIT_TOKENS, rule.LIMIT_UNIT_COST_NANO_USD
RETRIES, PRODUCT, RUNNING = rule.LIMIT_UNIT_RETRIES, rule.LIMIT_UNIT_PRODUCT, rule.LIMIT_UNIT_CONCURRENT_CALLS
TENANT, USER, FEATURE, BOTH = (
    rule.LIMIT_SCOPE_TENANT,
    rule.LIMIT_SCOPE_USER,
    rule.LIMIT_SCOPE_FEATURE,
    rule.LIMIT_SCOPE_USER_FEATURE,
)
HOUR, MOMENT = timedelta(hours=1), timedelta(microseconds=1)

Sums = dict[tuple[int, str, str], int]


async def sums(mesh: Mesh, tenant: Tenant, periods: Sequence[pb.CountedPeriod]) -> Sums:
    """Amounts by period, user and feature."""
    snapshot = await mesh.begin_epoch(tenant, periods=periods)
    found = {(item.period, item.user, item.feature): item.amount for item in snapshot.sums}
    assert len(found) == len(snapshot.sums), "no sum is told twice"
    return found


async def test_period_counts_what_was_reserved_in_it_whenever_it_ended(mesh: Mesh) -> None:
    """From its start to before its end, to the microsecond, by the time of reservation; overlapping periods each count in full."""
    tenant = mesh.new_tenant()
    noon = datetime.now(UTC).replace(microsecond=0) - timedelta(days=40)
    times = [noon - MOMENT, noon, noon + HOUR - MOMENT, noon + HOUR, noon + 2 * HOUR, datetime.now(UTC)]
    for index, time in enumerate(times):
        call = await mesh.opened(tenant, reserve_time=time)
        await mesh.settle(bill(call.ref, input_tokens=10**index, output_tokens=0))
    periods = [
        period(TOKENS, TENANT, noon, noon + HOUR),
        period(TOKENS, TENANT, noon - HOUR, noon + 3 * HOUR),
        period(COST, TENANT, noon, noon + HOUR),
        period(TOKENS, TENANT, noon + HOUR, noon + HOUR),
        period(REQUESTS, TENANT, noon, noon + HOUR),
        period(TOKENS, USER, noon - HOUR, noon + HOUR + MOMENT),
        period(TOKENS, TENANT, noon + 3 * HOUR, noon + 4 * HOUR),
    ]
    assert await sums(mesh, tenant, periods) == {
        (0, "", ""): 110,
        (1, "", ""): 11_111,
        (2, "", ""): 110_000,
        (4, "", ""): 2,
        (5, "user-1", ""): 1_111,
    }


async def test_requests_count_what_ended_and_money_counts_what_was_billed(mesh: Mesh) -> None:
    """Void calls remain requests and cost nothing; further attempts are retries; open, unresolved and never opened ones are in no sum."""
    tenant = mesh.new_tenant()
    settled, retried, voided, pinned, _ = [await mesh.opened(tenant, attempt=attempt) for attempt in (1, 2, 1, 1, 1)]
    await mesh.settle(bill(settled.ref), bill(retried.ref))
    await mesh.void(not_billed(voided.ref), unknown(pinned.ref), not_billed(ref(tenant)))
    now = datetime.now(UTC)
    periods = [period(unit, scope, now - HOUR, now + HOUR) for unit in (REQUESTS, RETRIES, TOKENS, COST) for scope in (TENANT, USER)]
    assert await sums(mesh, tenant, periods) == {
        (0, "", ""): 2,
        (1, "user-1", ""): 2,
        (2, "", ""): 1,
        (3, "user-1", ""): 1,
        (4, "", ""): 300,
        (5, "user-1", ""): 300,
        (6, "", ""): 700_000,
        (7, "user-1", ""): 700_000,
    }


async def test_sums_are_those_of_a_plain_count(mesh: Mesh) -> None:
    """Random calls and uses, in random periods of every unit and scope, add up as the same log added up in plain Python."""
    randomness = random.Random(11)
    tenant, other = mesh.new_tenant(), mesh.new_tenant()
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(days=3)
    log: list[tuple[datetime, str, str, dict[tuple[int, str], int]]] = []
    calls, bills, uses = [], [], []
    for _ in range(400):
        time = start + timedelta(seconds=randomness.randrange(7_200))
        user, feature = randomness.choice(["", "ann", "bob"]), randomness.choice(["", "chat", "search"])
        if randomness.random() < 0.3:
            unit, quantity = randomness.choice(["ai_interviews", "audio_seconds"]), randomness.randrange(1, 50)
            uses.append(mesh.use(tenant, reserve_time=time, user=user, feature=feature, product_unit=unit, quantity=quantity))
            log.append((time, user, feature, {(PRODUCT, unit): quantity}))
            continue
        attempt, tokens = randomness.choice([1, 1, 2, 3]), randomness.randrange(500)
        call = mesh.opening(tenant, reserve_time=time, user=user, feature=feature, attempt=attempt)
        calls.append(call)
        bills.append(bill(call.ref, input_tokens=tokens, output_tokens=0))
        log.append((time, user, feature, {(RETRIES if attempt > 1 else REQUESTS, ""): 1, (TOKENS, ""): tokens, (COST, ""): tokens * 1_000}))
    await mesh.open(*calls, mesh.opening(other, reserve_time=start))
    await mesh.settle(*bills)
    assert set(await mesh.record(*uses)) == {pb.RECORD_UNITS_OUTCOME_RECORDED}
    periods: list[pb.CountedPeriod] = []
    expected: Counter[tuple[int, str, str]] = Counter()
    for index in range(200):
        unit, scope = randomness.choice([REQUESTS, TOKENS, COST, RETRIES, PRODUCT]), randomness.choice([TENANT, USER, FEATURE, BOTH])
        product_unit = randomness.choice(["ai_interviews", "audio_seconds", "never_used"]) if unit == PRODUCT else ""
        first, last = sorted(start + timedelta(seconds=randomness.randrange(7_200)) for _ in range(2))
        periods.append(period(unit, scope, first, last, product_unit))
        for time, user, feature, amounts in log:
            named = (scope not in (USER, BOTH) or user) and (scope not in (FEATURE, BOTH) or feature)
            if first <= time < last and named:
                key = (index, user if scope in (USER, BOTH) else "", feature if scope in (FEATURE, BOTH) else "")
                expected[key] += amounts.get((unit, product_unit), 0)
    assert await sums(mesh, tenant, periods) == {key: amount for key, amount in expected.items() if amount}
    assert await sums(mesh, other, periods) == {}


async def test_an_adjustment_counts_in_the_period_of_its_call(mesh: Mesh) -> None:
    """What a reconciled call really was billed replaces what it was closed with, for the tenant and for its user alike."""
    tenant, now = mesh.new_tenant(), datetime.now(UTC)
    call = await mesh.opened(tenant, reserve_time=now - timedelta(days=2), dispatch_deadline=now - HOUR)
    await mesh.void(unknown(call.ref))
    reconcile = "SELECT metering.reconcile_call($1, $2, uuidv7(), 70, 0, 0, 0, 0, 70000, 'report')"
    await mesh.app.jobs.call(reconcile, tenant.id, (await mesh.row(call.ref))["reservation_id"])
    await mesh.settle(bill(call.ref, input_tokens=20, output_tokens=0))
    periods = [period(unit, scope, now - timedelta(days=3), now) for unit in (TOKENS, COST) for scope in (TENANT, USER)]
    assert await sums(mesh, tenant, periods) == {
        (0, "", ""): 20,
        (1, "user-1", ""): 20,
        (2, "", ""): 20_000,
        (3, "user-1", ""): 20_000,
    }


async def test_names_of_an_erased_tenant_are_in_no_sum(mesh: Mesh) -> None:
    """After an erasure the tenant's own sums stay, and nobody's are told."""
    tenant, now = mesh.new_tenant(), datetime.now(UTC)
    await mesh.settle(bill((await mesh.opened(tenant)).ref))
    await mesh.record(mesh.use(tenant))
    caller = mesh.tenant_service
    await caller.channel.unary(caller.lifecycle.EraseTenant, lifecycle_pb.EraseTenantRequest(), timeout_seconds=20, tenant=tenant.context)
    periods = [period(TOKENS, scope, now - HOUR, now + HOUR) for scope in (TENANT, USER, FEATURE, BOTH)]
    periods += [period(PRODUCT, scope, now - HOUR, now + HOUR, "ai_interviews") for scope in (TENANT, USER)]
    assert await sums(mesh, tenant, periods) == {(0, "", ""): 150, (4, "", ""): 1}


async def test_recent_calls_tell_all_that_a_sliding_window_needs(mesh: Mesh) -> None:
    """Within the seconds asked for, every ended call and use with its user, feature, attempt, unit and quantity; running ones likewise."""
    tenant, now = mesh.new_tenant(), datetime.now(UTC)
    inside, outside = now - timedelta(seconds=590), now - timedelta(seconds=640)
    call, older, _ = [
        await mesh.opened(tenant, reserve_time=time, user="ann", feature="chat", attempt=attempt)
        for time, attempt in ((inside, 2), (outside, 1), (outside, 3))
    ]
    await mesh.settle(bill(call.ref), bill(older.ref))
    use, older_use = mesh.use(tenant, reserve_time=inside, quantity=7, user="bob"), mesh.use(tenant, reserve_time=outside)
    await mesh.record(use, older_use)
    snapshot = await mesh.begin_epoch(tenant, recent_seconds=600)
    told = {
        found.reservation_id: (found.state, found.tokens, found.user, found.feature, found.attempt, found.product_unit, found.quantity)
        for found in snapshot.recent
    }
    assert told == {
        call.ref.reservation_id: (pb.CALL_STATE_SETTLED, 150, "ann", "chat", 2, "", 0),
        use.ref.reservation_id: (pb.CALL_STATE_SETTLED, 0, "bob", "hiring", 0, "ai_interviews", 7),
    }
    assert [(found.user, found.feature, found.attempt, found.tokens) for found in snapshot.outstanding] == [("ann", "chat", 3, 1_000)]
    assert {found.reserve_time.ToDatetime(UTC) for found in snapshot.recent} == {inside}
    assert not (await mesh.begin_epoch(tenant)).recent, "a minute when nothing is said"


async def test_recent_reaches_half_a_minute_further_than_asked(mesh: Mesh) -> None:
    """A call that has just left the window by the ledger's clock may be in it by the limits'."""
    tenant, now = mesh.new_tenant(), datetime.now(UTC)
    for seconds in (80, 100):
        await mesh.settle(bill((await mesh.opened(tenant, reserve_time=now - timedelta(seconds=seconds))).ref))
    assert [found.reserve_time.ToDatetime(UTC) for found in (await mesh.begin_epoch(tenant)).recent] == [now - timedelta(seconds=80)]


@pytest.mark.parametrize(
    "wrong",
    [
        period(RUNNING, TENANT, datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)),
        period(PRODUCT, TENANT, datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)),
        period(TOKENS, TENANT, datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC), "ai_interviews"),
        period(PRODUCT, TENANT, datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC), "nul\x00"),
        period(TOKENS, TENANT, datetime(2026, 2, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)),
        period(0, TENANT, datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)),
        period(TOKENS, 9, datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)),
        pb.CountedPeriod(unit=TOKENS, scope=TENANT),
    ],
    ids=["running", "nameless", "named", "nul", "backwards", "nothing", "nobody", "timeless"],
)
async def test_period_that_makes_no_sense_begins_no_epoch(mesh: Mesh, wrong: pb.CountedPeriod) -> None:
    """A unit without a sum, a product without a name, a period that ends before it starts: INVALID_ARGUMENT, and the epoch stays."""
    tenant = mesh.new_tenant()
    with pytest.raises(MeshError) as refused:
        await mesh.begin_epoch(tenant, periods=[wrong])
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (await mesh.begin_epoch(tenant)).epoch == 1
