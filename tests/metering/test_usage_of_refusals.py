"""Refusals of the limits in questions about use: counted by reason and rule, each once, whoever tells them how often."""

from datetime import UTC, datetime, timedelta

import pytest

from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from mesh.metering.v1 import usage_service_pb2 as pb
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from tests.metering.mesh import Mesh
from tests.metering.test_lifecycle import erase
from tests.metering.usage import FEATURE, HOUR, MODEL, REASON, RULE, TENANT, TIER, UNIT, USER, asking, fold, query, query_tenants

RECORDED, NOT_PROVEN = ledger_pb.RECORD_REFUSALS_OUTCOME_RECORDED, ledger_pb.RECORD_REFUSALS_OUTCOME_TENANT_NOT_PROVEN


async def test_refusals_are_counted_by_every_name(mesh: Mesh) -> None:
    """By reason, rule, feature, model, user and tier, beside the calls and as none of them; operators see tenants'."""
    tenant = mesh.new_tenant()
    await mesh.opened(tenant)
    told = [
        mesh.refusals(tenant, 5),
        mesh.refusals(tenant, 3, rule="cost_per_day", user="user-2"),
        mesh.refusals(tenant, 2, reason="BURST_LIMIT", model="claude-opus-4-6", feature="search"),
        mesh.refusals(tenant, 1, reason="ABUSE_GUARD", rule="", user=""),
    ]
    assert await mesh.refuse(*told) == [RECORDED] * 4
    names = {REASON: "refusal_reason", RULE: "refusal_rule", FEATURE: "feature", MODEL: "model", USER: "user", TIER: "tier"}
    for dimension, counts in (
        (REASON, {"PLAN_LIMIT": 8, "BURST_LIMIT": 2, "ABUSE_GUARD": 1}),
        (RULE, {"tokens_per_minute": 7, "cost_per_day": 3, "": 1}),
        (FEATURE, {"chat": 9, "search": 2}),
        (MODEL, {"claude-haiku-4-5": 9, "claude-opus-4-6": 2}),
        (USER, {"user-1": 7, "user-2": 3, "": 1}),
        (TIER, {"free": 11}),
    ):
        rows = (await query(mesh, tenant, asking(dimension, order_by=pb.USAGE_MEASURE_REFUSALS))).rows
        assert [(getattr(row, names[dimension]), row.refusal_count) for row in rows] == list(counts.items())
    only = pb.UsageFilter(refusal_reasons=["PLAN_LIMIT"], refusal_rules=["cost_per_day"])
    (row,) = (await query(mesh, tenant, asking(filter=only))).rows
    assert (row.refusal_count, row.settled_count, row.quantity, row.cost.nano_usd) == (3, 0, 0, 0)
    (row,) = (await query_tenants(mesh, asking(TENANT, REASON, page_size=1, order_by=pb.USAGE_MEASURE_REFUSALS), tenant)).rows
    assert (row.tenant_id, row.refusal_reason, row.refusal_count) == (str(tenant.id), "PLAN_LIMIT", 8)


async def test_a_count_that_is_told_again_counts_once(mesh: Mesh) -> None:
    """A minute's count so far, repeated, out of order and by several processes: of each the highest stands."""
    tenant, one, other = mesh.new_tenant(), new_uuid7().bytes, new_uuid7().bytes

    async def counted() -> int:
        (row,) = (await query(mesh, tenant, asking(RULE))).rows
        return row.refusal_count

    item = mesh.refusals(tenant, 4)
    for replica, count, whole in ((one, 4, 4), (one, 4, 4), (one, 9, 9), (one, 6, 9), (other, 2, 11), (other, 2, 11), (one, 10, 12)):
        item.count = count
        await mesh.refuse(item, replica_id=replica)
        assert await counted() == whole
    later = mesh.refusals(tenant, 1)
    later.minute_time.FromDatetime(item.minute_time.ToDatetime(tzinfo=UTC) - timedelta(minutes=1))
    await mesh.refuse(later, replica_id=one)
    assert await counted() == 13


async def test_refusals_belong_to_their_minute(mesh: Mesh) -> None:
    """In hours of any zone, for users and without them, whether sums or minutes answer."""
    tenant, noon = mesh.new_tenant(), datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0) - timedelta(days=2)
    for minutes in (-1, 0, 29, 30, 59, 60):
        await mesh.refuse(mesh.refusals(tenant, 1, minute_time=noon + timedelta(minutes=minutes, seconds=7)))
    for start, end, count in ((0, 60, 4), (0, 30, 2), (-1, 61, 6), (30, 60, 2)):
        asked = {"start": noon + timedelta(minutes=start), "end": noon + timedelta(minutes=end)}
        for group_by in ((), (USER,)):
            (row,) = (await query(mesh, tenant, asking(*group_by, **asked))).rows
            assert row.refusal_count == count
    rows = (await query(mesh, tenant, asking(start=noon - timedelta(hours=2), bucket=HOUR, time_zone="Asia/Kolkata"))).rows
    assert [row.refusal_count for row in rows] == [3, 3]


async def test_only_a_proven_tenant_is_counted(mesh: Mesh) -> None:
    """A count whose token is another tenant's leaves no trace and keeps no other from being counted."""
    tenant, thief = mesh.new_tenant(), mesh.new_tenant()
    stolen = mesh.refusals(tenant, 100, context_token=thief.context.token)
    assert await mesh.refuse(stolen, mesh.refusals(thief, 1)) == [NOT_PROVEN, RECORDED]
    assert list((await query(mesh, tenant, asking())).rows) == []
    request = ledger_pb.RecordRefusalsRequest(replica_id=bytes(16), counts=[mesh.refusals(tenant)])
    with pytest.raises(MeshError, match="PERMISSION_DENIED"):
        await mesh.ratelimit.channel.unary(mesh.ratelimit.ledger.RecordRefusals, request, timeout_seconds=5)


async def test_an_erased_tenants_refusals_lose_their_names(mesh: Mesh) -> None:
    """Counts stay, users, features and rules go, folded or not; what is told later has none."""
    tenant = mesh.new_tenant()
    await mesh.refuse(mesh.refusals(tenant, 3))
    await fold(mesh)
    await mesh.refuse(mesh.refusals(tenant, 2, user="user-2"))
    await erase(mesh, tenant)
    await mesh.refuse(mesh.refusals(tenant, 4, user="user-3"))
    rows = (await query(mesh, tenant, asking(USER, FEATURE, RULE, UNIT))).rows
    assert [(row.user, row.feature, row.refusal_rule, row.refusal_count) for row in rows] == [("", "", "", 9)]
    for table in ("usage_pending", "usage_rollups", "refusals"):
        found = await mesh.admin.fetch(f"SELECT to_jsonb(t)::text AS row FROM metering.{table} t WHERE tenant_id = $1", tenant.id)
        assert not any(word in row["row"] for row in found for word in ("user-", "chat", "tokens_per_minute"))
