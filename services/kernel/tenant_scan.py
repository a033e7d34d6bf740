"""Looks through every table of a schema for a tenant's id and for strings only it knew. Reads and counts; changes nothing, shows nothing.

What it can see is what its role may: under a tenant's policy that tenant's own rows, as a jobs role the columns granted over all tenants.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from mesh.common.v1.lifecycle_service_pb2 import ScannedStore as ScannedStoreMessage
from mesh.common.v1.lifecycle_service_pb2 import ScanTenantResponse
from services.kernel.errors import NotFound
from services.kernel.ids import TenantId
from services.kernel.placement import HOME, PlacementKind
from services.kernel.tenant_database import Connection, JobsDatabase, PlaceMissing, TenantDatabase

SCAN_SECONDS = 60.0
LIST_TABLES = """
SELECT c.relname AS name, c.relrowsecurity AS walled,
       array_agg(quote_ident(a.attname) ORDER BY a.attnum) AS columns
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relnamespace = $1::regnamespace AND c.relkind IN ('r', 'p') AND has_column_privilege(c.oid, a.attnum, 'SELECT')
GROUP BY c.relname, c.relrowsecurity ORDER BY c.relname
"""
COUNT_IN_TABLE = """
SELECT count(*) FILTER (WHERE EXISTS (SELECT FROM unnest($1::text[]) n WHERE strpos(r.text, n) > 0)) AS found,
       count(*) FILTER (WHERE EXISTS (SELECT FROM unnest($2::text[]) n WHERE strpos(r.text, n) > 0)) AS canaries
FROM (SELECT concat_ws(' ', {columns}) AS text FROM {schema}.{table}) r
"""


@dataclass(frozen=True, slots=True)
class ScannedStore:
    """What one store holds: records with the tenant's id, records with a canary. `sight` is "tenant" or "all"."""

    store: str
    found: int
    canaries: int
    kept: bool
    sight: str


def scan_response(found: Sequence[ScannedStore]) -> ScanTenantResponse:
    """Builds the answer of ScanTenant."""
    return ScanTenantResponse(
        stores=[
            ScannedStoreMessage(store=item.store, found_count=item.found, canary_count=item.canaries, kept=item.kept, sight=item.sight)
            for item in found
        ]
    )


async def scan_schema(
    database: TenantDatabase,
    jobs: JobsDatabase | None,
    schema: str,
    tenant_id: TenantId,
    canaries: Sequence[str],
    *,
    kept: frozenset[str],
) -> list[ScannedStore]:
    """Counts in every table the roles may read, at home and where the tenant lives; `kept` names what an erased one leaves on purpose."""
    async with database.transaction_at(HOME, tenant_id, walled=False) as connection:
        found = await _scan(connection, schema, tenant_id, canaries, kept, "tenant")
    # A place of its own that is gone, or that nobody knows any more, holds nothing.
    with suppress(PlaceMissing, NotFound):
        place = await database.find_place(tenant_id)
        if place.kind is not PlacementKind.POOL:
            async with database.transaction_at(place, tenant_id) as connection:
                placed = await _scan(connection, place.schema or schema, tenant_id, canaries, frozenset(), "tenant")
            found += [replace(item, store=f"{place.kind.value}:{item.store}") for item in placed]
    if jobs is not None:
        async with jobs.transaction() as connection:
            found += await _scan(connection, schema, tenant_id, canaries, kept, "all")
    return found


def spellings(tenant_id: TenantId) -> list[str]:
    """Returns how the id may stand in a text, a name or the hexadecimal of bytes."""
    return [str(tenant_id), tenant_id.hex]


async def _scan(
    connection: Connection, schema: str, tenant_id: TenantId, canaries: Sequence[str], kept: frozenset[str], sight: str
) -> list[ScannedStore]:
    # A scan reads whole tables where the role may: it is no call's work, so it has a limit of its own.
    await connection.execute(f"SET LOCAL statement_timeout = '{int(SCAN_SECONDS)}s'")
    # A string inside a bytea column shows as the hexadecimal of its bytes.
    needles = [spelling for text in canaries for spelling in (text, text.encode().hex())]
    found = []
    for table in await connection.fetch(LIST_TABLES, schema):
        if table["name"] == "schema_migrations":
            continue
        sql = COUNT_IN_TABLE.format(columns=", ".join(f"{column}::text" for column in table["columns"]), schema=schema, table=table["name"])
        row = await connection.fetchrow(sql, spellings(tenant_id), needles, timeout=SCAN_SECONDS)
        store = f"postgres:{schema}.{table['name']}"
        found.append(ScannedStore(store, row["found"], row["canaries"], table["name"] in kept, sight))
    return found
