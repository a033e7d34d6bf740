"""A tenant's beginning and end in the ledger: provisioned, exported, pseudonymised; amounts stay for ever."""

import orjson
import pytest

from devstack.ports import free_port
from mesh.common.v1 import lifecycle_service_pb2 as pb
from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from tests.metering import budgets, events
from tests.metering.billing import USD, close, ended, grant, recomputed, rows_of, subscribe, use_units
from tests.metering.mesh import Mesh, Tenant, bill, not_billed, ref, unknown
from tests.metering.rerating import load_versions, order, rerated, used
from tests.metering.usage import ALL_NAMES, MODEL, asking, fold, query


async def export(mesh: Mesh, tenant: Tenant) -> list[tuple[str, dict[str, object]]]:
    """Everything that is exported of a tenant."""
    caller = mesh.tenant_service
    async with caller.channel.stream(
        caller.lifecycle.ExportTenant, pb.ExportTenantRequest(), timeout_seconds=20, tenant=tenant.context
    ) as stream:
        return [(record.kind, orjson.loads(record.record_json)) async for record in stream]


async def erase(mesh: Mesh, tenant: Tenant) -> dict[str, int]:
    """Erases a tenant; counts by kind."""
    caller = mesh.tenant_service
    response = await caller.channel.unary(caller.lifecycle.EraseTenant, pb.EraseTenantRequest(), timeout_seconds=20, tenant=tenant.context)
    return {record.kind: record.count for record in response.erased}


async def test_provisioning_makes_the_first_epoch_once(mesh: Mesh) -> None:
    """A repeated provisioning changes nothing, also after epochs have begun."""
    tenant, caller = mesh.new_tenant(), mesh.tenant_service
    for epoch in (0, 0, 1):
        if epoch == 1:
            await mesh.begin_epoch(tenant)
        request = pb.ProvisionTenantRequest()
        await caller.channel.unary(caller.lifecycle.ProvisionTenant, request, timeout_seconds=5, tenant=tenant.context)
        assert await mesh.admin.fetchval("SELECT epoch FROM metering.tenant_epochs WHERE tenant_id = $1", tenant.id) == epoch


async def test_export_streams_every_call_and_entry_as_json(mesh: Mesh) -> None:
    """All calls, tombstones and uses of units included, and all entries of the tenant and of nobody else, across several chunks."""
    tenant, other = mesh.new_tenant(), mesh.new_tenant()
    calls = [mesh.opening(tenant) for _ in range(700)]
    await mesh.open(*calls)
    await mesh.settle(*[bill(call.ref) for call in calls[:600]])
    await mesh.void(not_billed(ref(tenant)))
    await mesh.opened(other)
    await mesh.record(*[mesh.use(tenant, quantity=2) for _ in range(650)], mesh.use(other))
    records = await export(mesh, tenant)
    kinds = [kind for kind, _ in records]
    assert (kinds.count("postgres:metering.calls"), kinds.count("postgres:metering.entries")) == (701 + 650, 600)
    units = [record for kind, record in records if kind == "postgres:metering.unit_entries"]
    assert (len({record["reservation_id"] for record in units}), sum(int(str(record["quantity"])) for record in units)) == (650, 1_300)
    assert sum(record.get("quantity") == 2 and record["user_name"] == "user-1" for kind, record in records if kind.endswith("calls")) == 650
    assert {record["tenant_id"] for _, record in records} == {str(tenant.id)}
    assert sum(int(record["cost_nano_usd"]) for kind, record in records if kind.endswith(".entries")) == 600 * 350_000


