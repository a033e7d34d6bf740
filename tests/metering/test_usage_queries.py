"""What is answered about use: exact by every dimension and bucket, at once after what it answers for, and of nobody else."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from mesh.common.v1 import limit_rule_pb2 as rules_pb
from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from mesh.metering.v1 import usage_service_pb2 as pb
from services.kernel.errors import MeshError
from services.kernel.paging import encode_page_token
from services.metering.servicers.usage_query_messages import listing_of
from tests.metering.mesh import Mesh, Tenant, bill, not_billed, ref, running_mesh, unknown
from tests.metering.usage import (
    ALL_NAMES,
    DAY,
    FEATURE,
    HOUR,
    MODEL,
    PROMPT,
    PROVIDER,
    TENANT,
    TIER,
    UNIT,
    USER,
    asking,
    balance,
    books,
    every_row,
    query,
    query_tenants,
    told,
)

HAIKU, OPUS = "claude-haiku-4-5", "claude-opus-4-6"
FIRST_MOMENT, LAST_MOMENT = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, tzinfo=UTC)
NOON = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(days=3)


async def settled(mesh: Mesh, tenant: Tenant, *, first_ms: int = 5, total_ms: int = 9, tokens: int = 100, **changes: object) -> None:
    """One call from its open to its bill."""
    call = await mesh.opened(tenant, **changes)
    settlement = bill(call.ref, input_tokens=tokens)
    settlement.first_token_ms, settlement.total_ms = first_ms, total_ms
    await mesh.settle(settlement)


async def test_an_answer_has_what_was_answered_before_it(mesh: Mesh) -> None:
    """A call is in the very next answer after its settlement, void, interruption or use of units, folded or not."""
    tenant = mesh.new_tenant()
    for count in range(1, 6):
        await settled(mesh, tenant)
        await mesh.void(not_billed((await mesh.opened(tenant)).ref), unknown((await mesh.opened(tenant)).ref))
        await mesh.record(mesh.use(tenant, quantity=2))
        (row,) = (await query(mesh, tenant, asking())).rows
        assert (row.settled_count, row.void_count, row.unresolved_count, row.quantity) == (count, count, count, 2 * count)
        assert row.cost.nano_usd == count * 350_000


async def test_every_dimension_tells_apart(mesh: Mesh) -> None:
    """Each name of a call stands in its row when it is asked for, and in no row otherwise; amounts are those of the books."""
    tenant = mesh.new_tenant()
    for changes in ({"model": OPUS}, {"feature": "search"}, {"user": "user-2"}, {"prompt_version": "default@2"}, {}):
        await settled(mesh, tenant, **changes)
    await mesh.record(mesh.use(tenant, user="user-2"))
    assert told((await query(mesh, tenant, asking(*ALL_NAMES))).rows) == await books(mesh, tenant)
    for dimension, name in ((USER, "user"), (FEATURE, "feature"), (MODEL, "model"), (PROMPT, "prompt_version"), (UNIT, "product_unit")):
        rows = (await query(mesh, tenant, asking(dimension))).rows
        assert told(rows, [name]) == await books(mesh, tenant, [name])
        assert len(rows) == 2 + (name in ("feature", "model", "prompt_version")), "the use of a unit is one more"
    assert [row.tier for row in (await query(mesh, tenant, asking(TIER))).rows] == ["free"]
    assert {row.provider for row in (await query(mesh, tenant, asking(PROVIDER))).rows} == {"", "anthropic"}


async def test_a_call_keeps_the_tier_it_was_opened_in(mesh: Mesh) -> None:
    """The tier is the one of the token that proved the tenant at the open, for calls and units alike, whatever came after."""
    tenant = mesh.new_tenant()
    enterprise = mesh.peers.tenants.token(tenant.id, tier="enterprise")
    call = await mesh.opened(tenant, context_token=enterprise)
    await settled(mesh, tenant)
    await mesh.settle(bill(call.ref))
    await mesh.record(mesh.use(tenant, context_token=enterprise, quantity=3))
    rows = (await query(mesh, tenant, asking(TIER))).rows
    assert [(row.tier, row.settled_count, row.quantity) for row in rows] == [("enterprise", 1, 3), ("free", 1, 0)]


async def test_filters_leave_out_what_they_do_not_name(mesh: Mesh) -> None:
    """Any name of a list will do, every list must hold; an empty unit stands for calls."""
    tenant = mesh.new_tenant()
    for feature, model in (("chat", HAIKU), ("chat", OPUS), ("search", HAIKU)):
        await settled(mesh, tenant, feature=feature, model=model)
    await mesh.record(mesh.use(tenant, feature="chat"))

    async def counts(**lists: list[str]) -> tuple[int, int]:
        rows = (await query(mesh, tenant, asking(filter=pb.UsageFilter(**lists)))).rows
        return (rows[0].settled_count, rows[0].quantity) if rows else (0, 0)

    assert await counts(features=["chat"]) == (2, 1)
    assert await counts(features=["chat", "search"], product_units=[""]) == (3, 0)
    assert await counts(features=["chat"], models=[HAIKU]) == (1, 0)
    assert await counts(users=["user-1"], models=[OPUS]) == (1, 0)
    assert await counts(users=["nobody"]) == (0, 0)


async def test_use_belongs_to_the_time_of_its_reservation(mesh: Mesh) -> None:
    """To the microsecond at both ends of a period, whether sums or single calls answer, for users and without them."""
    tenant, tick = mesh.new_tenant(), timedelta(microseconds=1)
    moments = [NOON - tick, NOON, NOON + timedelta(minutes=7), NOON + timedelta(hours=1) - tick, NOON + timedelta(hours=1)]
    for power, moment in enumerate(moments):
        await settled(mesh, tenant, tokens=10**power, reserve_time=moment)
    for start, end, tokens in (
        (NOON, NOON + timedelta(hours=1), 1_110),
        (NOON - tick, NOON + tick, 11),
        (NOON + tick, NOON + timedelta(hours=1), 1_100),
        (NOON + timedelta(minutes=7), NOON + timedelta(hours=1) + tick, 11_100),
        (NOON - timedelta(days=2), NOON + timedelta(days=2), 11_111),
    ):
        for group_by in ((), (USER,)):
            rows = (await query(mesh, tenant, asking(*group_by, start=start, end=end))).rows
            assert [row.tokens.input_tokens for row in rows] == [tokens]


@pytest.mark.parametrize(("zone", "day"), [("", 2), ("Asia/Kolkata", 1), ("America/St_Johns", 2), ("Asia/Kathmandu", 1)])
async def test_days_are_the_tenants_own(mesh: Mesh, zone: str, day: int) -> None:
    """Buckets are cut in the tenant's time zone, to the quarter of an hour, and in another one where the question names it."""
    tenant = mesh.new_tenant()
    mesh.peers.configs.rules[str(tenant.id)] = rules_pb.LimitRules(time_zone=zone)
    midnight = datetime(2026, 3, 2, tzinfo=UTC)
    for hours in (-6, 2, 12, 18.3, 18.7):
        await settled(mesh, tenant, reserve_time=midnight + timedelta(hours=hours))
    period = {"start": midnight - timedelta(days=2), "end": midnight + timedelta(days=2), "bucket": DAY}
    answer = await query(mesh, tenant, asking(**period))
    assert answer.time_zone == (zone or "UTC")
    offset = {"": 0, "Asia/Kolkata": 5.5, "America/St_Johns": -3.5, "Asia/Kathmandu": 5.75}[zone]
    local = Counter((midnight + timedelta(hours=hours + offset)).date() for hours in (-6, 2, 12, 18.3, 18.7))
    found = {(row.bucket_start_time.ToDatetime(tzinfo=UTC) + timedelta(hours=offset)).date(): row.settled_count for row in answer.rows}
    assert found == local
    assert (await query(mesh, tenant, asking(time_zone="UTC", **period))).rows[-1].settled_count == 4


