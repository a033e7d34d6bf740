"""Brings one schema forward: numbered SQL files, each in one transaction, each applied once. Refuses a file that changed after it ran.

Roles are made here too: `<schema>_owner` (NOLOGIN, owns everything), `<schema>_service` and `<schema>_jobs` (LOGIN, own nothing). Where a
DSN names them, two more that may become the owner: `<schema>_placement` (LOGIN), which makes the tables of tenants that live in a schema or
database of their own, and `<schema>_partitions` (LOGIN), which makes and drops the months of a table.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

import asyncpg
import structlog

log = structlog.get_logger(__name__)

_LOCK_KEY = 7_400_000_001
_CONNECT_SECONDS = 5.0
_FILE_NAME = re.compile(r"^(\d{4})_[a-z0-9_]+\.sql$")
_SCHEMA_NAME = re.compile(r"^[a-z][a-z0-9_]{0,40}$")
_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_]*")
_PLACEHOLDER = re.compile(r"(?<![:\w]):(owner|service|jobs)\b")
# A file that begins so makes nothing of a tenant's content: it is left out where tenants have places of their own.
_AT_HOME_ONLY = "-- At home only."
_KINDS = ("owner", "service", "jobs")
_OWNING = ("placement", "partitions")
_LOGINS = ("service", "jobs", *_OWNING)
_HOME_HISTORY = "schema_migrations"
# Statements for the jobs role alone, each of which ends with its first semicolon.
_FOR_JOBS = re.compile(r"^[ \t]*(?:GRANT|CREATE POLICY)\b[^;]*?\bTO\s+:jobs\b[^;]*;", re.MULTILINE)
_JOBS_AMONG_OTHERS = re.compile(r":jobs\b\s*,\s*|,\s*:jobs\b")

CREATE_HISTORY = """
CREATE TABLE IF NOT EXISTS {history} (
    version integer PRIMARY KEY,
    name text NOT NULL,
    checksum bytea NOT NULL,
    apply_time timestamptz NOT NULL DEFAULT now()
)
"""
SELECT_HISTORY = "SELECT version, checksum FROM {history}"
INSERT_HISTORY = "INSERT INTO {history} (version, name, checksum) VALUES ($1, $2, $3)"
BRIDGES = """
SELECT n.nspname AS name FROM pg_namespace n JOIN pg_class c ON c.relnamespace = n.oid
WHERE n.nspname ~ '^t_[0-9a-f]{{32}}$' AND c.relname = '{history}' ORDER BY 1
"""
# The databases, each with what the names of the service's roles begin with there: in early ones all services share one.
SILOS = """
SELECT d.datname AS name, d.datname || CASE WHEN r.rolname IS NULL THEN '' ELSE '_' || $1 END AS roles
FROM pg_database d LEFT JOIN pg_roles r ON r.rolname = d.datname || '_' || $1 || '_owner'
WHERE d.datname ~ '^t_[0-9a-f]{32}$' ORDER BY 1
"""
SCHEMA_EXISTS = "SELECT true FROM pg_namespace WHERE nspname = $1"


class MigrationRefused(Exception):
    """The files and the database do not fit together; the message says which file and why."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: its number, name, text and SHA-256."""

    version: int
    name: str
    sql: str
    checksum: bytes


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a service's files are applied, and whose the outcome is.

    `home` is the schema the files are written for, `schema` the one they are applied to. An empty `jobs` means that nobody works there
    over all tenants: what the files give to the jobs role alone is left out.
    """

    home: str
    schema: str
    owner: str
    service: str
    jobs: str = ""

    @property
    def history(self) -> str:
        """The table of what was applied: each service has its own, because in a bridge two share one schema."""
        return f"{self.schema}.{self.home}_migrations" if self.schema != self.home else f"{self.schema}.{_HOME_HISTORY}"


async def migrate(dsn_admin: str, schema: str, migrations_dir: Path, roles: Mapping[str, str] | None = None) -> list[str]:
    """Applies what is missing and returns the names of the files applied. Idempotent; concurrent runs wait for each other.

    `roles` maps `service`, `jobs`, `placement` and `partitions` to the DSN the service will log in with: its password becomes the role's.

    Raises: MigrationRefused for a changed, missing, misnamed or renumbered file, or for a DSN of another role.
    """
    if not _SCHEMA_NAME.match(schema):
        raise MigrationRefused(f"{schema!r} is no schema name")
    migrations = read_migrations(migrations_dir)
    passwords = _passwords(schema, roles or {})
    connection = await asyncpg.connect(dsn_admin)  # noqa: TID251 - this is one of the two places
    try:
        # A session lock of its own key, so that five services migrating one database take turns at creating roles.
        await connection.execute("SELECT pg_advisory_lock($1)", _LOCK_KEY)
        await connection.execute("SET lock_timeout = '5s'")
        await _prepare(connection, schema, passwords)
        return await _apply(connection, home_of(schema), migrations)
    finally:
        await connection.close()


async def migrate_place(dsn_placement: str, destination: Destination, migrations_dir: Path) -> list[str]:
    """Brings one placed tenant's tables forward with the same files, as the destination's owner. Idempotent; makes no roles.

    Raises: MigrationRefused as `migrate`; asyncpg.InsufficientPrivilegeError when the DSN's role may not become the owner.
    """
    if not _SCHEMA_NAME.match(destination.schema) or not _SCHEMA_NAME.match(destination.home):
        raise MigrationRefused(f"{destination.schema!r} is no schema name")
    migrations = read_migrations(migrations_dir)
    connection = await asyncpg.connect(dsn_placement, timeout=_CONNECT_SECONDS)  # noqa: TID251 - this is one of the two places
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", _LOCK_KEY)
        await connection.execute("SET lock_timeout = '5s'")
        await connection.execute(f"SET ROLE {quoted(destination.owner)}")
        await _prepare_place(connection, destination)
        return await _apply(connection, destination, migrations)
    finally:
        await connection.close()


async def migrate_all_places(dsn_admin: str, silo_admin_dsn: str, home: str, migrations_dir: Path) -> int:
    """Brings the tables of every tenant forward that lives in a schema or database of its own here; returns how many there are.

    A database that somebody else made is brought forward by `ProvisionTenant`, which alone knows its owner's DSN.
    """
    names, places = role_names(home), 0
    for bridge in await _listed(dsn_admin, BRIDGES.format(history=f"{home}_migrations")):
        await migrate_place(dsn_admin, Destination(home, bridge["name"], names["owner"], names["service"]), migrations_dir)
        places += 1
    if silo_admin_dsn:
        for silo in await _listed(silo_admin_dsn, SILOS, home):
            dsn = urlunsplit(urlsplit(silo_admin_dsn)._replace(path=f"/{silo['name']}"))
            await migrate_place(dsn, Destination(home, home, f"{silo['roles']}_owner", f"{silo['roles']}_service"), migrations_dir)
            places += 1
    return places


async def _listed(dsn: str, sql: str, *args: object) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(dsn)  # noqa: TID251 - as migrate does
    try:
        return list(await connection.fetch(sql, *args))
    finally:
        await connection.close()


def home_of(schema: str) -> Destination:
    """Returns the service's own schema as a destination."""
    names = role_names(schema)
    return Destination(schema, schema, names["owner"], names["service"], names["jobs"])