async def test_erasure_forgets_people_and_keeps_amounts(mesh: Mesh) -> None:
    """Users, features and prompt names are blanked in every call; amounts, states and leases stay; a repeat finds nothing."""
    tenant, other = mesh.new_tenant(), mesh.new_tenant()
    calls = [mesh.opening(tenant) for _ in range(600)]
    await mesh.open(*calls)
    untouched = await mesh.opened(other)
    await mesh.settle(bill(calls[0].ref))
    assert await erase(mesh, tenant) == {"postgres:metering.calls": 600, "postgres:metering.events": 0}
    assert await erase(mesh, tenant) == {"postgres:metering.calls": 0, "postgres:metering.events": 0}
    rows = await mesh.admin.fetch("SELECT DISTINCT user_name, feature, prompt_version FROM metering.calls WHERE tenant_id = $1", tenant.id)
    assert [tuple(row) for row in rows] == [("", "", "")]
    row = await mesh.row(untouched.ref)
    assert row is not None
    assert row["user_name"] == "user-1"
    first = await mesh.row(calls[0].ref)
    assert first is not None
    assert first["cost_nano_usd"] == 350_000
    (late,) = await mesh.settle(bill(calls[1].ref))
    assert late.outcome == ledger_pb.SETTLE_OUTCOME_SETTLED


async def test_a_call_opened_late_for_an_erased_tenant_is_billed_without_names(mesh: Mesh) -> None:
    """After the erasure a call is opened and settled like any other, and no user, feature or prompt name is written with it."""
    tenant = mesh.new_tenant()
    await mesh.opened(tenant)
    await erase(mesh, tenant)
    late = await mesh.opened(tenant)
    rows = await mesh.admin.fetch("SELECT DISTINCT user_name, feature, prompt_version FROM metering.calls WHERE tenant_id = $1", tenant.id)
    assert [tuple(row) for row in rows] == [("", "", "")]
    (settled,) = await mesh.settle(bill(late.ref))
    assert settled.outcome == ledger_pb.SETTLE_OUTCOME_SETTLED
    caller = mesh.tenant_service
    scan = await caller.channel.unary(
        caller.lifecycle.ScanTenant, pb.ScanTenantRequest(canaries=["user-1"]), timeout_seconds=20, tenant=tenant.context
    )
    found = {(store.store, store.sight): store.found_count for store in scan.stores if store.found_count}
    assert found[("postgres:metering.calls", "tenant")] == 2
    assert all(store.kept for store in scan.stores if store.found_count)
    assert not any(store.canary_count for store in scan.stores if store.sight == "tenant")


async def test_uses_of_an_erased_tenant_are_kept_without_names(mesh: Mesh) -> None:
    """Users and features of uses are blanked, also of those that come late; a repeat with the names is still the same use."""
    tenant = mesh.new_tenant()
    early, late = mesh.use(tenant), mesh.use(tenant)
    await mesh.record(early)
    assert await erase(mesh, tenant) == {"postgres:metering.calls": 1, "postgres:metering.events": 0}
    recorded, conflict = ledger_pb.RECORD_UNITS_OUTCOME_RECORDED, ledger_pb.RECORD_UNITS_OUTCOME_CONFLICT
    assert await mesh.record(late) == [recorded]
    early.quantity = 9
    assert await mesh.record(early, late) == [conflict, recorded]
    early.quantity = 1
    assert await mesh.record(early) == [recorded]
    rows = await mesh.admin.fetch("SELECT user_name, feature, prompt_version FROM metering.calls WHERE tenant_id = $1", tenant.id)
    assert [tuple(row) for row in rows] == [("", "", "")] * 2
    caller = mesh.tenant_service
    scan = await caller.channel.unary(
        caller.lifecycle.ScanTenant, pb.ScanTenantRequest(canaries=["user-1", "hiring"]), timeout_seconds=20, tenant=tenant.context
    )
    found = {(store.store, store.sight): store for store in scan.stores if store.found_count}
    assert found[("postgres:metering.unit_entries", "tenant")].found_count == 2
    assert all(store.kept for store in found.values())
    assert not any(store.canary_count for store in scan.stores if store.sight == "tenant")


async def test_corrections_are_exported_with_what_they_correct(mesh: Mesh) -> None:
    """Each adjustment names its re-rating, and the re-rating says which versions it was from and to, and that it is done."""
    tenant = mesh.new_tenant()
    await load_versions(mesh)
    await used(mesh, tenant, [{"input_tokens": 1_000_000}])
    await rerated(mesh, tenant, order())
    exported = await export(mesh, tenant)
    (written,) = [record for kind, record in exported if kind == "postgres:metering.reratings"]
    assert (written["price_versions"], written["right_version"], written["finish_time"] is None) == (["2026-01"], "right", False)
    entries = [record for kind, record in exported if kind.endswith(".entries")]
    assert [(entry["kind"], entry["rerating_id"]) for entry in entries] == [(1, None), (3, written["rerating_id"])]


