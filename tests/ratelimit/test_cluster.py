"""The same store on Redis Cluster: every key of a tenant in one slot, every script with its keys declared."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from devstack.embedded_redis import binary
from devstack.ports import free_port
from services.kernel.errors import Unavailable
from services.kernel.ids import new_uuid7
from services.ratelimit.adapters.cluster_link import ClusterLink
from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.fencing import FenceVerdict
from services.ratelimit.settlement import CommitKind
from services.ratelimit.standing import Verdict
from tests.ratelimit.callers import AtStore, Stores, eventually, running_service, standard_terms
from tests.ratelimit.rules import rule
from tests.ratelimit.scripted_peer import running_peer
from tests.ratelimit.test_waiting import waiting


@pytest.fixture
async def cluster_url(tmp_path: Path) -> AsyncIterator[str]:
    """A cluster of one node that owns every slot."""
    port = free_port()
    config = tmp_path / "redis.conf"
    config.write_text(f'bind 127.0.0.1\nport {port}\ndir "{tmp_path}"\ncluster-enabled yes\nsave ""\n')
    process = await asyncio.create_subprocess_exec(
        binary("redis-server"), str(config), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    url = f"redis://127.0.0.1:{port}/0"
    link = PipelinedLink(url, timeout_seconds=5.0)
    try:
        await eventually(lambda: _answers(link))
        await link.send("CLUSTER", "ADDSLOTS", *range(16384))
        await eventually(lambda: _is_whole(link))
        yield url
    finally:
        await link.close()
        process.terminate()
        await process.wait()


async def _answers(link: PipelinedLink) -> bool:
    try:
        return await link.send("PING") == b"PONG"
    except Unavailable:
        return False


async def _is_whole(link: PipelinedLink) -> bool:
    return "cluster_state:ok" in str(await link.send("CLUSTER", "INFO"))


async def test_every_script_runs_on_a_cluster(cluster_url: str) -> None:
    """A tenant's whole life works on cluster mode, found by scan and erased by it."""
    cluster = ClusterLink(cluster_url, timeout_seconds=5.0)
    tenant = AtStore(Stores(cluster), PipelinedLink(cluster_url, timeout_seconds=5.0), standard_terms(tokens_per_day=100))
    try:
        await tenant.loaded()
        settled, released, fenced, renewed = [await tenant.held(10) for _ in range(4)]
        assert await tenant.commit(settled, CommitKind.SETTLED, tokens=5)
        await tenant.store.release(tenant.tenant_id, released, 1)
        assert await tenant.store.apply_fences([(tenant.tenant_id, 1, [(fenced, FenceVerdict.UNRESOLVED)])]) == [1]
        assert await tenant.store.renew([(tenant.tenant_id, renewed)]) == [True]
        assert (await tenant.reserve(80))[1].verdict is Verdict.REFUSED
        assert await tenant.store.tenants_with_leases() == [tenant.tenant_id]
        assert (await tenant.store.expired([tenant.tenant_id], 10))[0].lease_count == 1
        assert len([record async for record in tenant.stores.records.export(tenant.tenant_id)]) == 6
        assert (await tenant.stores.records.erase(tenant.tenant_id))["reservations"] == 4
        # The tombstone is all that is left, and goes by itself.
        meta = f"{{{tenant.tenant_id}}}:meta"
        assert await tenant.link.send("HEXISTS", meta, "erased") == 1
        assert 0 < int(str(await tenant.link.send("PTTL", meta))) <= 330_000
        await tenant.link.send("DEL", meta)
        assert set(await tenant.dump()) == {None}
    finally:
        await cluster.close()
        await tenant.link.close()


async def test_who_waits_is_woken_on_a_cluster(cluster_url: str) -> None:
    """The call that wakes goes through every node, so a process hears it wherever it listens."""
    async with running_peer() as peer, running_service(cluster_url, peer, redis_cluster=True, redis_timeout_seconds=2.0) as service:
        tenant = service.tenant_with(rule("rate", "tokens", 60, 100))
        running = new_uuid7()
        await tenant.reserve(100, id=running)
        async with waiting(tenant, 90) as task:
            await tenant.settled(running, 10)
            assert (await task).granted.tokens == 90


async def test_a_cluster_that_is_not_there_is_unavailable() -> None:
    """No node to begin with is the same to callers as a server that is gone."""
    cluster = ClusterLink(f"redis://127.0.0.1:{free_port()}/0", timeout_seconds=1.0)
    with pytest.raises(Unavailable):
        await cluster.send("EVALSHA", "0" * 40, 1, "{a}:meta")
    await cluster.close()
