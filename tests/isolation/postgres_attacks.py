"""Attacks on the database itself, as the roles the services log in with; each returns what got through, in words.

They know no table by name: tables come from the catalog, and the rows that are attacked are read past every policy first.
"""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

import asyncpg

from devstack.environment import DATABASE, WITH_JOBS_ROLE
from devstack.ports import LOOPBACK
from devstack.stack import Stack
from tests.isolation.fingerprint import SCHEMAS, superuser

# Names looked up before a tenant is known, and the feed of changes: a tenant id and nothing of its tenant, so they may be read whole.
# Every column is named here, so that one that tells more cannot come along unnoticed.
DIRECTORY_COLUMNS: Mapping[str, frozenset[str]] = {
    "tenant.api_key_directory": frozenset({"key_id", "tenant_id"}),
    "tenant.slug_directory": frozenset({"slug", "tenant_id"}),
    "tenant.request_directory": frozenset({"request_id", "tenant_id"}),
    "tenant.issuer_directory": frozenset({"issuer", "audience", "tenant_id"}),
    "tenant.domain_directory": frozenset({"domain", "tenant_id"}),
    "tenant.move_directory": frozenset({"tenant_id", "due_time"}),
    "tenant.changes": frozenset({"change_id", "tenant_id", "kind", "change_time"}),
}
DIRECTORIES = frozenset(DIRECTORY_COLUMNS)
DENIED = (asyncpg.InsufficientPrivilegeError,)
# An append-only table's own trigger refuses, and refuses the owner of the row as well.
REFUSED = (*DENIED, asyncpg.RestrictViolationError)
# A tenant that was never set, or is empty again after a transaction that had set it.
NO_TENANT = (asyncpg.UndefinedObjectError, asyncpg.InvalidTextRepresentationError)

SET_SESSION = "SELECT set_config('app.tenant_id', $1, false)"
SET_LOCAL = "SELECT set_config('app.tenant_id', $1, true)"
A_ROW = "SELECT to_jsonb(t)::text FROM {table} t WHERE tenant_id = $1 LIMIT 1"
COLUMNS = """
SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute
WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = '' AND attidentity <> 'a'
"""
ALL_TABLES = """
SELECT format('%I.%I', n.nspname, c.relname) AS name, n.nspname AS schema FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = ANY($1) AND c.relkind IN ('r', 'p') ORDER BY 1
"""
# Everything with rows that a name can be said of: partitions and views of all kinds, and tenants' own schemas.
READABLE = """
SELECT format('%I.%I', n.nspname, c.relname) AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE (n.nspname = ANY($1) OR n.nspname ~ '^t_[0-9a-f]{32}$') AND c.relkind IN ('r', 'p', 'v', 'm', 'f') ORDER BY 1
"""


@dataclass(frozen=True, slots=True)
class Attacked:
    """A table, and one row of the attacked tenant in it as JSON."""

    table: str
    columns: str
    row: str

    @property
    def schema(self) -> str:
        """Its schema, which is its service's name too."""
        return self.table.partition(".")[0]


@asynccontextmanager
async def as_role(stack: Stack, schema: str, role: str = "service", *, through_pooler: bool = False) -> AsyncIterator[asyncpg.Connection]:
    """A connection as a service's own role, to the server itself unless told.

    A jobs role that nobody is given a password for is put on by a superuser instead.
    """
    has_password = role == "service" or schema in WITH_JOBS_ROLE
    password = stack.state.secrets.role_passwords[schema]
    port, cached = (stack.ports.pgbouncer, 0) if through_pooler else (stack.ports.postgres, 100)
    dsn = f"postgresql://{schema}_{role}:{password}@{LOOPBACK}:{port}/{DATABASE}"
    connection = await (asyncpg.connect(dsn, statement_cache_size=cached) if has_password else superuser(stack))
    try:
        if not has_password:
            await connection.execute(f"SET SESSION AUTHORIZATION {schema}_{role}")
        yield connection
    finally:
        await connection.close()