def read_migrations(directory: Path) -> list[Migration]:
    """Reads the files in order. Raises: MigrationRefused for a name that is not `0001_words.sql` or a gap in the numbers."""
    migrations: list[Migration] = []
    for path in sorted(directory.glob("*.sql")):
        match = _FILE_NAME.match(path.name)
        if match is None:
            raise MigrationRefused(f"{path.name}: name it like 0001_what_it_does.sql")
        raw = path.read_bytes()
        migrations.append(Migration(int(match[1]), path.name, raw.decode(), hashlib.sha256(raw).digest()))
    if [migration.version for migration in migrations] != list(range(1, len(migrations) + 1)):
        raise MigrationRefused(f"{directory.name}: numbers must run 0001, 0002, … without gaps or repeats")
    return migrations


def role_names(schema: str) -> dict[str, str]:
    """Returns the schema's role names by kind: owner, service, jobs."""
    return {kind: f"{schema}_{kind}" for kind in _KINDS}


def fill(sql: str, destination: Destination) -> str:
    """Writes a file's text for a destination: its roles for :owner, :service and :jobs, its schema for the home's name.

    `::owner` casts are left alone.

    Raises: MigrationRefused when something is for the jobs role where there is none and cannot be left out.
    """
    if sql.startswith(_AT_HOME_ONLY) and destination != home_of(destination.home):
        return "SELECT 1"
    if not destination.jobs:
        sql = _FOR_JOBS.sub("", _JOBS_AMONG_OTHERS.sub("", sql))
        if re.search(r"(?<![:\w]):jobs\b", sql):
            raise MigrationRefused("only GRANT and CREATE POLICY may name :jobs: the file is applied where there is no such role too")
    if destination.schema != destination.home:
        sql = re.sub(rf"\b{destination.home}\b(?=[.,])", destination.schema, sql)
    names = {"owner": destination.owner, "service": destination.service, "jobs": destination.jobs}
    return _PLACEHOLDER.sub(lambda match: quoted(names[match[1]]), sql)


def quoted(role: str) -> str:
    """Writes a role's name as it may stand in SQL: somebody else's database has names of somebody else's taste."""
    if _PLAIN_NAME.fullmatch(role):
        return role
    return '"' + role.replace('"', '""') + '"'


