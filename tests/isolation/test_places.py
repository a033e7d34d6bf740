"""Tenants' own schemas and databases as walls: no other tenant, and no role of another tenant's place, gets anything out of them."""

from collections.abc import AsyncIterator, Mapping
from uuid import UUID

import asyncpg
import pytest

from devstack.environment import DATABASE
from devstack.ports import LOOPBACK
from services.kernel.ids import TenantId
from services.kernel.placement import HOME, Whereabouts
from tests.isolation.conftest import Planted
from tests.isolation.fingerprint import SCHEMAS, own_place, superuser, tenant_tables
from tests.isolation.places import CONTENT, filled_tables, following, full
from tests.isolation.postgres_attacks import SET_LOCAL, SET_SESSION, as_role, on_rows, without_tenant_on
from tests.isolation.rounds import BRIDGE, PLAIN, SILO, over
from tests.isolation.surface import Surface
from tests.isolation.target import Target, plant
from tests.support.mesh import Mesh

# Places are attacked directly, by the roles that log in to them: no transport is in the way.
pytestmark = over(PLAIN)

PASSWORD = "known-for-a-moment"
# A schema or database that a role may not even enter.
LIVES_ELSEWHERE = "TM001"
BRIDGES = "SELECT nspname FROM pg_namespace WHERE nspname ~ '^t_[0-9a-f]{32}$'"
HOLDS = "SELECT true FROM {table} WHERE tenant_id = $1 LIMIT 1"
# The functions that are transactions of their own, by service, with what they take after the tenant's id.
AT_HOME: Mapping[str, tuple[tuple[str, tuple[object, ...]], ...]] = {
    "inference": (
        ("SELECT * FROM inference.recall($1, $2, 1000)", ("",)),
        ("SELECT * FROM inference.put_prompt($1, $2, false)", ("left behind",)),
        ("SELECT inference.remember($1, $2, $3, '{user}', '{left}', '{NULL}', '{NULL}', NULL)", ("none", UUID(int=7))),
        ("SELECT inference.inference_begin_key_version($1, $2)", (1,)),
    ),
    "retrieval": (
        ("SELECT * FROM retrieval.find_chunks($1, $2, 10)", ([UUID(int=7)],)),
        ("SELECT retrieval.retrieval_begin_key_version($1, $2)", (1,)),
    ),
}
KEPT_OUT = (asyncpg.InsufficientPrivilegeError, asyncpg.InvalidAuthorizationSpecificationError)


@pytest.fixture
async def in_bridge(planted: Planted) -> Target:
    """The attacked tenant in a schema of its own."""
    return await planted.in_place(BRIDGE)


@pytest.fixture
async def in_silo(planted: Planted) -> Target:
    """The attacked tenant in a database of its own."""
    return await planted.in_place(SILO)


@pytest.fixture(scope="module")
async def neighbour(mesh: Mesh, surface: Surface) -> AsyncIterator[str]:
    """The attacker's own silo: its role's DSN, as one who had stolen it would have it, without the database's name."""
    target = await plant(mesh, surface, isolation="silo")
    role = f"t_{target.tenant_id.hex}_inference_service"
    admin = await superuser(mesh.stack)
    await admin.execute(f"ALTER ROLE {role} PASSWORD '{PASSWORD}'")
    await admin.close()
    yield f"postgresql://{role}:{PASSWORD}@{LOOPBACK}:{mesh.stack.ports.postgres}"


async def test_the_shared_roles_find_only_the_tenant_that_is_set_in_a_bridge(mesh: Mesh, in_bridge: Target, attacker: Target) -> None:
    """Reading, inserting, changing, moving and deleting rows of a bridge with another tenant set finds nothing or is refused."""
    through: list[str] = []
    async with full(mesh.stack, in_bridge, attacker) as (_, attacked):
        for service in SCHEMAS:
            async with as_role(mesh.stack, service) as connection:
                through += await without_tenant_on(connection, attacked)
                await connection.fetch(SET_SESSION, str(attacker.tenant_id))
                for item in attacked:
                    through += [f"{service}: {found}" for found in await on_rows(connection, item, in_bridge.tenant_id, attacker.tenant_id)]
    assert through == []
    assert len(attacked) >= len(CONTENT)