async def test_rows_come_in_the_order_asked_for(mesh: Mesh) -> None:
    """By any measure, highest first or lowest first: the answers to which model costs, which prompt retries, which provider fails."""
    tenant = mesh.new_tenant()
    first = await mesh.opened(tenant, prompt_version="greedy@2", feature="search")
    second = await mesh.opened(tenant, prompt_version="greedy@2", feature="search", call_id=first.call_id, attempt=2)
    await mesh.void(not_billed(first.ref, "provider_529"), unknown(second.ref))
    await settled(mesh, tenant, model=OPUS)
    await settled(mesh, tenant, model=HAIKU)
    await settled(mesh, tenant, model=HAIKU)

    async def order(by: int, dimension: int, name: str, *, ascending: bool = False) -> list[str]:
        rows = (await query(mesh, tenant, asking(dimension, order_by=by, ascending=ascending))).rows
        return [getattr(row, name) for row in rows]

    assert (await order(pb.USAGE_MEASURE_COST, MODEL, "model"))[:2] == [OPUS, HAIKU]
    assert (await order(pb.USAGE_MEASURE_SETTLED, MODEL, "model"))[0] == HAIKU
    assert (await order(pb.USAGE_MEASURE_COST, MODEL, "model", ascending=True))[-1] == OPUS
    assert await order(pb.USAGE_MEASURE_RETRIES, PROMPT, "prompt_version") == ["greedy@2", "default@1"]
    assert await order(pb.USAGE_MEASURE_FAILED_SHARE, FEATURE, "feature") == ["search", "chat"]
    (failing,) = (await query(mesh, tenant, asking(PROVIDER, filter=pb.UsageFilter(features=["search"])))).rows
    assert (failing.provider, failing.void_count, failing.unresolved_count, failing.retry_count) == ("anthropic", 1, 1, 1)
    assert (failing.failures.overloaded_count, failing.failures.other_count) == (1, 1)