async def test_an_erased_tenant_is_put_on_no_plan_and_granted_no_credit(mesh: Mesh) -> None:
    """What was there before is answered again; nothing new is written."""
    tenant, credit_id, subscription_id = mesh.new_tenant(), str(new_uuid7()), str(new_uuid7())
    await subscribe(mesh, tenant, "starter", ended(2).start_time, subscription_id=subscription_id)
    granted = await grant(mesh, tenant, 5 * USD, credit_id=credit_id)
    await erase(mesh, tenant)
    before = await rows_of(mesh, tenant)
    for attempt in (subscribe(mesh, tenant, "free"), grant(mesh, tenant, USD)):
        with pytest.raises(MeshError, match="credit notes") as refused:
            await attempt
        assert (refused.value.reason_name, refused.value.metadata["state"]) == ("WRONG_STATE", "ERASED")
    assert await grant(mesh, tenant, 5 * USD, credit_id=credit_id) == granted
    await subscribe(mesh, tenant, "starter", ended(2).start_time, subscription_id=subscription_id)
    assert await rows_of(mesh, tenant) == before


async def test_what_was_billed_is_exported_and_outlives_the_tenant(mesh: Mesh) -> None:
    """Plans, credits and whole invoices are in the export; an erasure leaves them as they are, and they can still be made again."""
    tenant = mesh.new_tenant()
    await subscribe(mesh, tenant, "starter", ended(3).start_time)
    await grant(mesh, tenant, 5 * USD)
    await use_units(mesh, tenant, ended(2).start_time, quantity=30)
    invoices = [await close(mesh, tenant, ended(ago)) for ago in (2, 1)]
    exported = await export(mesh, tenant)
    kinds = [kind.partition(".")[2] for kind, _ in exported]
    assert [kinds.count(kind) for kind in ("subscriptions", "credits", "invoices")] == [1, 1, 2]
    first, second = [record for kind, record in exported if kind.endswith(".invoices")]
    assert [record["invoice_id"] for record in (first, second)] == [invoice.invoice_id for invoice in invoices]
    assert [(line["name"], line["quantity"]) for line in first["lines"]] == [("base", 1), ("ai_interviews", 20), ("ai_interviews", 10)]
    assert first["credit_uses"][0]["amount_nano_usd"] == 5 * USD
    await erase(mesh, tenant)
    assert await export(mesh, tenant) != []
    assert await recomputed(mesh, tenant) == []
    caller = mesh.tenant_service
    scan = await caller.channel.unary(
        caller.lifecycle.ScanTenant, pb.ScanTenantRequest(canaries=["user-1"]), timeout_seconds=20, tenant=tenant.context
    )
    found = {store.store.partition(".")[2] for store in scan.stores if store.found_count}
    assert found >= {"subscriptions", "credits", "invoice_closings", "invoices", "invoice_lines", "credit_uses"}
    assert all(store.kept for store in scan.stores if store.found_count)


