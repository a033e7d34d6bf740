"""kill -9 in the middle of a re-rating: what was written stays, the rest is written by whoever is asked next, and nothing twice."""

from datetime import UTC, datetime, timedelta

from mesh.metering.v1.price_service_pb2_grpc import PriceServiceStub
from services.kernel.rpc import metadata as keys
from services.metering.rerating import BATCH
from tests.metering.mesh import Mesh
from tests.metering.peers import OPERATOR
from tests.metering.rerating import RIGHT, adjustments, agrees, as_operator, load_versions, order, seen, total, used
from tests.metering.test_killed_closing import another_process
from tests.support.waiting import eventually

MORE = 20
LOCK_LAST = "SELECT 1 FROM metering.calls WHERE tenant_id = $1 AND reservation_id = $2 FOR UPDATE"


async def test_killed_rerating_is_ended_by_its_repetition(mesh: Mesh) -> None:
    """Killed after its first batch, with the second under way: repeated elsewhere it goes on, and each call has one adjustment."""
    await load_versions(mesh)
    tenant, twin = mesh.new_tenant(), mesh.new_tenant()
    usages = [{"input_tokens": 1_000 + number, "output_tokens": number} for number in range(BATCH)]
    start = datetime.now(UTC) - timedelta(hours=1)
    last = [{"input_tokens": 7, "output_tokens": number} for number in range(MORE)]
    for one, version in ((tenant, "2026-01"), (twin, RIGHT)):
        await used(mesh, one, usages, reserve_time=start, price_version=version)
        behind = await used(mesh, one, last, reserve_time=start + timedelta(minutes=1), price_version=version)
        if one is tenant:
            held = behind[-1]
    ready = await seen(mesh, tenant, order())
    metadata = ((keys.AUTHORIZATION, f"Bearer {OPERATOR}"), (keys.TENANT_ID, str(tenant.id)), (keys.OPERATOR_REASON, "a wrong price"))

    async def is_held_up() -> bool:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%FOR UPDATE%'"
        return await mesh.admin.fetchval(waiting) > 0 and len(await adjustments(mesh, tenant)) == BATCH

    async with another_process(mesh) as (process, channel):
        async with mesh.admin.acquire() as holder, holder.transaction():
            await holder.execute(LOCK_LAST, tenant.id, held)
            asked = PriceServiceStub(channel).RerateUsage(ready, metadata=metadata, timeout=60)
            await eventually(is_held_up, within_seconds=30.0)
            process.kill()
            await process.wait()
        asked.cancel()
    assert len(await adjustments(mesh, tenant)) == BATCH
    assert await mesh.admin.fetchval("SELECT count(*) FROM metering.rerating_ends WHERE tenant_id = $1", tenant.id) == 0
    answer = await as_operator(mesh, tenant, "RerateUsage", ready)
    assert (answer.is_done, answer.call_count) == (True, BATCH + MORE)
    assert [number for number, _, _ in await adjustments(mesh, tenant)] == [3] * (BATCH + MORE)
    assert await total(mesh, tenant) == await total(mesh, twin)
    assert await agrees(mesh, tenant)
    assert await as_operator(mesh, tenant, "RerateUsage", ready) == answer
