"""The suite tested on itself: a wall is taken down for a moment, and the attack that leans on it must get through and say so."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
from qdrant_client import grpc as q

from services.kernel import catalog
from services.kernel.ids import TenantId
from services.retrieval.adapters.qdrant import alias_name
from tests.isolation.canaries import written_down
from tests.isolation.fingerprint import fingerprint, payload_of, qdrant, redis_of, scroll, superuser
from tests.isolation.postgres_attacks import Attacked, cross_tenant, read_directly, without_tenant
from tests.isolation.rounds import PLAIN, over
from tests.isolation.target import Target
from tests.isolation.test_key_stores import foreign_points, known_tenants, misplaced_keys
from tests.support.mesh import Mesh

# Walls of the stores are taken down and looked at directly: no transport is in the way.
pytestmark = over(PLAIN)

TABLE = "inference.prompts"
POLICY = "prompts_of_tenant"
OWN_TENANT = "tenant_id = (SELECT current_setting('app.tenant_id')::uuid)"
A_PROMPT = Attacked(TABLE, "tenant_id, version, text, create_time", "")
BROKEN = {
    "row-level security off": (f"ALTER TABLE {TABLE} DISABLE ROW LEVEL SECURITY", f"ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY"),
    "a policy for everybody": (
        f"CREATE POLICY everybody ON {TABLE} USING (true) WITH CHECK (true)",
        f"DROP POLICY everybody ON {TABLE}",
    ),
    "a policy that forgives a missing tenant": (
        f"ALTER POLICY {POLICY} ON {TABLE} USING (tenant_id::text = coalesce(current_setting('app.tenant_id', true), '') OR true)",
        f"ALTER POLICY {POLICY} ON {TABLE} USING ({OWN_TENANT})",
    ),
}
GRANT = "GRANT SELECT ON inference.door TO inference_service"
DOORS = {
    "view": (f"CREATE VIEW inference.door AS SELECT * FROM {TABLE}; {GRANT}", "DROP VIEW inference.door"),
    "copy": (f"CREATE MATERIALIZED VIEW inference.door AS SELECT * FROM {TABLE}; {GRANT}", "DROP MATERIALIZED VIEW inference.door"),
    "partition": (
        f"CREATE TABLE inference.whole (LIKE {TABLE}) PARTITION BY LIST (tenant_id);"
        "ALTER TABLE inference.whole ENABLE ROW LEVEL SECURITY; CREATE TABLE inference.door PARTITION OF inference.whole DEFAULT;"
        f"INSERT INTO inference.whole SELECT * FROM {TABLE}; {GRANT}",
        "DROP TABLE inference.whole",
    ),
}


@pytest.fixture
def victim(resident: Target) -> Target:
    """The attacked tenant: these attacks are the same wherever its content lives."""
    return resident


@asynccontextmanager
async def broken(mesh: Mesh, damage: str, repair: str) -> AsyncIterator[asyncpg.Connection]:
    """The database with one wall down, which stands again afterwards whatever happens."""
    connection = await superuser(mesh.stack)
    try:
        await connection.execute(damage)
        try:
            yield connection
        finally:
            await connection.execute(repair)
    finally:
        await connection.close()


@pytest.mark.parametrize("wall", BROKEN)
async def test_a_missing_policy_is_noticed(mesh: Mesh, wall: str, victim: Target, attacker: Target) -> None:
    """With one table's wall down the other tenant's rows are read, written and deleted, and attack and catalog both say so."""
    async with broken(mesh, *BROKEN[wall]) as connection:
        row = await connection.fetchval(f"SELECT to_jsonb(t)::text FROM {TABLE} t WHERE tenant_id = $1 LIMIT 1", victim.tenant_id)
        item = Attacked(A_PROMPT.table, A_PROMPT.columns, row)
        through = await cross_tenant(mesh.stack, [item], victim.tenant_id, attacker.tenant_id, local=True)
        assert any(found.startswith(f"SELECT * FROM {TABLE}") for found in through)
        assert any(found.startswith(f"DELETE FROM {TABLE}") for found in through)
        assert await without_tenant(mesh.stack, [item])
        assert await catalog.violations(connection, "inference")
    again = await superuser(mesh.stack)
    try:
        assert await catalog.violations(again, "inference") == []
    finally:
        await again.close()
    assert await cross_tenant(mesh.stack, [item], victim.tenant_id, attacker.tenant_id, local=True) == []


@pytest.mark.parametrize("door", DOORS)
async def test_a_way_around_a_table_is_noticed(mesh: Mesh, door: str, victim: Target, attacker: Target) -> None:
    """A view that runs as its owner, a copy that is kept, and a partition that may be read by itself give the other tenant away."""
    async with broken(mesh, *DOORS[door]) as connection:
        assert await read_directly(mesh.stack, connection, attacker.tenant_id, [victim.canary])
        assert await catalog.violations(connection, "inference")


async def test_a_changed_row_changes_the_fingerprint(mesh: Mesh, attacker: Target) -> None:
    """One letter of one row, one counter or one point more, and the comparison of before and after fails."""
    tenant_id = TenantId(attacker.tenant_id)
    before = await fingerprint(mesh.stack, tenant_id)
    change = "UPDATE inference.prompts SET text = text || '{}' WHERE tenant_id = '" + str(tenant_id) + "'"
    undo = f"UPDATE inference.prompts SET text = left(text, -1) WHERE tenant_id = '{tenant_id}'"
    async with broken(mesh, change.format("!"), undo):
        after = await fingerprint(mesh.stack, tenant_id)
    assert {store for store in after if after[store] != before[store]} == {TABLE}
    async with redis_of(mesh.stack) as redis:
        await redis.hincrby(f"{{{tenant_id}}}:meta", "outstanding", 7)
        assert await fingerprint(mesh.stack, tenant_id, in_mid_call=True) != before
        await redis.hincrby(f"{{{tenant_id}}}:meta", "outstanding", -7)
    assert await fingerprint(mesh.stack, tenant_id) == before


@pytest.mark.parametrize("key", ["sessions", "{acme}:meta", "tenant:a-b", "{01900000-0000-7000-8000-000000000000}:meta"])
async def test_a_misplaced_redis_key_is_noticed(mesh: Mesh, key: str, victim: Target) -> None:
    """A key without a tenant, named by a slug or of a tenant that is not there is found; so is a foreign id in a value."""
    tenants = await known_tenants(mesh.stack)
    async with redis_of(mesh.stack) as redis:
        for name, value in ((key, "x"), (f"{{{victim.tenant_id}}}:odd", str(sorted(tenants - {victim.tenant_id})[0]))):
            await redis.set(name, value)
            try:
                assert len(await misplaced_keys(redis, tenants)) == 1
            finally:
                await redis.delete(name)
        assert await misplaced_keys(redis, tenants) == []


async def test_a_point_of_another_tenant_is_noticed(mesh: Mesh, victim: Target, attacker: Target) -> None:
    """A point that carries another tenant than its collection's is found."""
    name, key = alias_name(TenantId(attacker.tenant_id)), (("api-key", mesh.stack.state.secrets.qdrant_api_key),)
    point = (await scroll(mesh.stack, name))[0]
    tenants, chosen = await known_tenants(mesh.stack), q.PointsSelector(points=q.PointsIdsList(ids=[point.id]))

    async def carry(tenant_id: object) -> None:
        payload = {"tenant_id": q.Value(string_value=str(tenant_id))}
        async with qdrant(mesh.stack) as channel:
            points = q.PointsStub(channel)  # type: ignore[no-untyped-call] # generated
            request = q.SetPayloadPoints(collection_name=name, payload=payload, points_selector=chosen, wait=True)
            await points.SetPayload(request, metadata=key, timeout=5)

    assert payload_of(point)["tenant_id"] == str(attacker.tenant_id)
    await carry(victim.tenant_id)
    try:
        assert len(await foreign_points(mesh.stack, tenants)) == 1
    finally:
        await carry(attacker.tenant_id)
    assert await foreign_points(mesh.stack, tenants) == []


async def test_a_word_in_a_log_is_noticed(mesh: Mesh) -> None:
    """What a service wrote down is found in its log, by name."""
    word = secrets.token_hex(16)
    path = mesh.stack.state.log_path("ratelimit")
    with path.open("a") as log:
        log.write(f'{{"event": "{word}"}}\n')
    assert written_down(mesh.stack, {"the word": word, "another": word[::-1] + "x"}) == ["ratelimit: the word"]
