"""Re-ratings that were begun and left are ended by the service itself, once; operators see all of them."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from mesh.metering.v1 import price_service_pb2 as pb
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from services.metering import rerating as rules
from services.metering.adapters.postgres_prices import PostgresPrices
from services.metering.adapters.postgres_rerate_runs import PostgresRerateRuns
from services.metering.adapters.postgres_reratings import PostgresReratings
from services.metering.price_catalog import PriceCatalog
from services.metering.rerate_job import RerateJob
from services.metering.rerating import RerateDesk
from tests.metering import command_line
from tests.metering.mesh import Mesh, Tenant
from tests.metering.rerating import adjustments, agrees, as_operator, load_versions, order, rerated, seen, used
from tests.metering.verifying import differences

LEFT = 7


@pytest.fixture(autouse=True, scope="module")
async def versions(mesh: Mesh) -> None:
    """The price versions of these tests."""
    await load_versions(mesh)


@pytest.fixture
async def left(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> tuple[Tenant, pb.RerateUsageRequest]:
    """A tenant whose re-rating has done two of seven calls, and what was asked for."""
    tenant = mesh.new_tenant()
    await used(mesh, tenant, [{"input_tokens": 1_000 + number} for number in range(LEFT)])
    ready = await seen(mesh, tenant, order())
    with monkeypatch.context() as patched:
        patched.setattr(rules, "BATCH", 2)
        patched.setattr(rules, "BATCHES_A_CALL", 1)
        assert not (await as_operator(mesh, tenant, "RerateUsage", ready)).is_done
    assert len(await adjustments(mesh, tenant)) == 2
    return tenant, ready


def job(mesh: Mesh, resume_seconds: float) -> RerateJob:
    """The service's own job, on its stores."""
    desk = RerateDesk(PostgresReratings(mesh.app.database), PriceCatalog(PostgresPrices(mesh.app.database)))
    return RerateJob(PostgresRerateRuns(mesh.app.jobs), desk, resume_seconds=resume_seconds)


async def listed(mesh: Mesh, tenant: Tenant | None, *, size: int = 100, undone_only: bool = False) -> list[pb.RerateRun]:
    """All re-ratings, page by page."""
    found, request = list[pb.RerateRun](), pb.ListReratingsRequest(page_size=size, undone_only=undone_only)
    while True:
        page = await as_operator(mesh, tenant, "ListReratings", request)
        found += page.reratings
        request.page_token = page.next_page_token
        if not request.page_token:
            return found


async def test_what_was_left_is_ended_and_nothing_twice(mesh: Mesh, left: tuple[Tenant, pb.RerateUsageRequest]) -> None:
    """Not while somebody may be at it; then by the job, as the operator's own repetition would have, which finds it done."""
    tenant, ready = left
    await job(mesh, 3_600.0).round()
    assert len(await adjustments(mesh, tenant)) == 2
    assert [run.rerating_id for run in await listed(mesh, tenant, undone_only=True)] == [ready.rerating_id]
    await job(mesh, 0.0).round()
    assert [number for number, _, _ in await adjustments(mesh, tenant)] == [3] * LEFT
    assert await listed(mesh, tenant, undone_only=True) == []
    answer = await as_operator(mesh, tenant, "RerateUsage", ready)
    assert (answer.is_done, answer.call_count) == (True, LEFT)
    await job(mesh, 0.0).round()
    assert len(await adjustments(mesh, tenant)) == LEFT
    assert await agrees(mesh, tenant) and await differences(mesh, tenant) == []


async def test_one_that_cannot_be_ended_stops_no_other(mesh: Mesh, left: tuple[Tenant, pb.RerateUsageRequest]) -> None:
    """A re-rating by versions that nobody loaded stays undone; others are ended."""
    broken, (tenant, _) = mesh.new_tenant(), left
    await mesh.admin.execute(
        "INSERT INTO metering.reratings VALUES ($1, $2, 1, now() - interval '2 h', now(), '{x}', 'y', now() - interval '1 h', sha256(''), "
        "now() - interval '1 h')",
        broken.id,
        new_uuid7(),
    )
    await job(mesh, 0.0).round()
    assert len(await listed(mesh, broken, undone_only=True)) == 1
    assert await listed(mesh, tenant, undone_only=True) == []


async def test_operators_list_reratings_page_by_page(mesh: Mesh) -> None:
    """By tenant, first begun first, each once however small the pages; nobody but operators, and no token of another list."""
    tenant = mesh.new_tenant()
    await used(mesh, tenant, [{"input_tokens": 5}])
    start, orders = datetime.now(UTC), [order() for _ in range(3)]
    for wanted in orders:
        await rerated(mesh, tenant, wanted)
    ids = [wanted.rerating_id for wanted in orders]
    of_tenant = await listed(mesh, tenant, size=1)
    assert [run.rerating_id for run in of_tenant] == ids
    assert all(run.finish_time.ToDatetime(UTC) >= run.begin_time.ToDatetime(UTC) > start - timedelta(minutes=1) for run in of_tenant)
    everybody = await listed(mesh, None, size=2)
    places = [(run.tenant_id, run.begin_time.ToNanoseconds()) for run in everybody]
    assert places == sorted(places) and {run.rerating_id for run in everybody} >= set(ids)
    first = await as_operator(mesh, tenant, "ListReratings", pb.ListReratingsRequest(page_size=1))
    for request in (pb.ListReratingsRequest(page_token="x"), pb.ListReratingsRequest(page_token=first.next_page_token)):
        with pytest.raises(MeshError) as refused:
            await as_operator(mesh, None, "ListReratings", request)
        assert refused.value.metadata == {"field": "page_token"}
    with pytest.raises(MeshError) as refused:
        await as_operator(mesh, tenant, "ListReratings", pb.ListReratingsRequest(), credential=f"key-{tenant.id}")
    assert refused.value.reason_name == "CALLER_NOT_ALLOWED"


async def test_tenantctl_shows_what_is_not_done(mesh: Mesh, left: tuple[Tenant, pb.RerateUsageRequest]) -> None:
    """One row a re-rating; the finish time is empty while it is not done."""
    tenant, ready = left
    answer = await command_line.as_operator(mesh, tenant, "rerating", "list", "--undone", "--format=json")
    assert answer.code == 0, answer.err
    (row,) = json.loads(answer.out)
    assert (row["tenant_id"], row["rerating_id"], row["finish_time"]) == (str(tenant.id), ready.rerating_id, "")