async def test_a_service_reads_only_its_own_tables_in_a_bridge(mesh: Mesh, in_bridge: Target) -> None:
    """Two services share a tenant's schema and neither reads the other's tables, with the tenant set."""
    name = f"t_{in_bridge.tenant_id.hex}"
    for service, table in (("inference", "documents"), ("retrieval", "turns"), ("metering", "turns"), ("tenant", "prompts")):
        async with as_role(mesh.stack, service) as connection:
            await connection.fetch(SET_SESSION, str(in_bridge.tenant_id))
            with pytest.raises(KEPT_OUT):
                await connection.fetch(f"SELECT * FROM {name}.{table}")


@pytest.mark.parametrize("service", SCHEMAS)
async def test_the_shared_roles_do_not_enter_a_silo(mesh: Mesh, in_silo: Target, service: str) -> None:
    """No service's shared role connects to a tenant's own database."""
    password = mesh.stack.state.secrets.role_passwords[service]
    database = f"t_{in_silo.tenant_id.hex}"
    with pytest.raises(KEPT_OUT):
        await asyncpg.connect(f"postgresql://{service}_service:{password}@{LOOPBACK}:{mesh.stack.ports.postgres}/{database}")


async def test_a_silos_role_reaches_no_other_tenant(
    mesh: Mesh, in_silo: Target, in_bridge: Target, attacker: Target, neighbour: str
) -> None:
    """The role of one tenant's database enters neither another's database nor any table of the shared one, and becomes nobody else."""
    with pytest.raises(KEPT_OUT):
        await asyncpg.connect(f"{neighbour}/t_{in_silo.tenant_id.hex}")
    admin = await superuser(mesh.stack)
    tables = [*await tenant_tables(admin), f"t_{in_bridge.tenant_id.hex}.prompts", f"t_{in_bridge.tenant_id.hex}.documents"]
    await admin.close()
    connection = await asyncpg.connect(f"{neighbour}/{DATABASE}")
    for target in (attacker, in_bridge):
        await connection.fetch(SET_SESSION, str(target.tenant_id))
        for table in tables:
            with pytest.raises(KEPT_OUT):
                await connection.fetch(f"SELECT * FROM {table}")
    own = neighbour.partition("//")[2].partition(":")[0].removesuffix("_service")
    others = ("inference_service", "retrieval_owner", "tenant_placement", f"{own}_owner", f"t_{in_silo.tenant_id.hex}_inference_service")
    for role in others:
        with pytest.raises(KEPT_OUT):
            await connection.execute(f"SET ROLE {role}")
    await connection.close()


@pytest.mark.parametrize(("service", "other"), [("inference", "retrieval"), ("retrieval", "inference")])
async def test_a_service_reaches_only_its_own_schema_in_a_silo(mesh: Mesh, in_silo: Target, service: str, other: str) -> None:
    """With the tenant set, neither the role a service works with nor the one its tables are made with gets at the other service's."""
    name = f"t_{in_silo.tenant_id.hex}"
    admin = await asyncpg.connect(mesh.stack.postgres.dsn(name))
    try:
        theirs = [table for table in await tenant_tables(admin, (other,)) if not table.endswith("_migrations")]
        assert len(theirs) >= len(CONTENT) // 2
        for role in (f"{name}_{service}_service", f"{name}_{service}_placement", f"{name}_{service}_owner"):
            await admin.execute(f"SET SESSION AUTHORIZATION {role}")
            await admin.fetch(SET_SESSION, str(in_silo.tenant_id))
            for table in theirs:
                for sql in (f"SELECT * FROM {table}", f"DELETE FROM {table}", f"TRUNCATE {table}", f"DROP TABLE {table}"):
                    with pytest.raises(KEPT_OUT):
                        await admin.execute(sql)
            for sql, arguments in AT_HOME[other]:
                with pytest.raises(KEPT_OUT):
                    await admin.fetch(sql, in_silo.tenant_id, *arguments)
            for kind in ("service", "placement", "owner"):
                with pytest.raises(KEPT_OUT):
                    await admin.execute(f"SET ROLE {name}_{other}_{kind}")
            with pytest.raises(KEPT_OUT):
                await admin.execute(f"DROP SCHEMA {other} CASCADE")
            await admin.execute("RESET SESSION AUTHORIZATION")
    finally:
        await admin.close()


