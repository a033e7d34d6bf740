"""Settling calls: once, exactly, by the price of the open, with entry and outbox row in the same transaction."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
import structlog

from mesh.metering.v1 import ledger_service_pb2 as pb
from mesh.ratelimit.v1 import rate_limit_service_pb2 as limits_pb
from services.kernel.ids import new_uuid7
from tests.metering.mesh import Mesh, Tenant, bill, not_billed, ref, unknown

# 100 input at $1 and 50 output at $5 a million: 100,000 + 250,000 nano-dollars.
COST = 350_000


async def entries(mesh: Mesh, tenant: Tenant) -> list[tuple[int, int, int]]:
    """Kind, tokens and cost of the tenant's entries, oldest first."""
    rows = await mesh.admin.fetch(
        "SELECT kind, total_tokens, cost_nano_usd FROM metering.entries WHERE tenant_id = $1 ORDER BY record_time, number", tenant.id
    )
    return [tuple(row) for row in rows]


async def test_settlement_writes_state_entry_and_end_together(mesh: Mesh) -> None:
    """A settled call has its cost, one entry, no lease, and its end reaches the limits with the tokens and the cost."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    (result,) = await mesh.settle(bill(call.ref))
    assert (result.outcome, result.cost_nano_usd) == (pb.SETTLE_OUTCOME_SETTLED, COST)
    assert await entries(mesh, tenant) == [(1, 150, COST)]
    assert await mesh.admin.fetchval("SELECT count(*) FROM metering.call_leases WHERE tenant_id = $1", tenant.id) == 0
    row = await mesh.row(call.ref)
    assert row is not None
    assert (row["state"], row["entry_id"].bytes, row["settled_epoch"]) == (pb.CALL_STATE_SETTLED, result.entry_id, 0)
    (commit,) = await mesh.limits.wait_for(tenant.id, 1)
    assert commit.kind == limits_pb.COMMIT_KIND_SETTLED
    assert (commit.actual.tokens, commit.actual.cost_nano_usd, commit.epoch) == (150, COST, 0)


async def test_every_token_class_is_billed_at_its_own_price(mesh: Mesh) -> None:
    """Input, output, cache reads and both cache writes each count once."""
    call = await mesh.opened(mesh.new_tenant())
    classes = {"cache_read_tokens": 1_000, "cache_write_5m_tokens": 10, "cache_write_1h_tokens": 7}
    (result,) = await mesh.settle(bill(call.ref, input_tokens=3, output_tokens=2, **classes))
    assert result.cost_nano_usd == 3 * 1_000 + 2 * 5_000 + 1_000 * 100 + 10 * 1_250 + 7 * 2_000


async def test_repeated_settlement_is_a_no_op_with_the_same_answer(mesh: Mesh) -> None:
    """The same usage again, alone or twice in one batch, is answered with the first entry and cost."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    first, twin = await mesh.settle(bill(call.ref), bill(call.ref))
    (again,) = await mesh.settle(bill(call.ref))
    assert first == twin == again
    assert len(await entries(mesh, tenant)) == 1


async def test_other_usage_is_a_conflict_that_changes_nothing_and_raises_an_alarm(mesh: Mesh) -> None:
    """A settled call cannot be settled with other figures; an error event says so."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    (first,) = await mesh.settle(bill(call.ref))
    with structlog.testing.capture_logs() as logs:
        (result,) = await mesh.settle(bill(call.ref, output_tokens=51))
    assert (result.outcome, result.cost_nano_usd, result.entry_id) == (pb.SETTLE_OUTCOME_CONFLICT, COST, first.entry_id)
    assert await entries(mesh, tenant) == [(1, 150, COST)]
    (alarm,) = [line for line in logs if line["event"] == "settlement_conflict"]
    assert (alarm["log_level"], alarm["tenant_id"]) == ("error", str(tenant.id))


async def test_conflicting_twins_in_one_batch_settle_the_first(mesh: Mesh) -> None:
    """Of two settlements of one call in one batch the first counts and the other is the conflict."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    results = await mesh.settle(bill(call.ref), bill(call.ref, output_tokens=51))
    assert [result.outcome for result in results] == [pb.SETTLE_OUTCOME_SETTLED, pb.SETTLE_OUTCOME_CONFLICT]
    assert await entries(mesh, tenant) == [(1, 150, COST)]


async def test_unopened_and_void_calls_cannot_be_settled(mesh: Mesh) -> None:
    """A bill for a call that was never opened, was voided or has a tombstone is refused and written nowhere."""
    tenant = mesh.new_tenant()
    voided, buried = await mesh.opened(tenant), ref(tenant)
    await mesh.void(not_billed(voided.ref), not_billed(buried))
    results = await mesh.settle(bill(ref(tenant)), bill(voided.ref), bill(buried))
    assert {result.outcome for result in results} == {pb.SETTLE_OUTCOME_NOT_OPEN}
    assert await entries(mesh, tenant) == []


