"""What entries cost is worked out again from the price book: whatever price made them agrees, whatever was changed is told."""

from datetime import UTC, datetime, timedelta

import pytest

from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from mesh.metering.v1 import verification_service_pb2 as pb
from tests.metering.mesh import VERSION, Mesh, Tenant, bill
from tests.metering.rerating import OTHER, RIGHT, load_versions, order, rerated, used
from tests.metering.test_settling import reconcile, reconciled
from tests.metering.verifying import Told, differences, spoil

PRICE = pb.LEDGER_CHECK_PRICE
ENTRY = "SELECT entry_id FROM metering.entries WHERE tenant_id = $1 AND number = $2"


@pytest.fixture(autouse=True, scope="module")
async def versions(mesh: Mesh) -> None:
    """The price versions of these tests."""
    await load_versions(mesh)


async def of_prices(mesh: Mesh, tenant: Tenant) -> list[Told]:
    """Differences between entries and the price book."""
    return [item for item in await differences(mesh, tenant) if item[0] == PRICE]


async def test_what_prices_made_agrees_however_it_was_corrected(mesh: Mesh) -> None:
    """Settlements, reconciliations at a told cost and at the price's, late settlements before and after a re-rating, re-rated twice."""
    tenant = mesh.new_tenant()
    classes = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens")
    await used(mesh, tenant, [{name: 7 * number + index for index, name in enumerate(classes)} for number in range(5)])
    told = await reconciled(mesh, tenant, input_tokens=60, cost=12_345)
    late = await reconciled(mesh, tenant, input_tokens=60, cost=12_345)
    await mesh.settle(bill(late.ref, input_tokens=999, output_tokens=3))
    priced = await mesh.opened(tenant, dispatch_deadline=datetime.now(UTC) - timedelta(minutes=2))
    await mesh.void(ledger_pb.VoidCall(ref=priced.ref, kind=ledger_pb.VOID_KIND_UNKNOWN, cause="cut"))
    await reconcile(mesh, priced, 60, 60_000)
    assert await differences(mesh, tenant) == []
    await rerated(mesh, tenant, order())
    await mesh.settle(bill(priced.ref, input_tokens=1_001, output_tokens=0), bill(told.ref, input_tokens=501, output_tokens=1))
    assert await differences(mesh, tenant) == []
    await rerated(mesh, tenant, order((VERSION,), RIGHT))
    await rerated(mesh, tenant, order((RIGHT,), OTHER))
    assert await differences(mesh, tenant) == []


async def test_a_wrong_entry_is_named_with_its_version_and_both_amounts(mesh: Mesh) -> None:
    """The entry that was changed and no other of its call; of a version that nobody loaded there is no right amount."""
    tenant = mesh.new_tenant()
    await used(mesh, tenant, [{"input_tokens": 1_000_000, "output_tokens": 0}])
    await rerated(mesh, tenant, order())
    settled, corrected = [await mesh.admin.fetchval(ENTRY, tenant.id, number) for number in (1, 3)]
    change = "UPDATE metering.entries SET cost_nano_usd = cost_nano_usd + $3 WHERE tenant_id = $1 AND number = $2"
    for number, entry, version, right in ((1, settled, VERSION, 10**9), (3, corrected, RIGHT, 700_000_100 - 10**9)):
        await spoil(mesh, change, tenant.id, number, 5)
        assert await of_prices(mesh, tenant) == [(PRICE, f"{entry} {version}", "cost_nano_usd", str(right + 5), str(right))]
        await spoil(mesh, change, tenant.id, number, -5)
    await spoil(mesh, "UPDATE metering.entries SET price_version = 'never' WHERE tenant_id = $1 AND number = 1", tenant.id)
    ((_, subject, _, stored, recomputed),) = await of_prices(mesh, tenant)
    assert (subject, stored, recomputed) == (f"{settled} never", str(10**9), "")