@pytest.mark.parametrize(
    ("cause", "name"),
    [
        ("provider_400", "refused"),
        ("provider_429", "overloaded"),
        ("provider_503", "provider_failed"),
        ("provider_unreachable", "provider_failed"),
        ("cancelled", "cancelled"),
        ("deadline", "deadline"),
        ("queue_full", "other"),
    ],
)
async def test_failures_are_told_by_their_cause(mesh: Mesh, cause: str, name: str) -> None:
    """Each word an end is told with counts in one class and in no other."""
    tenant = mesh.new_tenant()
    await mesh.void(not_billed((await mesh.opened(tenant)).ref, cause))
    (row,) = (await query(mesh, tenant, asking())).rows
    assert {field.name: count for field, count in row.failures.ListFields()} == {f"{name}_count": 1}


async def test_latencies_are_within_five_percent(mesh: Mesh) -> None:
    """Percentiles of both latencies, of sums, of single calls and of both at once, lie within 5 % of the true ones."""
    tenant = mesh.new_tenant()
    times = [round(20 * 1.35**step) for step in range(20)]
    calls = [await mesh.opened(tenant, reserve_time=NOON + timedelta(hours=number)) for number in range(20)]
    bills = [bill(call.ref) for call in calls]
    for settlement, total in zip(bills, times, strict=True):
        settlement.first_token_ms, settlement.total_ms = max(1, total // 3), total
    await mesh.settle(*bills)
    for group_by in ((), (USER,)):
        (row,) = (await query(mesh, tenant, asking(*group_by, start=NOON - timedelta(days=1), with_latencies=True))).rows
        assert (row.total.count, row.first_token.count) == (20, 20)
        for share, found in ((0.5, row.total.p50_ms), (0.95, row.total.p95_ms), (0.99, row.total.p99_ms)):
            true = times[-(-int(share * 2_000) // 100) - 1]
            assert abs(found - true) <= 0.05 * true
    assert not (await query(mesh, tenant, asking())).rows[0].HasField("total")


async def test_the_slowest_tier_comes_first(mesh: Mesh) -> None:
    """Ordered by a latency, rows tell it, the slowest first; those without one come last."""
    tenant = mesh.new_tenant()
    for tier, total in (("free", 900), ("professional", 300), ("enterprise", 100)):
        await settled(mesh, tenant, total_ms=total, context_token=mesh.peers.tenants.token(tenant.id, tier=tier))
    await mesh.record(mesh.use(tenant, context_token=mesh.peers.tenants.token(tenant.id, tier="starter")))
    rows = (await query(mesh, tenant, asking(TIER, order_by=pb.USAGE_MEASURE_TOTAL_P95))).rows
    assert [row.tier for row in rows] == ["free", "professional", "enterprise", "starter"]
    assert rows[0].total.p95_ms == pytest.approx(900, rel=0.05)


async def test_the_share_of_cached_input_is_told(mesh: Mesh) -> None:
    """Cache reads over all input, written and plain; 0 where there was none."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    await mesh.settle(bill(call.ref, input_tokens=100, cache_read_tokens=300, cache_write_5m_tokens=100))
    await mesh.record(mesh.use(tenant))
    rows = (await query(mesh, tenant, asking(UNIT, order_by=pb.USAGE_MEASURE_CACHE_HIT_SHARE))).rows
    assert [row.cache_hit_share for row in rows] == [0.6, 0.0]


async def test_pages_hold_every_row_once(mesh: Mesh) -> None:
    """Walking the pages gives each group once, in order, whatever it is ordered by, and amounts that are equal hide nothing."""
    tenant = mesh.new_tenant()
    calls = [
        mesh.opening(
            tenant, user=f"user-{number % 9}", feature="chat" if number % 2 else "", reserve_time=NOON - timedelta(hours=number % 5)
        )
        for number in range(40)
    ]
    await mesh.open(*calls)
    await mesh.settle(*[bill(call.ref, input_tokens=number % 3) for number, call in enumerate(calls)])
    for order_by in (pb.USAGE_MEASURE_UNSPECIFIED, pb.USAGE_MEASURE_TOKENS, pb.USAGE_MEASURE_TOTAL_P95):
        asked = asking(USER, FEATURE, start=NOON - timedelta(days=1), bucket=HOUR, order_by=order_by)
        whole = list((await query(mesh, tenant, asked)).rows)
        asked.page_size = 7
        assert await every_row(mesh, tenant, asked) == whole
        assert sum(row.settled_count for row in whole) == 40


async def test_a_page_token_belongs_to_its_query(mesh: Mesh) -> None:
    """A token of another query, another tenant or of no making is INVALID_ARGUMENT."""
    one, other = mesh.new_tenant(), mesh.new_tenant()
    for user in ("user-1", "user-2", "user-3"):
        await settled(mesh, one, user=user)
    start = datetime.now(UTC) - timedelta(days=1)
    token = (await query(mesh, one, asking(USER, start=start, page_size=1))).next_page_token
    assert token
    for tenant, asked in (
        (other, asking(USER, start=start, page_token=token)),
        (one, asking(USER, FEATURE, start=start, page_token=token)),
        (one, asking(USER, start=start, page_token=token, filter=pb.UsageFilter(users=["user-1"]))),
        (one, asking(USER, start=start, page_token=token[:-3])),
    ):
        with pytest.raises(MeshError) as refused:
            await query(mesh, tenant, asked)
        assert (refused.value.code, refused.value.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "page_token")


@pytest.mark.parametrize(
    ("start", "end", "rank", "bucket"),
    [
        ("1980-01-01T00:00:00+00:00", "2026-01-01T00:00:00+00:00", "0", "0"),
        ("0001-01-01T00:00:00+00:00", "0001-01-02T00:00:00+00:00", "0", "0"),
        ("2026-01-02T00:00:00+00:00", "2026-01-01T00:00:00+00:00", "0", "0"),
        ("2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00", "9" * 30, "0"),
        ("2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00", "0", "9" * 12),
    ],
)
async def test_a_computed_page_token_asks_for_no_more_than_a_query_may(mesh: Mesh, start: str, end: str, rank: str, bucket: str) -> None:
    """A token is no signature: its period has the bounds of a query's, and its numbers those of the database."""
    tenant, asked = mesh.new_tenant(), asking(USER, bucket=HOUR)
    position = [start, end, rank, bucket, str(tenant.id), *[""] * len(ALL_NAMES)]
    asked.page_token = encode_page_token(listing_of(str(tenant.id), asked), position)
    with pytest.raises(MeshError) as refused:
        await query(mesh, tenant, asked)
    assert (refused.value.code, refused.value.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "page_token")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"end": NOON - timedelta(days=1)}, "query.end_time"),
        ({"end": NOON + timedelta(days=401)}, "query.start_time"),
        ({"end": NOON + timedelta(days=33), "bucket": HOUR}, "query.start_time"),
        ({"time_zone": "Europe/Atlantis"}, "query.time_zone"),
        ({"group_by": [TENANT]}, "query.group_by"),
        ({"group_by": [USER, USER]}, "query.group_by"),
        ({"group_by": [99]}, "query.group_by[0]"),
        ({"page_size": 1_001}, "query.page_size"),
        ({"filter": pb.UsageFilter(users=["a\x00b"])}, "query.filter"),
        (
            {"start": FIRST_MOMENT, "end": FIRST_MOMENT + timedelta(days=1), "bucket": DAY, "time_zone": "America/New_York"},
            "query.start_time",
        ),
        ({"start": LAST_MOMENT - timedelta(days=1), "end": LAST_MOMENT, "bucket": HOUR}, "query.end_time"),
    ],
)
async def test_impossible_questions_are_refused(mesh: Mesh, changes: dict[str, object], field: str) -> None:
    """INVALID_ARGUMENT, naming the field."""
    group_by = changes.pop("group_by", ())
    with pytest.raises(MeshError) as refused:
        await query(mesh, mesh.new_tenant(), asking(*group_by, **{"start": NOON} | changes))  # type: ignore[misc] # lists of the cases above
    assert (refused.value.code, refused.value.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_operators_see_which_tenant_costs(mesh: Mesh) -> None:
    """Over all tenants or those named, by tenant and any other dimension but users; names of tenants are ids."""
    cheap, dear = mesh.new_tenant(), mesh.new_tenant()
    await settled(mesh, cheap, model=HAIKU)
    await settled(mesh, dear, model=OPUS)
    asked = asking(TENANT, order_by=pb.USAGE_MEASURE_COST)
    rows = (await query_tenants(mesh, asked, cheap, dear)).rows
    assert [(row.tenant_id, row.cost.nano_usd) for row in rows] == [(str(dear.id), 1_750_000), (str(cheap.id), 350_000)]
    asked.page_size = 1_000
    assert {str(cheap.id), str(dear.id)} <= {row.tenant_id for row in (await query_tenants(mesh, asked)).rows}
    (both,) = (await query_tenants(mesh, asking(), cheap, dear)).rows
    assert (both.tenant_id, both.cost.nano_usd) == ("", 2_100_000)
    (one,) = (await query_tenants(mesh, asking(TENANT, MODEL, bucket=DAY, with_latencies=True), dear)).rows
    assert (one.tenant_id, one.model, one.total.count) == (str(dear.id), OPUS, 1)


async def test_operators_say_why_and_see_no_users(mesh: Mesh) -> None:
    """Without a reason, without an operator's key, or about users, nothing is told."""
    tenant = mesh.new_tenant()
    with pytest.raises(MeshError) as unreasoned:
        await query_tenants(mesh, asking(TENANT), reason="")
    assert unreasoned.value.reason_name == "OPERATOR_REASON_MISSING"
    for asked in (asking(USER), asking(filter=pb.UsageFilter(users=["user-1"]))):
        with pytest.raises(MeshError) as refused:
            await query_tenants(mesh, asked)
        assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as tenants:
        request = pb.QueryUsageOfTenantsRequest(query=asking())
        await mesh.outside.usage.QueryUsageOfTenants(request, metadata=(("authorization", f"Bearer key-{tenant.id}"),), timeout=10)
    assert tenants.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_tenant_sees_its_own_use_alone(mesh: Mesh) -> None:
    """Nothing of another tenant is in an answer, folded or not, whatever is asked for."""
    one, other = mesh.new_tenant(), mesh.new_tenant()
    await settled(mesh, one)
    await settled(mesh, one, reserve_time=NOON)
    await mesh.record(mesh.use(one))
    for asked in (asking(*ALL_NAMES), asking(bucket=HOUR), asking(with_latencies=True)):
        assert not (await query(mesh, other, asked)).rows
    assert (await balance(mesh, other)).cost.nano_usd == 0


async def test_the_balance_is_of_this_moment(mesh: Mesh) -> None:
    """Cost, tokens and units of the current cycle, and what may still come, in the very next answer after each change."""
    tenant = mesh.new_tenant()
    await settled(mesh, tenant, reserve_time=datetime.now(UTC) - timedelta(days=63))
    assert (await balance(mesh, tenant)).cost.nano_usd == 0
    call = await mesh.opened(tenant)
    waiting = await balance(mesh, tenant)
    assert (waiting.outstanding_count, waiting.outstanding_bound.nano_usd, waiting.settled_count) == (1, 5_000_000, 0)
    await mesh.settle(bill(call.ref, cache_read_tokens=7))
    await mesh.record(mesh.use(tenant, quantity=3), mesh.use(tenant, product_unit="audio_seconds", quantity=40))
    found = await balance(mesh, tenant)
    assert (found.outstanding_count, found.settled_count, found.tokens.cache_read_tokens) == (0, 1, 7)
    assert found.cost.nano_usd == 350_000 + 700
    assert [(unit.product_unit, unit.quantity) for unit in found.units] == [("ai_interviews", 3), ("audio_seconds", 40)]
    assert found.start_time.ToDatetime(tzinfo=UTC) <= found.read_time.ToDatetime(tzinfo=UTC) < found.end_time.ToDatetime(tzinfo=UTC)


async def test_the_cycle_is_the_tenants_own(mesh: Mesh) -> None:
    """It begins on the day of the tenant's anchor, at midnight of its time zone."""
    tenant = mesh.new_tenant()
    rules = rules_pb.LimitRules(time_zone="Asia/Tokyo")
    rules.cycle_anchor_time.FromDatetime(datetime(2026, 1, 10, 16, tzinfo=UTC))
    mesh.peers.configs.rules[str(tenant.id)] = rules
    found = await balance(mesh, tenant)
    tokyo = found.start_time.ToDatetime(tzinfo=UTC) + timedelta(hours=9)
    assert (tokyo.day, tokyo.hour) == (11, 0)


async def test_questions_may_be_read_elsewhere_and_balances_never_are(mesh: Mesh) -> None:
    """With a replica that is away questions answer UNAVAILABLE; reports and balances come from the primary, as does every write."""
    away = "postgresql://metering_service:x@127.0.0.1:9/none"
    divided = await running_mesh(mesh.settings.postgres_admin_dsn.get_secret_value(), mesh.peers, mesh.admin, postgres_read_dsn=away)
    try:
        tenant = divided.new_tenant()
        await settled(divided, tenant)
        assert (await balance(divided, tenant)).cost.nano_usd == 350_000
        with pytest.raises(MeshError) as refused:
            await query(divided, tenant, asking())
        assert refused.value.code is grpc.StatusCode.UNAVAILABLE
        assert (await query_tenants(divided, asking(TENANT), tenant)).rows
    finally:
        await divided.close()


async def test_a_late_settlement_leaves_no_trace_of_the_interruption(mesh: Mesh) -> None:
    """Unresolved and then settled, a call counts as settled once; void after unresolved, as void once; tombstones count nothing."""
    tenant = mesh.new_tenant()
    cut, swept, gone = [await mesh.opened(tenant) for _ in range(3)]
    await mesh.void(unknown(cut.ref, ledger_pb.TokenUsage(input_tokens=5)), unknown(swept.ref), unknown(gone.ref), not_billed(ref(tenant)))
    await mesh.settle(bill(cut.ref))
    await mesh.void(not_billed(gone.ref, "cancelled"))
    (row,) = (await query(mesh, tenant, asking())).rows
    assert (row.settled_count, row.void_count, row.unresolved_count, row.tokens.input_tokens) == (1, 1, 1, 100)
    assert (row.failures.cancelled_count, row.failures.other_count) == (1, 1)