async def test_unresolved_call_is_settled_by_a_late_settlement(mesh: Mesh) -> None:
    """The exact usage, when it is learnt after all, replaces the bound and what had been received."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    await mesh.void(unknown(call.ref, pb.TokenUsage(input_tokens=9, output_tokens=1)))
    (result,) = await mesh.settle(bill(call.ref))
    assert result.outcome == pb.SETTLE_OUTCOME_SETTLED
    row = await mesh.row(call.ref)
    assert row is not None
    assert (row["state"], row["input_tokens"], row["unresolved_time"]) == (pb.CALL_STATE_SETTLED, 100, None)
    kinds = [commit.kind for commit in await mesh.limits.wait_for(tenant.id, 2)]
    assert sorted(kinds) == [limits_pb.COMMIT_KIND_SETTLED, limits_pb.COMMIT_KIND_PIN]


async def test_settlement_on_a_replica_that_did_not_open_the_call(mesh: Mesh) -> None:
    """The price of a call opened elsewhere is read from the ledger."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant, model="claude-opus-4-6")
    mesh.app.ledger._price_keys.clear()
    (result,) = await mesh.settle(bill(call.ref))
    assert (result.outcome, result.cost_nano_usd) == (pb.SETTLE_OUTCOME_SETTLED, 100 * 5_000 + 50 * 25_000)


async def test_settlement_keeps_the_epoch_it_happened_in(mesh: Mesh) -> None:
    """A call opened in epoch 0 and settled in epoch 2 is told to the limits as of epoch 2."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    await mesh.begin_epoch(tenant)
    await mesh.begin_epoch(tenant)
    await mesh.settle(bill(call.ref))
    (commit,) = await mesh.limits.wait_for(tenant.id, 1)
    assert commit.epoch == 2


async def test_zero_usage_is_a_settlement_of_nothing(mesh: Mesh) -> None:
    """A call that was billed nothing is settled, not void."""
    call = await mesh.opened(mesh.new_tenant())
    (result,) = await mesh.settle(bill(call.ref, input_tokens=0, output_tokens=0))
    assert (result.outcome, result.cost_nano_usd) == (pb.SETTLE_OUTCOME_SETTLED, 0)


async def reconciled(mesh: Mesh, tenant: Tenant, *, input_tokens: int = 60, cost: int = 60_000) -> pb.OpenCall:
    """A call an operator closed by the provider's report after it had been unresolved."""
    call = await mesh.opened(tenant, dispatch_deadline=datetime.now(UTC) - timedelta(minutes=2))
    await mesh.void(unknown(call.ref))
    await reconcile(mesh, call, input_tokens, cost)
    return call


async def reconcile(mesh: Mesh, call: pb.OpenCall, input_tokens: int, cost: int) -> None:
    """Closes an unresolved call as the jobs role."""
    await mesh.app.jobs.call(
        "SELECT metering.reconcile_call($1, $2, $3, $4, 0, 0, 0, 0, $5, 'provider report')",
        UUID(bytes=call.ref.tenant_id),
        UUID(bytes=call.ref.reservation_id),
        new_uuid7(),
        input_tokens,
        cost,
    )


async def test_settlement_after_reconciliation_is_an_adjustment(mesh: Mesh) -> None:
    """Closed books are not edited: the difference becomes an entry, once, and the call shows what it really cost."""
    tenant = mesh.new_tenant()
    call = await reconciled(mesh, tenant)
    (first,) = await mesh.settle(bill(call.ref))
    (again,) = await mesh.settle(bill(call.ref))
    assert first == again
    assert (first.outcome, first.cost_nano_usd) == (pb.SETTLE_OUTCOME_ADJUSTED, COST)
    assert await entries(mesh, tenant) == [(2, 60, 60_000), (3, 90, COST - 60_000)]
    assert await mesh.state(call.ref) == pb.CALL_STATE_RECONCILED


async def test_second_other_adjustment_is_a_conflict(mesh: Mesh) -> None:
    """A reconciled call is adjusted once; other figures after that are a conflict."""
    tenant = mesh.new_tenant()
    call = await reconciled(mesh, tenant, input_tokens=500, cost=500_000)
    results = await mesh.settle(bill(call.ref), bill(call.ref, output_tokens=51))
    assert [result.outcome for result in results] == [pb.SETTLE_OUTCOME_ADJUSTED, pb.SETTLE_OUTCOME_CONFLICT]
    assert await entries(mesh, tenant) == [(2, 500, 500_000), (3, -350, COST - 500_000)]


async def test_reconciliation_waits_until_the_call_cannot_be_dispatched_any_more(mesh: Mesh) -> None:
    """A call whose deadline is not a minute past may still be billed, so its books stay open; so do those of a call under way."""
    tenant = mesh.new_tenant()
    soon = await mesh.opened(tenant)
    await mesh.void(unknown(soon.ref))
    running = await mesh.opened(tenant)
    for call in (soon, running):
        with pytest.raises(Exception, match="reconcile"):
            await reconcile(mesh, call, 0, 0)
    assert await mesh.state(soon.ref) == pb.CALL_STATE_UNRESOLVED


async def test_settled_call_sums_equal_their_entries(mesh: Mesh) -> None:
    """What calls show and what entries say is the same money, adjustments included."""
    tenant = mesh.new_tenant()
    call = await reconciled(mesh, tenant)
    await mesh.settle(bill(call.ref))
    for tokens in range(1, 6):
        await mesh.settle(bill((await mesh.opened(tenant)).ref, output_tokens=tokens))
    shown = await mesh.admin.fetchval("SELECT sum(cost_nano_usd) FROM metering.calls WHERE tenant_id = $1", tenant.id)
    assert shown == sum(cost for _, _, cost in await entries(mesh, tenant))
