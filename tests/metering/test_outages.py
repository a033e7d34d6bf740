"""The service without its database: it starts, answers UNAVAILABLE with a time to retry, and works once the database is there."""

import asyncpg
import grpc
import pytest
from pydantic import SecretStr

from devstack.ports import free_port
from services.kernel.errors import MeshError
from tests.metering.mesh import Mesh, bill, ref, running_mesh
from tests.metering.peers import Peers


async def test_service_starts_without_its_database_and_says_when_to_retry(ledger_dsn: str, peers: Peers, admin: asyncpg.Pool) -> None:
    """Every ledger method is UNAVAILABLE with RetryInfo, naming the dependency and not the driver's words."""
    away = SecretStr(f"postgresql://metering_service:x@127.0.0.1:{free_port()}/none")
    mesh = await running_mesh(ledger_dsn, peers, admin, postgres_dsn=away, postgres_jobs_dsn=away)
    try:
        tenant = mesh.new_tenant()
        for attempt in (mesh.open(mesh.opening(tenant)), mesh.settle(bill(ref(tenant))), mesh.begin_epoch(tenant)):
            with pytest.raises(MeshError) as refused:
                await attempt
            assert refused.value.code is grpc.StatusCode.UNAVAILABLE
            assert refused.value.retry_after_seconds is not None
            assert refused.value.metadata["dependency"] == "postgres"
    finally:
        await mesh.close()


async def test_a_part_that_fails_to_close_keeps_no_other_open(
    ledger_dsn: str, peers: Peers, admin: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the last batches cannot be finished, the loops still end and the pools are still given back; the failure is told."""
    mesh = await running_mesh(ledger_dsn, peers, admin)
    app, lost = mesh.app, "the last batch is lost"

    async def fail() -> None:
        raise RuntimeError(lost)

    await mesh.opened(mesh.new_tenant())
    monkeypatch.setattr(app.ledger._opens, "close", fail)
    with pytest.raises(RuntimeError, match=lost):
        await mesh.close()
    assert app.background.running() == ()
    for database in (app.database, app.jobs):
        assert database._pool.is_closing()


async def test_calls_work_again_after_every_connection_was_cut(mesh: Mesh) -> None:
    """When the database ends all connections, the next calls are refused at most once and then work; nothing is settled twice."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    await mesh.admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'metering_service'")
    outcomes = set()
    for _ in range(30):
        try:
            (result,) = await mesh.settle(bill(call.ref))
        except MeshError as error:
            assert error.code is grpc.StatusCode.UNAVAILABLE
        else:
            outcomes.add(result.outcome)
    assert outcomes == {1}
    assert await mesh.admin.fetchval("SELECT count(*) FROM metering.entries WHERE tenant_id = $1", tenant.id) == 1