async def attacked_rows(
    admin: asyncpg.Connection, tables: Iterable[str], tenant_id: UUID, *, must_be_in_all: bool = True
) -> list[Attacked]:
    """Each of the tables with a row of the attacked tenant. Raises: AssertionError for a table without one, unless that is no matter."""
    found: list[Attacked] = []
    for table in tables:
        row = await admin.fetchval(A_ROW.format(table=table), tenant_id)
        if row is None and not must_be_in_all:
            continue
        assert row is not None, f"{table} holds nothing of the attacked tenant: plant a row, or the attack on it proves nothing"
        found.append(Attacked(table, await admin.fetchval(COLUMNS, table), row))
    return found


async def tries(
    connection: asyncpg.Connection, sql: str, *arguments: object, refused: tuple[type[BaseException], ...] = REFUSED
) -> list[str]:
    """Runs one statement in a transaction that is rolled back; returns what came back, nothing when it was refused or found no row."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        rows = await connection.fetch(sql, *arguments)
    except refused:
        return []
    except asyncpg.PostgresError as error:
        # Past the policy and stopped by something else, such as a duplicate key, is through.
        return [f"{sql}: {type(error).__name__}"]
    finally:
        await transaction.rollback()
    return [f"{sql}: {row}" for row in rows[:1]]


async def cross_tenant(
    stack: Stack, attacked: Iterable[Attacked], victim: UUID, attacker: UUID, *, local: bool, through_pooler: bool = False
) -> list[str]:
    """Reads, writes, changes, moves and deletes the victim's rows as each service's role, with the attacker set as tenant."""
    through: list[str] = []
    for schema in SCHEMAS:
        async with as_role(stack, schema, through_pooler=through_pooler) as connection:
            own = [item for item in attacked if item.schema == schema]
            if local:
                async with connection.transaction():
                    await connection.fetch(SET_LOCAL, str(attacker))
                    through += [found for item in own for found in await on_rows(connection, item, victim, attacker)]
            else:
                await connection.fetch(SET_SESSION, str(attacker))
                through += [found for item in own for found in await on_rows(connection, item, victim, attacker)]
    return through


async def on_rows(connection: asyncpg.Connection, item: Attacked, victim: UUID, attacker: UUID) -> list[str]:
    """Every attack on one table's rows as one role, with the attacker set as tenant."""
    table = item.table
    insert = f"INSERT INTO {table} ({item.columns}) SELECT {item.columns} FROM jsonb_populate_record(NULL::{table}, $1::text::jsonb)"
    attempts: list[tuple[str, Sequence[object]]] = [
        (insert + " RETURNING tenant_id", (item.row,)),
        (insert, (item.row,)),
        (f"UPDATE {table} SET tenant_id = tenant_id WHERE tenant_id = $1 RETURNING tenant_id", (victim,)),
        (f"UPDATE {table} SET tenant_id = $2 WHERE tenant_id = $1 RETURNING tenant_id", (victim, attacker)),
        (f"UPDATE {table} SET tenant_id = $1 RETURNING tenant_id", (victim,)),
        (f"DELETE FROM {table} WHERE tenant_id = $1 RETURNING tenant_id", (victim,)),
        (f"DELETE FROM {table} WHERE tenant_id <> $1 RETURNING tenant_id", (attacker,)),
    ]
    if table not in DIRECTORIES:
        attempts += [
            (f"SELECT * FROM {table} WHERE tenant_id = $1", (victim,)),
            (f"SELECT tenant_id FROM {table} WHERE tenant_id <> $1", (attacker,)),
            (f"SELECT * FROM {table} WHERE tenant_id = $1 FOR SHARE", (victim,)),
            (f"SELECT n FROM (SELECT count(*) AS n FROM {table} WHERE tenant_id = $1) c WHERE n > 0", (victim,)),
        ]
    return [found for sql, arguments in attempts for found in await tries(connection, sql, *arguments)]


