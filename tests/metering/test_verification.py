"""Whoever verifies the books finds every figure that somebody changed by hand, whatever it is, and nothing where nobody did."""

from collections.abc import AsyncIterator

import pytest

from mesh.metering.v1 import verification_service_pb2 as pb
from services.kernel.errors import MeshError
from services.metering.adapters import postgres_verification
from tests.metering.billing import ended, use_tokens
from tests.metering.mesh import Mesh, bill, mesh_of_its_own, not_billed, unknown
from tests.metering.peers import Peers
from tests.metering.test_lifecycle import erase
from tests.metering.verifying import busy_tenant, differences, spoil, verified
from tests.support.stores import PostgresStore

CALL, SUM, LATENCY = pb.LEDGER_CHECK_CALL, pb.LEDGER_CHECK_USAGE_SUM, pb.LEDGER_CHECK_LATENCY
BALANCE, INVOICE, PRICE = pb.LEDGER_CHECK_BALANCE, pb.LEDGER_CHECK_INVOICE, pb.LEDGER_CHECK_PRICE


@pytest.fixture(scope="module")
async def mesh(postgres: PostgresStore, peers: Peers) -> AsyncIterator[Mesh]:
    """A service with few tenants: a walk of all of them takes as long as there are tenants."""
    async with mesh_of_its_own(postgres, peers) as running:
        yield running


async def test_books_that_nobody_touched_agree(mesh: Mesh) -> None:
    """However calls ended, folded or not, on an invoice or not: nothing differs, and everything was compared."""
    tenant = await busy_tenant(mesh)
    await mesh.void(not_billed((await mesh.opened(tenant)).ref))
    await mesh.void(unknown((await mesh.opened(tenant)).ref))
    await mesh.settle(bill((await mesh.opened(tenant, attempt=2, user="")).ref))
    await mesh.opened(tenant)
    pages = await verified(mesh, tenant)
    assert [list(page.differences) for page in pages] == [[]] * len(pages)
    # Seven calls and uses, two days of sums, one invoice.
    assert len(pages) == 4 and pages[0].compared_count == 7 and pages[-1].compared_count == 1
    assert {page.tenant_id for page in pages} == {str(tenant.id)}


async def test_books_of_an_erased_tenant_agree(mesh: Mesh) -> None:
    """Names are gone from calls and sums alike, and no figure with them."""
    tenant = await busy_tenant(mesh)
    await mesh.settle(bill((await mesh.opened(tenant, user="user-2")).ref))
    await erase(mesh, tenant)
    assert await differences(mesh, tenant) == []
    assert (await verified(mesh, tenant))[0].compared_count == 4