@pytest.mark.parametrize("service", ["inference", "retrieval"])
async def test_a_silos_own_role_is_held_by_row_level_security(mesh: Mesh, in_silo: Target, attacker: Target, service: str) -> None:
    """In a database of one tenant a service's role still finds nothing when another tenant is set, or none."""
    async with full(mesh.stack, in_silo, attacker) as (admin, attacked):
        await admin.execute(f"SET SESSION AUTHORIZATION t_{in_silo.tenant_id.hex}_{service}_service")
        through = await without_tenant_on(admin, attacked)
        await admin.fetch(SET_SESSION, str(attacker.tenant_id))
        for item in attacked:
            through += await on_rows(admin, item, in_silo.tenant_id, attacker.tenant_id)
        await admin.execute("RESET SESSION AUTHORIZATION")
    assert through == []
    assert len(attacked) >= len(CONTENT)


@pytest.mark.parametrize("isolation", [BRIDGE, SILO])
async def test_a_placed_tenants_content_is_nowhere_else(mesh: Mesh, surface: Surface, planted: Planted, isolation: str) -> None:
    """A tenant's own place holds its content; the shared tables and everybody else's schema hold none, also when another lives likewise."""
    # The second is what a search path that stays with the first would lose.
    for target in (await planted.in_place(isolation), await plant(mesh, surface, isolation=isolation)):
        assert await filled_tables(mesh.stack, target) >= CONTENT
        assert await elsewhere(mesh, target) == []


async def elsewhere(mesh: Mesh, target: Target) -> list[str]:
    """The tables of content in the shared database that hold rows of a placed tenant outside of its own place."""
    database, own = await own_place(mesh.stack, TenantId(target.tenant_id))
    admin = await superuser(mesh.stack)
    try:
        schemas = ["inference", "retrieval", *(row["nspname"] for row in await admin.fetch(BRIDGES))]
        others = [schema for schema in schemas if database != DATABASE or schema not in own]
        tables = [table for table in await tenant_tables(admin, others) if table.partition(".")[2] in CONTENT]
        assert len(tables) >= len(CONTENT)
        return [table for table in tables if await admin.fetchval(HOLDS.format(table=table), target.tenant_id)]
    finally:
        await admin.close()


@pytest.mark.parametrize("isolation", [BRIDGE, SILO])
@pytest.mark.parametrize("service", ["inference", "retrieval"])
async def test_the_shared_tables_refuse_who_lives_elsewhere(mesh: Mesh, planted: Planted, isolation: str, service: str) -> None:
    """A replica that believes a placed tenant to be at home is refused by the shared place itself, for statements and for functions."""
    target = await planted.in_place(isolation)
    tenant_id = TenantId(target.tenant_id)
    async with following(mesh.stack, service, Whereabouts(HOME)) as database:
        with pytest.raises(asyncpg.PostgresError) as refused:
            async with database.transaction_at(HOME, tenant_id):
                pass
        assert refused.value.sqlstate == LIVES_ELSEWHERE
    for sql, arguments in AT_HOME[service]:
        async with as_role(mesh.stack, service) as connection, connection.transaction():
            with pytest.raises(asyncpg.PostgresError) as refused:
                await connection.fetch(sql, target.tenant_id, *arguments)
            assert refused.value.sqlstate == LIVES_ELSEWHERE, sql


async def test_a_function_of_one_bridge_serves_no_other_tenant(mesh: Mesh, in_bridge: Target, attacker: Target) -> None:
    """Called with another tenant's id, the functions of a bridge find nothing of the tenant that lives there."""
    name, asker = f"t_{in_bridge.tenant_id.hex}", attacker.tenant_id
    async with as_role(mesh.stack, "inference") as connection:
        for sql, arguments in AT_HOME["inference"][:1]:
            told = await tries_as(connection, asker, sql.replace("inference.", f"{name}."), *arguments)
            assert in_bridge.canary not in repr(told)
            assert in_bridge.ids.conversation_id not in repr(told)


async def tries_as(connection: asyncpg.Connection, tenant_id: UUID, sql: str, *arguments: object) -> list[asyncpg.Record]:
    """Runs one statement with this tenant set, whatever comes of it."""
    async with connection.transaction():
        await connection.fetch(SET_LOCAL, str(tenant_id))
        found: list[asyncpg.Record] = await connection.fetch(sql, tenant_id, *arguments)
        return found