async def without_tenant(stack: Stack, attacked: Iterable[Attacked]) -> list[str]:
    """Reads every tenant table with no tenant set, before and after a transaction that had set one; returns what was no error."""
    answered: list[str] = []
    for schema in SCHEMAS:
        async with as_role(stack, schema) as connection:
            own = [item for item in attacked if item.schema == schema and item.table not in DIRECTORIES]
            answered += await without_tenant_on(connection, own)
    return answered


async def without_tenant_on(connection: asyncpg.Connection, attacked: Iterable[Attacked]) -> list[str]:
    """As `without_tenant`, on one connection."""
    answered: list[str] = []
    for emptied in (False, True):
        if emptied:
            async with connection.transaction():
                await connection.fetch(SET_LOCAL, str(UUID(int=1)))
        for item in attacked:
            answered += await _no_error(connection, f"SELECT count(*) FROM {item.table}")
            answered += await _no_error(connection, f"DELETE FROM {item.table}")
    return answered


async def _no_error(connection: asyncpg.Connection, sql: str) -> list[str]:
    transaction = connection.transaction()
    await transaction.start()
    try:
        rows = await connection.fetch(sql)
    except (*NO_TENANT, *REFUSED):
        return []
    finally:
        await transaction.rollback()
    return [f"{sql}: {rows}"]


async def around_the_policies(stack: Stack, admin: asyncpg.Connection, attacker: UUID) -> list[str]:
    """Tries to switch the walls off, to go where they are not, and to become somebody else; returns what worked."""
    tables = await admin.fetch(ALL_TABLES, list(SCHEMAS))
    through: list[str] = []
    for schema in SCHEMAS:
        for role in ("service", "jobs"):
            async with as_role(stack, schema, role) as connection:
                await connection.fetch(SET_SESSION, str(attacker))
                for table in tables:
                    through += [f"{schema}_{role}: {found}" for found in await _on_table(connection, table["name"])]
                    if table["schema"] != schema:
                        through += [
                            f"{schema}_{role}: {found}" for found in await _answers(connection, f"SELECT count(*) FROM {table['name']}")
                        ]
                for other in (f"{schema}_owner", "tenantry_admin", *(f"{name}_service" for name in SCHEMAS if name != schema)):
                    through += [f"{schema}_{role}: {found}" for found in await _answers(connection, f"SET ROLE {other}")]
    return through


async def read_directly(stack: Stack, admin: asyncpg.Connection, attacker: UUID, words: Sequence[str]) -> list[str]:
    """Reads whatever there is to read, partitions and views by their own names, the server's statistics too; returns what held a word."""
    names = [row["name"] for row in await admin.fetch(READABLE, list(SCHEMAS)) if row["name"] not in DIRECTORIES]
    through: list[str] = []
    for schema in SCHEMAS:
        for role in ("service", "jobs"):
            async with as_role(stack, schema, role) as connection:
                await connection.fetch(SET_SESSION, str(attacker))
                for name in (*names, "pg_catalog.pg_stats", "pg_catalog.pg_stats_ext_exprs"):
                    # What the jobs role reads of everybody is the subject of a test of its own.
                    if role == "service" or name.partition(".")[0] != schema:
                        sql = f"SELECT 1 FROM {name} r WHERE r::text LIKE ANY ($1) LIMIT 1"
                        through += [f"{schema}_{role}: {found}" for found in await tries(connection, sql, [f"%{word}%" for word in words])]
    return through


async def _on_table(connection: asyncpg.Connection, table: str) -> list[str]:
    attempts = (
        f"TRUNCATE {table}",
        f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY",
        f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY",
        f"CREATE POLICY everything ON {table} USING (true)",
        f"ALTER TABLE {table} DISABLE TRIGGER ALL",
        f"ALTER TABLE {table} OWNER TO CURRENT_USER",
        f"DROP TABLE {table} CASCADE",
    )
    return [found for sql in attempts for found in await _answers(connection, sql)]


async def _answers(connection: asyncpg.Connection, sql: str) -> list[str]:
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(sql)
    except asyncpg.PostgresError as error:
        return [] if isinstance(error, DENIED) else [f"{sql}: {type(error).__name__}"]
    finally:
        await transaction.rollback()
    return [sql]
