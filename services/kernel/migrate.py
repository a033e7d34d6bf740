"""Brings one schema forward: numbered SQL files, each in one transaction, each applied once. Refuses a file that changed after it ran.

Roles are made here too: `<schema>_owner` (NOLOGIN, owns everything), `<schema>_service` and `<schema>_jobs` (LOGIN, own nothing).
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import asyncpg
import structlog

log = structlog.get_logger(__name__)

_LOCK_KEY = 7_400_000_001
_FILE_NAME = re.compile(r"^(\d{4})_[a-z0-9_]+\.sql$")
_SCHEMA_NAME = re.compile(r"^[a-z][a-z0-9_]{0,40}$")
_PLACEHOLDER = re.compile(r"(?<![:\w]):(owner|service|jobs)\b")
_KINDS = ("owner", "service", "jobs")

CREATE_HISTORY = """
CREATE TABLE IF NOT EXISTS {schema}.schema_migrations (
    version integer PRIMARY KEY,
    name text NOT NULL,
    checksum bytea NOT NULL,
    apply_time timestamptz NOT NULL DEFAULT now()
)
"""
SELECT_HISTORY = "SELECT version, checksum FROM {schema}.schema_migrations"
INSERT_HISTORY = "INSERT INTO {schema}.schema_migrations (version, name, checksum) VALUES ($1, $2, $3)"


class MigrationRefused(Exception):
    """The files and the database do not fit together; the message says which file and why."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: its number, name, text and SHA-256."""

    version: int
    name: str
    sql: str
    checksum: bytes


async def migrate(dsn_admin: str, schema: str, migrations_dir: Path, roles: Mapping[str, str] | None = None) -> list[str]:
    """Applies what is missing and returns the names of the files applied. Idempotent; concurrent runs wait for each other.

    `roles` maps `service` and `jobs` to the DSN the service will log in with: its password becomes the role's.

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
        return await _apply(connection, schema, migrations)
    finally:
        await connection.close()


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


def fill_placeholders(sql: str, schema: str) -> str:
    """Puts the schema's role names where the file says :owner, :service and :jobs; `::owner` casts are left alone."""
    names = role_names(schema)
    return _PLACEHOLDER.sub(lambda match: names[match[1]], sql)


def _passwords(schema: str, roles: Mapping[str, str]) -> dict[str, str]:
    names = role_names(schema)
    passwords: dict[str, str] = {}
    for kind, dsn in roles.items():
        if kind not in ("service", "jobs"):
            raise MigrationRefused(f"roles may name service and jobs, not {kind}")
        if not dsn:
            continue
        parts = urlsplit(dsn)
        if parts.username is not None and unquote(parts.username) != names[kind]:
            raise MigrationRefused(f"the {kind} DSN of schema {schema} must log in as {names[kind]}, not {unquote(parts.username)}")
        if parts.password:
            passwords[kind] = unquote(parts.password)
    return passwords


async def _prepare(connection: asyncpg.Connection, schema: str, passwords: Mapping[str, str]) -> None:
    names = role_names(schema)
    async with connection.transaction():
        for kind in _KINDS:
            await _ensure_role(connection, names[kind], login=kind != "owner", password=passwords.get(kind))
        # CREATE ... AUTHORIZATION needs membership when the administrator is not a superuser.
        await connection.execute(f"GRANT {names['owner']} TO CURRENT_USER")
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema} AUTHORIZATION {names['owner']}")
        await connection.execute(f"GRANT USAGE ON SCHEMA {schema} TO {names['service']}, {names['jobs']}")
        await connection.execute(f"SET LOCAL ROLE {names['owner']}")
        await connection.execute(CREATE_HISTORY.format(schema=schema))


async def _ensure_role(connection: asyncpg.Connection, name: str, *, login: bool, password: str | None) -> None:
    attributes = f"{'LOGIN' if login else 'NOLOGIN'} NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE"
    exists = await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", name)
    if not exists:
        await connection.execute(f"CREATE ROLE {name} {attributes}")
    if password is not None:
        quoted = await connection.fetchval("SELECT quote_literal($1)", password)
        await connection.execute(f"ALTER ROLE {name} PASSWORD {quoted}")


async def _apply(connection: asyncpg.Connection, schema: str, migrations: list[Migration]) -> list[str]:
    applied = {row["version"]: row["checksum"] for row in await connection.fetch(SELECT_HISTORY.format(schema=schema))}
    unknown = set(applied) - {migration.version for migration in migrations}
    if unknown:
        raise MigrationRefused(f"schema {schema} has migrations {sorted(unknown)} that have no file: deploy a newer version")
    done: list[str] = []
    for migration in migrations:
        if migration.version in applied:
            if applied[migration.version] != migration.checksum:
                raise MigrationRefused(f"{migration.name} changed after it was applied to schema {schema}: add a new file instead")
            continue
        await _apply_one(connection, schema, migration)
        done.append(migration.name)
        log.info("migration_applied", schema=schema, file=migration.name)
    return done


async def _apply_one(connection: asyncpg.Connection, schema: str, migration: Migration) -> None:
    async with connection.transaction():
        # Everything a file makes belongs to the owner role, whoever runs it.
        await connection.execute(f"SET LOCAL ROLE {role_names(schema)['owner']}")
        await connection.execute(f"SET LOCAL search_path = {schema}, pg_temp")
        await connection.execute(fill_placeholders(migration.sql, schema))
        await connection.execute(INSERT_HISTORY.format(schema=schema), migration.version, migration.name, migration.checksum)