async def test_events_of_an_erased_tenant_are_kept_without_names(mesh: Mesh) -> None:
    """Users, features and metadata are blanked, also of events that come late; quantities, times and ids stay, and repeats are repeats."""
    await events.register(mesh)
    tenant, other = mesh.new_tenant(), mesh.new_tenant()
    early = [events.event(f"{index:03}", quantity=2, metadata={"who": "user-1"}) for index in range(600)]
    late = events.event("late", quantity=2, metadata={"who": "user-1"})
    many = [events.event(f"late-{index}", quantity=2, metadata={"who": "user-1"}) for index in range(20)]
    await events.record(mesh, tenant, early)
    await events.record(mesh, other, early)
    await events.reverse(mesh, tenant, early[0])
    assert await erase(mesh, tenant) == {"postgres:metering.calls": 0, "postgres:metering.events": 601}
    assert await erase(mesh, tenant) == {"postgres:metering.calls": 0, "postgres:metering.events": 0}
    assert await events.outcomes(mesh, tenant, late, early[1]) == [events.RECORDED, events.DUPLICATE]
    assert await events.outcomes(mesh, tenant, *many) == [events.RECORDED] * 20
    assert await events.totals(mesh, tenant) == [(events.PRODUCT, events.TYPE, "", "", 622, 1_240)]
    assert await events.totals(mesh, other) == [(events.PRODUCT, events.TYPE, "user-1", "hiring", 600, 1_200)]
    caller, request = mesh.tenant_service, pb.ScanTenantRequest(canaries=["user-1"])
    scan = await caller.channel.unary(caller.lifecycle.ScanTenant, request, timeout_seconds=20, tenant=tenant.context)
    found = {store.store: store for store in scan.stores if store.sight == "tenant" and store.found_count}
    assert {"postgres:metering.events", "postgres:metering.event_claims"} <= found.keys()
    assert all(store.kept for store in found.values())
    assert not any(store.canary_count for store in found.values())
    assert await mesh.admin.fetchval("SELECT count(*) FROM metering.event_claims WHERE tenant_id = $1 AND digest <> ''", tenant.id) == 0


async def test_export_streams_every_event(mesh: Mesh) -> None:
    """All events and reversals of the tenant and of nobody else, across several chunks, each once."""
    await events.register(mesh)
    tenant, other = mesh.new_tenant(), mesh.new_tenant()
    log = [events.event(f"{index:04}") for index in range(1_200)]
    await events.record(mesh, tenant, log)
    await events.reverse(mesh, tenant, log[0])
    await events.record(mesh, other, log[:1])
    records = [record for kind, record in await export(mesh, tenant) if kind == "postgres:metering.events"]
    assert (len(records), len({record["event_id"] for record in records}), len({record["id"] for record in records})) == (
        1_201,
        1_201,
        1_200,
    )
    assert {record["tenant_id"] for record in records} == {str(tenant.id)}
    assert sum(int(str(record["quantity"])) for record in records) == 1_199


async def test_sums_of_an_erased_tenant_have_no_names_and_every_amount(mesh: Mesh) -> None:
    """Whether folded or still in the log, users, features and prompts are gone from the sums; amounts and latencies are what they were."""
    tenant, other = mesh.new_tenant(), mesh.new_tenant()
    await mesh.settle(bill((await mesh.opened(other)).ref))
    interrupted = [await mesh.opened(tenant, user=f"user-{number}") for number in range(4)]
    await mesh.void(*[unknown(call.ref) for call in interrupted])
    await mesh.record(mesh.use(tenant, quantity=5))
    await mesh.settle(bill(interrupted[0].ref))
    await fold(mesh)
    await mesh.settle(bill(interrupted[1].ref))
    asked = asking(MODEL, with_latencies=True)
    before = list((await query(mesh, tenant, asked)).rows)
    # Not folded yet when the names go.
    await mesh.record(mesh.use(tenant, quantity=2))
    await erase(mesh, tenant)
    await mesh.settle(bill((await mesh.opened(tenant)).ref))
    assert {(row.user, row.feature, row.prompt_version) for row in (await query(mesh, tenant, asking(*ALL_NAMES))).rows} == {("", "", "")}
    after = list((await query(mesh, tenant, asked)).rows)
    assert [(row.model, row.quantity, row.unresolved_count) for row in after] == [("", 7, 0), (before[1].model, 0, 2)]
    assert (after[1].settled_count, after[1].total.count, after[1].cost.nano_usd) == (3, 3, 3 * 350_000)
    await mesh.settle(bill(interrupted[2].ref), bill(interrupted[3].ref))
    (_, calls) = (await query(mesh, tenant, asked)).rows
    assert (calls.settled_count, calls.unresolved_count, calls.total.count) == (5, 0, 5)
    for table in ("usage_pending", "usage_rollups", "usage_latencies", "usage_levels"):
        rows = await mesh.admin.fetch(f"SELECT to_jsonb(t) - 'pending_id' AS row FROM metering.{table} t WHERE tenant_id = $1", tenant.id)
        assert not any(word in row["row"] for row in rows for word in ("user-", "chat", "hiring", "default@1"))
    series = await mesh.admin.fetchval(
        "SELECT count(*) FROM metering.usage_rollups WHERE tenant_id = $1 AND series IN "
        "(SELECT series FROM metering.usage_rollups WHERE tenant_id = $2 AND user_name || feature <> '')",
        tenant.id,
        other.id,
    )
    assert series == 0, "a series that can be made of names again would tell them"