SPOILT = {
    "an entry's cost": (
        "UPDATE metering.entries SET cost_nano_usd = cost_nano_usd + 5 WHERE tenant_id = $1 AND output_tokens = 500",
        {(CALL, "cost_nano_usd"), (BALANCE, "cost_nano_usd"), (PRICE, "cost_nano_usd")},
    ),
    "a call's tokens": (
        "UPDATE metering.calls SET output_tokens = output_tokens + 1 WHERE tenant_id = $1 AND output_tokens = 500",
        {(CALL, "output_tokens"), (SUM, "output_tokens")},
    ),
    "an entry that is gone": (
        "DELETE FROM metering.entries WHERE tenant_id = $1 AND output_tokens = 500",
        {(CALL, name) for name in ("cost_nano_usd", "cache_read_tokens", "cache_write_1h_tokens", "cache_write_5m_tokens",
                                   "input_tokens", "output_tokens")}
        | {(BALANCE, "cost_nano_usd"), (BALANCE, "output_tokens"), (BALANCE, "settled_calls"), (INVOICE, "digest")},
    ),
    "a use of units": (
        "UPDATE metering.unit_entries SET quantity = 99 WHERE tenant_id = $1",
        {(CALL, "quantity"), (BALANCE, "quantity"), (INVOICE, "charges_nano_usd"), (INVOICE, "due_nano_usd")},
    ),
    "the sum of an hour": ("UPDATE metering.usage_rollups SET cost_nano_usd = 1 WHERE tenant_id = $1 AND grain = 1 AND model <> ''",
                           {(SUM, "cost_nano_usd")}),
    "the sum of a day": ("UPDATE metering.usage_rollups SET settled_calls = 7 WHERE tenant_id = $1 AND grain = 2 AND model <> ''",
                         {(SUM, "settled_calls"), (BALANCE, "settled_calls")}),
    "the sum of a user": ("UPDATE metering.usage_rollups SET retries = 7 WHERE tenant_id = $1 AND grain = 4", {(SUM, "retries")}),
    "a sum of nothing": (
        "INSERT INTO metering.usage_rollups SELECT (jsonb_populate_record(u, '{\"start_time\": \"2020-02-02T00:00:00Z\"}')).* "
        "FROM metering.usage_rollups u WHERE tenant_id = $1 AND grain = 5",
        {(SUM, name) for name in ("settled_calls", "output_tokens", "cost_nano_usd", "quantity")},
    ),
    "a latency": ("UPDATE metering.usage_latencies SET calls = 9 WHERE tenant_id = $1 AND kind = 2", {(LATENCY, "calls")}),
    "what is asked for": (
        "UPDATE metering.invoices SET charges_nano_usd = charges_nano_usd + 1, due_nano_usd = due_nano_usd + 1 WHERE tenant_id = $1",
        {(INVOICE, "charges_nano_usd"), (INVOICE, "due_nano_usd")},
    ),
    "a line": ("UPDATE metering.invoice_lines SET amount_nano_usd = 1 WHERE tenant_id = $1 AND line_number = 1", {(INVOICE, "digest")}),
    "a digest": ("UPDATE metering.invoices SET digest = sha256('') WHERE tenant_id = $1", {(INVOICE, "digest")}),
    "an event that is billed": ("UPDATE metering.events SET quantity = 50 WHERE tenant_id = $1",
                                {(SUM, "quantity"), (BALANCE, "quantity"), (INVOICE, "charges_nano_usd"), (INVOICE, "due_nano_usd")}),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
async def test_what_was_changed_by_hand_is_found(mesh: Mesh, what: str) -> None:
    """Past policies and triggers somebody changes one figure: it is told, with what is stored and what it should be."""
    tenant = await busy_tenant(mesh)
    sql, expected = SPOILT[what]
    await spoil(mesh, sql, tenant.id)
    found = await differences(mesh, tenant)
    assert {(check, figure) for check, _, figure, _, _ in found} == expected
    assert all(stored != recomputed and subject for _, subject, _, stored, recomputed in found)


async def test_an_invoice_that_is_gone_is_missed(mesh: Mesh) -> None:
    """A period that was closed a while ago has its invoice, or a difference says what it would ask for."""
    tenant = await busy_tenant(mesh)
    due = await mesh.admin.fetchval("SELECT due_nano_usd FROM metering.invoices WHERE tenant_id = $1", tenant.id)
    for table in ("invoice_lines", "invoices"):
        await spoil(mesh, f"DELETE FROM metering.{table} WHERE tenant_id = $1", tenant.id)
    assert await differences(mesh, tenant) == []
    await spoil(
        mesh, "UPDATE metering.invoice_closings SET close_time = close_time - interval '16 minutes' WHERE tenant_id = $1", tenant.id
    )
    # Nothing was recorded in the quarter of an hour that the closing is moved back by but what the test did itself: the same sum or less.
    ((check, number, figure, stored, recomputed),) = await differences(mesh, tenant)
    assert (check, number, figure, stored) == (INVOICE, "1", "due_nano_usd", "")
    assert int(recomputed) <= due


async def test_parts_are_bounded_and_together_they_are_all(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page holds so many calls or one day; what differs on any page is told once, and a page asked again tells the same."""
    tenant = await busy_tenant(mesh)
    monkeypatch.setattr(postgres_verification, "_CALLS", 2)
    await use_tokens(mesh, tenant, ended(1).start_time, [7, 8, 9])
    await spoil(mesh, "UPDATE metering.entries SET cost_nano_usd = cost_nano_usd + 1 WHERE tenant_id = $1", tenant.id)
    pages = await verified(mesh, tenant)
    of_calls = [item for page in pages for item in page.differences if item.check == CALL]
    assert [page.compared_count for page in pages[:3]] == [2, 2, 2] and len(of_calls) == len({item.subject for item in of_calls}) == 5
    again = await verified(mesh, tenant, token=pages[0].next_page_token)
    assert again == pages[1:]


async def test_what_is_beyond_the_told_ones_is_counted(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page tells so many differences and says how many more there are."""
    tenant = await busy_tenant(mesh)
    monkeypatch.setattr(postgres_verification, "MOST_TOLD", 1)
    await spoil(mesh, "UPDATE metering.entries SET cost_nano_usd = cost_nano_usd + 1 WHERE tenant_id = $1", tenant.id)
    first = (await verified(mesh, tenant))[0]
    # Two calls, and the entry of each by its price.
    assert (len(first.differences), first.untold_count) == (1, 3)


async def test_a_walk_of_all_tenants_tells_whose_books_differ(mesh: Mesh) -> None:
    """Without a tenant named every one is walked; another's are told under its own id."""
    tenants = [await busy_tenant(mesh) for _ in range(2)]
    await spoil(mesh, "UPDATE metering.usage_rollups SET retries = 7 WHERE tenant_id = $1 AND grain = 4", tenants[1].id)
    pages = await verified(mesh, None)
    told = {page.tenant_id for page in pages if any(item.figure == "retries" for item in page.differences)}
    assert str(tenants[1].id) in told and {str(tenant.id) for tenant in tenants} <= {page.tenant_id for page in pages}
    assert str(tenants[0].id) not in told


async def test_only_operators_verify_and_only_with_a_token_of_their_walk(mesh: Mesh) -> None:
    """A tenant's key is refused; so are a token of a walk of all tenants in one of a single tenant, and made-up ones."""
    tenant = await busy_tenant(mesh)
    with pytest.raises(MeshError) as refused:
        await verified(mesh, tenant, credential=f"key-{tenant.id}")
    assert refused.value.code.name == "PERMISSION_DENIED"
    (first, *_) = await verified(mesh, tenant)
    for token in ("AAAA", "x", first.next_page_token):
        with pytest.raises(MeshError) as refused:
            await verified(mesh, None if token == first.next_page_token else tenant, token=token)
        assert (refused.value.reason_name, refused.value.metadata["field"]) == ("INVALID_REQUEST", "page_token")
