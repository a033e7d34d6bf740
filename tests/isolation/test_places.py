"""Tenants' own schemas and databases as walls: no other tenant, and no role of another tenant's place, gets anything out of them."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from devstack.environment import DATABASE
from devstack.ports import LOOPBACK
from services.kernel.ids import TenantId
from tests.isolation.fingerprint import SCHEMAS, own_place, superuser, tenant_tables
from tests.isolation.postgres_attacks import SET_SESSION, Attacked, as_role, attacked_rows_in, on_rows, without_tenant_on
from tests.isolation.surface import Surface
from tests.isolation.target import Target, plant
from tests.support.mesh import Mesh

PASSWORD = "known-for-a-moment"
# A schema or database that a role may not even enter.
KEPT_OUT = (asyncpg.InsufficientPrivilegeError, asyncpg.InvalidAuthorizationSpecificationError)


@pytest.fixture(scope="module")
async def in_bridge(mesh: Mesh, surface: Surface) -> Target:
    """The attacked tenant in a schema of its own."""
    return await plant(mesh, surface, isolation="bridge")


@pytest.fixture(scope="module")
async def in_silo(mesh: Mesh, surface: Surface) -> Target:
    """The attacked tenant in a database of its own."""
    return await plant(mesh, surface, isolation="silo")


@pytest.fixture(scope="module")
async def neighbour(mesh: Mesh, surface: Surface) -> AsyncIterator[str]:
    """The attacker's own silo: its role's DSN, as one who had stolen it would have it, without the database's name."""
    target = await plant(mesh, surface, isolation="silo")
    role = f"t_{target.tenant_id.hex}_service"
    admin = await superuser(mesh.stack)
    await admin.execute(f"ALTER ROLE {role} PASSWORD '{PASSWORD}'")
    await admin.close()
    yield f"postgresql://{role}:{PASSWORD}@{LOOPBACK}:{mesh.stack.ports.postgres}"


async def test_the_shared_roles_find_only_the_tenant_that_is_set_in_a_bridge(mesh: Mesh, in_bridge: Target, attacker: Target) -> None:
    """Reading, inserting, changing, moving and deleting rows of a bridge with another tenant set finds nothing or is refused."""
    _, schemas = await own_place(mesh.stack, TenantId(in_bridge.tenant_id))
    admin = await superuser(mesh.stack)
    attacked = await content(admin, schemas, in_bridge)
    await admin.close()
    through: list[str] = []
    for service in SCHEMAS:
        async with as_role(mesh.stack, service) as connection:
            through += await without_tenant_on(connection, attacked)
            await connection.fetch(SET_SESSION, str(attacker.tenant_id))
            for item in attacked:
                through += [f"{service}: {found}" for found in await on_rows(connection, item, in_bridge.tenant_id, attacker.tenant_id)]
    assert through == []
    assert len(attacked) >= 5


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
    others = ("inference_service", "retrieval_owner", "tenant_placement", f"{own}_owner", f"t_{in_silo.tenant_id.hex}_service")
    for role in others:
        with pytest.raises(KEPT_OUT):
            await connection.execute(f"SET ROLE {role}")
    await connection.close()


async def test_a_silos_own_role_is_held_by_row_level_security(mesh: Mesh, in_silo: Target, attacker: Target) -> None:
    """In a database of one tenant its role still finds nothing when another tenant is set, or none."""
    database, schemas = await own_place(mesh.stack, TenantId(in_silo.tenant_id))
    admin = await asyncpg.connect(mesh.stack.postgres.dsn(database))
    attacked = await content(admin, schemas, in_silo)
    await admin.execute(f"SET SESSION AUTHORIZATION {database}_service")
    through = await without_tenant_on(admin, attacked)
    await admin.fetch(SET_SESSION, str(attacker.tenant_id))
    for item in attacked:
        through += await on_rows(admin, item, in_silo.tenant_id, attacker.tenant_id)
    await admin.close()
    assert through == []


async def content(admin: asyncpg.Connection, schemas: tuple[str, ...], target: Target) -> list[Attacked]:
    """A row of every table of a tenant's own that holds content; the rest are lists that are empty there."""
    return await attacked_rows_in(admin, await tenant_tables(admin, schemas), target.tenant_id)