def _passwords(schema: str, roles: Mapping[str, str]) -> dict[str, str]:
    passwords: dict[str, str] = {}
    for kind, dsn in roles.items():
        if kind not in _LOGINS:
            raise MigrationRefused(f"roles may name {', '.join(_LOGINS)}, not {kind}")
        if not dsn:
            continue
        parts, name = urlsplit(dsn), f"{schema}_{kind}"
        if parts.username is not None and unquote(parts.username) != name:
            raise MigrationRefused(f"the {kind} DSN of schema {schema} must log in as {name}, not {unquote(parts.username)}")
        if parts.password:
            passwords[kind] = unquote(parts.password)
    return passwords


async def _prepare(connection: asyncpg.Connection, schema: str, passwords: Mapping[str, str]) -> None:
    names = role_names(schema)
    async with connection.transaction():
        for kind in _KINDS:
            await ensure_role(connection, names[kind], login=kind != "owner", password=passwords.get(kind))
        # CREATE ... AUTHORIZATION needs membership when the administrator is not a superuser.
        await connection.execute(f"GRANT {names['owner']} TO CURRENT_USER")
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema} AUTHORIZATION {names['owner']}")
        await connection.execute(f"GRANT USAGE ON SCHEMA {schema} TO {names['service']}, {names['jobs']}")
        await _name_home(connection, schema, names["service"])
        for kind in _OWNING:
            if kind in passwords:
                await ensure_role(connection, f"{schema}_{kind}", login=True, password=passwords[kind])
                await connection.execute(f"GRANT {names['owner']} TO {schema}_{kind} WITH INHERIT FALSE, SET TRUE")
        await connection.execute(f"SET LOCAL ROLE {names['owner']}")
        await connection.execute(CREATE_HISTORY.format(history=home_of(schema).history))


async def _name_home(connection: asyncpg.Connection, schema: str, service: str) -> None:
    # Of the role and not of the session: a pooler between the service and the database keeps no session's settings.
    database = await connection.fetchval("SELECT quote_ident(current_database())")
    await connection.execute(f"ALTER ROLE {service} IN DATABASE {database} SET search_path = {schema}, pg_temp")


async def _prepare_place(connection: asyncpg.Connection, destination: Destination) -> None:
    async with connection.transaction():
        # In a bridge the schema is there already and belongs to who makes and drops it.
        if not await connection.fetchval(SCHEMA_EXISTS, destination.schema):
            await connection.execute(f"CREATE SCHEMA {destination.schema}")
            await connection.execute(f"GRANT USAGE ON SCHEMA {destination.schema} TO {quoted(destination.service)}")
        await connection.execute(CREATE_HISTORY.format(history=destination.history))


async def ensure_role(connection: asyncpg.Connection, name: str, *, login: bool, password: str | None) -> None:
    """Makes a role without any right unless it is there, and gives it the password."""
    attributes = f"{'LOGIN' if login else 'NOLOGIN'} NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE"
    exists = await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", name)
    if not exists:
        await connection.execute(f"CREATE ROLE {name} {attributes}")
    if password is not None:
        quoted = await connection.fetchval("SELECT quote_literal($1)", password)
        await connection.execute(f"ALTER ROLE {name} PASSWORD {quoted}")


async def _apply(connection: asyncpg.Connection, destination: Destination, migrations: list[Migration]) -> list[str]:
    schema = destination.schema
    history = await connection.fetch(SELECT_HISTORY.format(history=destination.history))
    applied = {row["version"]: row["checksum"] for row in history}
    unknown = set(applied) - {migration.version for migration in migrations}
    if unknown:
        raise MigrationRefused(f"schema {schema} has migrations {sorted(unknown)} that have no file: deploy a newer version")
    done: list[str] = []
    for migration in migrations:
        if migration.version in applied:
            if applied[migration.version] != migration.checksum:
                raise MigrationRefused(f"{migration.name} changed after it was applied to schema {schema}: add a new file instead")
            continue
        await _apply_one(connection, destination, migration)
        done.append(migration.name)
        log.info("migration_applied", schema=schema, file=migration.name)
    return done


async def _apply_one(connection: asyncpg.Connection, destination: Destination, migration: Migration) -> None:
    async with connection.transaction():
        # Everything a file makes belongs to the owner role, whoever runs it.
        await connection.execute(f"SET LOCAL ROLE {quoted(destination.owner)}")
        await connection.execute(f"SET LOCAL search_path = {destination.schema}, pg_temp")
        await connection.execute(fill(migration.sql, destination))
        insert = INSERT_HISTORY.format(history=destination.history)
        await connection.execute(insert, migration.version, migration.name, migration.checksum)
