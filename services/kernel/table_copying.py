"""Copies one tenant's rows of a table from one place to another until both are equal, by digests of their contents.

It needs no mark of change in the rows: whatever differs is removed from the copy and written again, so a pass may be repeated at any time.
Generic over tables: columns come from the catalog, so that a column added later moves along.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg
import orjson

from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection

BUCKETS_AT_ONCE = 16
ROWS_AT_ONCE = 50
STATEMENT_SECONDS = 60.0
# Digests are of text: both sides must write times, numbers and bytes alike, and a pass may take longer than a call.
PREPARE = (
    "SET LOCAL timezone = 'UTC'; SET LOCAL datestyle = 'ISO, YMD'; SET LOCAL bytea_output = 'hex'; SET LOCAL extra_float_digits = 1; "
    "SET LOCAL statement_timeout = '60s'; SET LOCAL idle_in_transaction_session_timeout = '60s'"
)
COLUMNS = """
SELECT array_agg(quote_ident(attname) ORDER BY attname) FROM pg_attribute
WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
"""


@dataclass(frozen=True, slots=True)
class TenantTable:
    """A table with a tenant_id, and the rest of its primary key."""

    name: str
    key: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """A share of a table's rows, chosen by their keys: how many, and a digest of all of them."""

    row_count: int
    digest: str


@dataclass(frozen=True, slots=True)
class _Words:
    """The statements for one table."""

    buckets: str
    keys: str
    read: str
    write: str
    remove: str


async def prepare(connection: Connection) -> None:
    """Makes the transaction write values as the other side does."""
    await connection.execute(PREPARE)


async def copy_tables(source: Connection, copy: Connection, tables: Sequence[TenantTable], tenant_id: TenantId) -> int:
    """Makes the copy's rows equal to the source's, parents first; returns how many rows were removed or written.

    The source must not change meanwhile, or be read in one snapshot: a child would come without its parent.
    """
    changed = 0
    for table in tables:
        words = await _words(source, table)
        ours, theirs = await _buckets(source, words, tenant_id), await _buckets(copy, words, tenant_id)
        differing = sorted(number for number in ours.keys() | theirs.keys() if ours.get(number) != theirs.get(number))
        groups = [differing[start : start + BUCKETS_AT_ONCE] for start in range(0, len(differing), BUCKETS_AT_ONCE)]
        # All removals first: a row that is gone may hold a name that a new one has taken over.
        for work in (_remove_stale, _write_missing):
            for group in groups:
                changed += await work(source, copy, words, tenant_id, group)
    return changed


async def digest(connection: Connection, table: TenantTable, tenant_id: TenantId) -> dict[int, Bucket]:
    """Returns the table's buckets: equal ones mean equal rows."""
    return await _buckets(connection, await _words(connection, table), tenant_id)


async def _remove_stale(source: Connection, copy: Connection, words: _Words, tenant_id: TenantId, numbers: list[int]) -> int:
    ours, theirs = await _keys(source, words, tenant_id, numbers), await _keys(copy, words, tenant_id, numbers)
    stale = [key for key, content in theirs.items() if ours.get(key) != content]
    for start in range(0, len(stale), ROWS_AT_ONCE):
        keys = _array(stale[start : start + ROWS_AT_ONCE])
        await copy.execute(words.remove, tenant_id, keys, timeout=STATEMENT_SECONDS)
    return len(stale)


async def _write_missing(source: Connection, copy: Connection, words: _Words, tenant_id: TenantId, numbers: list[int]) -> int:
    ours, theirs = await _keys(source, words, tenant_id, numbers), await _keys(copy, words, tenant_id, numbers)
    missing = [key for key in ours if key not in theirs]
    for start in range(0, len(missing), ROWS_AT_ONCE):
        keys = _array(missing[start : start + ROWS_AT_ONCE])
        rows = await source.fetchval(words.read, tenant_id, keys, timeout=STATEMENT_SECONDS)
        await copy.execute(words.write, rows, timeout=STATEMENT_SECONDS)
    return len(missing)


async def _buckets(connection: Connection, words: _Words, tenant_id: TenantId) -> dict[int, Bucket]:
    rows: list[asyncpg.Record] = await connection.fetch(words.buckets, tenant_id, timeout=STATEMENT_SECONDS)
    return {row["bucket"]: Bucket(row["row_count"], row["digest"]) for row in rows}


async def _keys(connection: Connection, words: _Words, tenant_id: TenantId, numbers: list[int]) -> dict[str, str]:
    rows: list[asyncpg.Record] = await connection.fetch(words.keys, tenant_id, numbers, timeout=STATEMENT_SECONDS)
    return {row["key"]: row["digest"] for row in rows}


async def _words(connection: Connection, table: TenantTable) -> _Words:
    columns = ", ".join(await connection.fetchval(COLUMNS, table.name))
    qualified = ", ".join(f"t.{name}" for name in table.key)
    pairs = ", ".join(f"'{name}', t.{name}" for name in table.key)
    key = f"jsonb_build_object({pairs})::text"
    bucket = f"get_byte(decode(md5({key}), 'hex'), 0)"
    content = f"md5(ROW({', '.join(f't.{name}' for name in columns.split(', '))})::text)"
    # The keys as rows of the table's own types, so that its primary key finds them.
    wanted = f"SELECT {', '.join(table.key)} FROM jsonb_populate_recordset(NULL::{table.name}, $2::text::jsonb)"  # noqa: S608
    # Names come from this code and the catalog alone.
    return _Words(
        buckets=(
            f"SELECT {bucket} AS bucket, count(*) AS row_count, md5(string_agg({content}, '' ORDER BY {key} COLLATE \"C\")) AS digest "  # noqa: S608
            f"FROM {table.name} t WHERE t.tenant_id = $1 GROUP BY 1"
        ),
        keys=f"SELECT {key} AS key, {content} AS digest FROM {table.name} t WHERE t.tenant_id = $1 AND {bucket} = ANY($2::integer[])",  # noqa: S608
        read=f"SELECT jsonb_agg(to_jsonb(t))::text FROM {table.name} t WHERE t.tenant_id = $1 AND ({qualified}) IN ({wanted})",  # noqa: S608
        write=(
            f"INSERT INTO {table.name} ({columns}) OVERRIDING SYSTEM VALUE "  # noqa: S608
            f"SELECT {columns} FROM jsonb_populate_recordset(NULL::{table.name}, $1::text::jsonb)"
        ),
        remove=f"DELETE FROM {table.name} t WHERE t.tenant_id = $1 AND ({qualified}) IN ({wanted})",  # noqa: S608
    )


def _array(keys: list[str]) -> str:
    return orjson.dumps([orjson.Fragment(key) for key in keys]).decode()
