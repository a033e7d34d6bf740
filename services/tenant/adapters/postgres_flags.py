"""Flags in Postgres: each change with its history, audit record and announcement in one transaction, in the name of no tenant."""

import json
from collections.abc import Sequence

import asyncpg

from services.kernel.ids import NO_TENANT, TenantId
from services.kernel.tenant_database import Connection, TenantDatabase
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_audit import append_audit
from services.tenant.adapters.postgres_changes import announce
from services.tenant.change_hub import ChangeKind
from services.tenant.feature_flag import Flag, FlagSet, KeptFlag
from services.tenant.flag_keeping import FlagsBefore, Judge

# Changes take turns, so that versions commit in their order: who has seen one version has seen every earlier one.
LOCK_FLAGS = "SELECT pg_advisory_xact_lock(hashtextextended('tenant.flags', 0))"
READ_VERSION = "SELECT coalesce(max(version), 0) FROM tenant.flag_changes"
_COLUMNS = (
    """name, description, default_value, tenants_on, tenants_off, tiers_on, tiers_off, percentage_basis_points, version, update_time"""
)
LIST_FLAGS = f"SELECT {_COLUMNS} FROM tenant.flags WHERE name > $1 ORDER BY name LIMIT $2"  # noqa: S608 - the columns above
READ_FLAGS = f"SELECT {_COLUMNS} FROM tenant.flags ORDER BY name"  # noqa: S608 - as above
GET_FLAG = f"SELECT {_COLUMNS} FROM tenant.flags WHERE name = $1"  # noqa: S608 - as above
SELECT_NAMES = "SELECT name FROM tenant.flags"
SELECT_TIERS = "SELECT plan FROM tenant.plans"
# The directory of slugs has every tenant from its first moment to its erasure, and is read over all tenants.
SELECT_TENANTS = "SELECT tenant_id FROM tenant.slug_directory WHERE tenant_id = ANY ($1::uuid[])"
UPSERT_FLAG = f"""
INSERT INTO tenant.flags (
    name, description, default_value, tenants_on, tenants_off, tiers_on, tiers_off, percentage_basis_points, version
) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
ON CONFLICT (name) DO UPDATE SET description = excluded.description, default_value = excluded.default_value,
    tenants_on = excluded.tenants_on, tenants_off = excluded.tenants_off, tiers_on = excluded.tiers_on, tiers_off = excluded.tiers_off,
    percentage_basis_points = excluded.percentage_basis_points, version = excluded.version, update_time = clock_timestamp()
RETURNING {_COLUMNS}
"""  # noqa: S608 - as above
DELETE_FLAG = "DELETE FROM tenant.flags WHERE name = $1"
INSERT_CHANGE = """
INSERT INTO tenant.flag_changes (version, name, subject, reason, before, after) VALUES ($1, $2, $3, $4, $5::jsonb, $6::jsonb)
"""
NOW = "SELECT clock_timestamp()"


class PostgresFlags:
    """The flag store and the source of the flag set on the service's own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def read_version(self) -> int:
        """Returns the set's version: one look at the end of an index."""
        version: int = await self._database.fetch_value(None, READ_VERSION)
        return version

    async def read_set(self) -> FlagSet:
        """Returns every flag. The version is read first, so that a change in between is seen as one at the next look."""
        version = await self.read_version()
        return FlagSet(version, tuple(_kept(row).flag for row in await self._database.call(None, READ_FLAGS)))

    async def put(self, flag: Flag, judge: Judge, actor: Actor, *, validate_only: bool) -> tuple[KeptFlag, bool]:
        """Keeps the flag; False when it was kept like this already. Raises: what `judge` raises."""
        async with self._database.transaction(NO_TENANT) as connection:
            await connection.execute(LOCK_FLAGS)
            before = await _flags_before(connection, flag.name, flag.tenants_on | flag.tenants_off)
            judge(before)
            if before.kept is not None and before.kept.flag == flag:
                return before.kept, False
            version = await connection.fetchval(READ_VERSION) + 1
            if validate_only:
                return KeptFlag(flag, version, await connection.fetchval(NOW)), True
            kept = _kept(await connection.fetchrow(UPSERT_FLAG, *_values(flag), version))
            await _record(connection, version, flag.name, before.kept, flag, actor)
            await append_audit(connection, NO_TENANT, "FLAG_CHANGED", f"flag:{flag.name}", actor)
            await announce(connection, NO_TENANT, ChangeKind.FLAGS)
            return kept, True

    async def delete(self, name: str, actor: Actor) -> bool:
        """Removes the flag; False when there is none."""
        async with self._database.transaction(NO_TENANT) as connection:
            await connection.execute(LOCK_FLAGS)
            before = await _flags_before(connection, name, frozenset())
            if before.kept is None:
                return False
            version = await connection.fetchval(READ_VERSION) + 1
            await connection.execute(DELETE_FLAG, name)
            await _record(connection, version, name, before.kept, None, actor)
            await append_audit(connection, NO_TENANT, "FLAG_DELETED", f"flag:{name}", actor)
            await announce(connection, NO_TENANT, ChangeKind.FLAGS)
            return True

    async def list_flags(self, after_name: str, limit: int) -> Sequence[KeptFlag]:
        """Returns flags whose name sorts after another, by name."""
        return [_kept(row) for row in await self._database.call(None, LIST_FLAGS, after_name, limit)]


async def _flags_before(connection: Connection, name: str, listed: frozenset[TenantId]) -> FlagsBefore:
    row = await connection.fetchrow(GET_FLAG, name)
    names = [found["name"] for found in await connection.fetch(SELECT_NAMES)]
    tiers = [found["plan"] for found in await connection.fetch(SELECT_TIERS)]
    tenants = {TenantId(found["tenant_id"]) for found in await connection.fetch(SELECT_TENANTS, list(listed))}
    return FlagsBefore(None if row is None else _kept(row), names, tiers, tenants)


async def _record(connection: Connection, version: int, name: str, before: KeptFlag | None, after: Flag | None, actor: Actor) -> None:
    was = None if before is None else _json(before.flag)
    await connection.execute(INSERT_CHANGE, version, name, actor.subject, actor.reason, was, None if after is None else _json(after))


def _values(flag: Flag) -> tuple[object, ...]:
    return (
        flag.name,
        flag.description,
        flag.default_value,
        sorted(flag.tenants_on),
        sorted(flag.tenants_off),
        sorted(flag.tiers_on),
        sorted(flag.tiers_off),
        flag.percentage_basis_points,
    )


def _json(flag: Flag) -> str:
    return json.dumps(
        {
            "description": flag.description,
            "default_value": flag.default_value,
            "tenants_on": sorted(map(str, flag.tenants_on)),
            "tenants_off": sorted(map(str, flag.tenants_off)),
            "tiers_on": sorted(flag.tiers_on),
            "tiers_off": sorted(flag.tiers_off),
            "percentage_basis_points": flag.percentage_basis_points,
        }
    )


def _kept(row: asyncpg.Record) -> KeptFlag:
    flag = Flag(
        name=row["name"],
        description=row["description"],
        default_value=row["default_value"],
        tenants_on=frozenset(map(TenantId, row["tenants_on"])),
        tenants_off=frozenset(map(TenantId, row["tenants_off"])),
        tiers_on=frozenset(row["tiers_on"]),
        tiers_off=frozenset(row["tiers_off"]),
        percentage_basis_points=row["percentage_basis_points"],
    )
    return KeptFlag(flag, row["version"], row["update_time"])