async def test_an_erasure_moves_no_amount(mesh: Mesh) -> None:
    """Blanking a million calls writes no change of use: rows of sums lose their names where they are, and none is added."""
    tenant = mesh.new_tenant()
    await mesh.settle(*[bill((await mesh.opened(tenant, user=f"user-{number}")).ref) for number in range(3)])
    await fold(mesh)
    counted = "SELECT count(*) FROM (SELECT tenant_id FROM metering.{} WHERE tenant_id = $1) t"
    before = await mesh.admin.fetchval(counted.format("usage_rollups"), tenant.id)
    await erase(mesh, tenant)
    await fold(mesh)
    assert await mesh.admin.fetchval(counted.format("usage_rollups"), tenant.id) == before


async def test_budgets_and_receivers_go_and_what_fired_stays_without_names(mesh: Mesh) -> None:
    """An erasure leaves no budget, mark, receiver, secret or delivery; alerts keep their amounts. Nothing new can be put afterwards."""
    tenant, other = budgets.new_tenant(mesh), budgets.new_tenant(mesh)
    for each in (tenant, other):
        await budgets.receiver_at(mesh, each, f"http://127.0.0.1:{free_port()}/events")
        await budgets.put(mesh, each, amount=100, user="user-1", feature="chat", thresholds_percent=[100])
        await budgets.use(mesh, each, 150)
        await budgets.wait_fired(mesh, each, [100])
    exported = await export(mesh, tenant)
    kinds = [kind.partition(".")[2] for kind, _ in exported]
    assert [kinds.count(kind) for kind in ("budgets", "budget_alerts", "webhook_endpoints")] == [1, 1, 1]
    assert not any("secret" in record for _, record in exported)
    await erase(mesh, tenant)
    for table, left in (("budgets", 0), ("budget_marks", 0), ("webhook_endpoints", 0), ("webhook_deliveries", 0), ("budget_alerts", 1)):
        assert await mesh.admin.fetchval(f"SELECT count(*) FROM metering.{table} WHERE tenant_id = $1", tenant.id) == left, table
    [alert] = await mesh.admin.fetch("SELECT * FROM metering.budget_alerts WHERE tenant_id = $1", tenant.id)
    assert (alert["user_name"], alert["feature"], alert["metadata"], alert["amount"], alert["used"]) == ("", "", None, 100, 150)
    caller, request = mesh.tenant_service, pb.ScanTenantRequest(canaries=["user-1", "budget"])
    scan = await caller.channel.unary(caller.lifecycle.ScanTenant, request, timeout_seconds=20, tenant=tenant.context)
    found = [store for store in scan.stores if store.sight == "tenant" and store.found_count]
    assert all(store.kept and not store.canary_count for store in found)
    for late in (budgets.put(mesh, tenant), budgets.receiver_at(mesh, tenant, f"http://127.0.0.1:{free_port()}/events")):
        with pytest.raises(MeshError) as refused:
            await late
        assert refused.value.metadata["resource"] == "tenant"
    assert len(await budgets.deliveries(mesh, other)) == 1


async def test_alerts_of_many_users_lose_their_names_alike(mesh: Mesh) -> None:
    """Nothing tells them apart afterwards but their ids: each keeps its amounts."""
    tenant = budgets.new_tenant(mesh)
    await budgets.put(mesh, tenant, amount=100, each_user=True, thresholds_percent=[100])
    for user in ("ada", "ben"):
        await budgets.use(mesh, tenant, 150, user=user)
    await budgets.wait_fired(mesh, tenant, [100, 100])
    await erase(mesh, tenant)
    kept = await mesh.admin.fetch("SELECT user_name, used, metadata FROM metering.budget_alerts WHERE tenant_id = $1", tenant.id)
    assert [tuple(row.values()) for row in kept] == [("", 150, None)] * 2
