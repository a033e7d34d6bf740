"""A schema moves forward once, in order, and never under a file that changed."""

import asyncio
from pathlib import Path

import asyncpg
import pytest

from services.kernel.migrate import MigrationRefused, fill, home_of, migrate, read_migrations
from tests.kernel.test_tenant_database import dsn_for
from tests.support.stores import PostgresStore

FIRST = "CREATE TABLE items (tenant_id uuid PRIMARY KEY); GRANT SELECT ON items TO :service, :jobs;"
SECOND = "ALTER TABLE items ADD COLUMN label text DEFAULT 'a:b'::text;"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two migrations."""
    (tmp_path / "0001_items.sql").write_text(FIRST)
    (tmp_path / "0002_label.sql").write_text(SECOND)
    return tmp_path


async def test_each_file_is_applied_once(postgres: PostgresStore, files: Path) -> None:
    """The first run applies all, the second nothing, and a new file alone is applied by the third."""
    dsn = await postgres.fresh_database()
    assert await migrate(dsn, "shop", files) == ["0001_items.sql", "0002_label.sql"]
    assert await migrate(dsn, "shop", files) == []
    (files / "0003_more.sql").write_text("ALTER TABLE shop.items ADD COLUMN more text;")
    assert await migrate(dsn, "shop", files) == ["0003_more.sql"]


async def test_concurrent_runs_take_turns(postgres: PostgresStore, files: Path) -> None:
    """Several replicas that migrate at once apply each file once, and other schemas' runs do not collide."""
    dsn = await postgres.fresh_database()
    async with asyncio.TaskGroup() as group:
        runs = [group.create_task(migrate(dsn, schema, files)) for schema in ("red", "red", "red", "blue")]
    assert sorted(len(run.result()) for run in runs) == [0, 0, 2, 2]


async def test_a_changed_file_is_refused(postgres: PostgresStore, files: Path) -> None:
    """What ran is history: changing it stops the next run before anything happens."""
    dsn = await postgres.fresh_database()
    await migrate(dsn, "shop", files)
    (files / "0001_items.sql").write_text(FIRST + "-- later thought")
    with pytest.raises(MigrationRefused, match=r"0001_items\.sql changed"):
        await migrate(dsn, "shop", files)


async def test_a_database_newer_than_the_files_is_refused(postgres: PostgresStore, files: Path) -> None:
    """An old version must not serve a schema it does not know."""
    dsn = await postgres.fresh_database()
    await migrate(dsn, "shop", files)
    (files / "0002_label.sql").unlink()
    with pytest.raises(MigrationRefused, match="newer"):
        await migrate(dsn, "shop", files)


async def test_a_failing_file_leaves_nothing_of_itself(postgres: PostgresStore, files: Path) -> None:
    """One transaction a file: earlier files stay, the failed one is gone whole."""
    (files / "0003_broken.sql").write_text("CREATE TABLE half (tenant_id uuid PRIMARY KEY); SELECT nonsense;")
    dsn = await postgres.fresh_database()
    with pytest.raises(asyncpg.UndefinedColumnError):
        await migrate(dsn, "shop", files)
    (files / "0003_broken.sql").write_text("SELECT 1;")
    assert await migrate(dsn, "shop", files) == ["0003_broken.sql"]
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval("SELECT to_regclass('shop.half')") is None
    await connection.close()


async def test_the_owner_owns_all_and_the_service_role_logs_in(postgres: PostgresStore, files: Path) -> None:
    """Tables belong to the NOLOGIN owner; the service's password is the one of its DSN, however spelled."""
    dsn = await postgres.fresh_database()
    service = dsn_for(dsn, "store_service").replace(":secret@", ":it%27s%20odd@")
    await migrate(dsn, "store", files, {"service": service, "jobs": ""})
    connection = await asyncpg.connect(service)
    assert await connection.fetchval("SELECT tableowner FROM pg_tables WHERE schemaname = 'store' AND tablename = 'items'") == "store_owner"
    assert await connection.fetch("SELECT tenant_id FROM store.items") == []
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute("SET ROLE store_owner")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute("CREATE TABLE store.mine (x int)")
    await connection.close()


@pytest.mark.parametrize("kind", ["placement", "partitions"])
async def test_who_makes_tables_may_become_the_owner_and_is_nothing_by_itself(postgres: PostgresStore, files: Path, kind: str) -> None:
    """It logs in, has no right of its own and none of the owner's until it puts the owner's role on."""
    dsn = await postgres.fresh_database()
    login = dsn_for(dsn, f"depot_{kind}")
    await migrate(dsn, "depot", files, {kind: login})
    connection = await asyncpg.connect(login)
    for sql in ("SELECT 1 FROM depot.items", "DROP TABLE depot.items", "CREATE TABLE depot.mine (x int)"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(sql)
    async with connection.transaction():
        await connection.execute("SET LOCAL ROLE depot_owner")
        await connection.execute("CREATE TABLE depot.mine (x int)")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute("DROP TABLE depot.mine")
    await connection.close()


async def test_a_dsn_of_another_role_is_refused(postgres: PostgresStore, files: Path) -> None:
    """A service that would log in as somebody else is a mistake found at migration, not in production."""
    with pytest.raises(MigrationRefused, match="shop_service"):
        await migrate("postgresql://nowhere", "shop", files, {"service": "postgresql://admin:x@127.0.0.1/db"})
    with pytest.raises(MigrationRefused, match="not owner"):
        await migrate("postgresql://nowhere", "shop", files, {"owner": "x"})
    with pytest.raises(MigrationRefused, match="schema name"):
        await migrate("postgresql://nowhere", "shop; DROP", files)


@pytest.mark.parametrize("name", ["1_short.sql", "0002-dash.sql", "0003_gap.sql", "0001_twice.sql"])
def test_names_are_numbered_without_gaps(tmp_path: Path, name: str) -> None:
    """A misnamed, missing or repeated number is refused before the database is touched."""
    (tmp_path / "0001_first.sql").write_text("SELECT 1;")
    (tmp_path / name).write_text("SELECT 1;")
    with pytest.raises(MigrationRefused):
        read_migrations(tmp_path)


def test_placeholders_are_names_of_roles_and_nothing_else() -> None:
    """Casts and longer words keep their colons."""
    filled = fill("GRANT x TO :service, :jobs; SELECT 'a'::owner, b:owners, :owner", home_of("shop"))
    assert filled == "GRANT x TO shop_service, shop_jobs; SELECT 'a'::owner, b:owners, shop_owner"
