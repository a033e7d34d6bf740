"""Issuers in Postgres: a tenant's own, each change with its audit record, and the one a token appeals to, over all tenants."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from uuid import UUID

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import TenantDatabase
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_audit import append_audit
from services.tenant.adapters.postgres_changes import announce
from services.tenant.adapters.postgres_tenants import tenant_facts
from services.tenant.change_hub import ChangeKind
from services.tenant.issuer import DecideScopes, Issuer, IssuerTaken, IssuerTerms
from services.tenant.json_web_key import Algorithm
from services.tenant.jwt_proof import KnownIssuer

# The tenant's row serialises the tenant's registrations, so that none slips in beside the last one.
LOCK_TENANT = "SELECT tenant_id FROM tenant.tenants WHERE tenant_id = $1 FOR UPDATE"
COUNT_ISSUERS = "SELECT count(*) FROM tenant.issuers WHERE tenant_id = $1"
INSERT_DIRECTORY = "INSERT INTO tenant.issuer_directory (tenant_id, issuer, audience) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
_COLUMNS = "tenant_id, issuer_id, issuer, audience, jwks_uri, algorithms, scopes, clock_skew_seconds, create_time"
INSERT_ISSUER = f"""
INSERT INTO tenant.issuers (tenant_id, issuer, audience, jwks_uri, algorithms, scopes, clock_skew_seconds)
VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING {_COLUMNS}
"""  # noqa: S608 - joined from constants
LIST_ISSUERS = f"SELECT {_COLUMNS} FROM tenant.issuers WHERE tenant_id = $1 ORDER BY issuer_id"  # noqa: S608 - as above
LOCK_ISSUER = f"SELECT {_COLUMNS} FROM tenant.issuers WHERE tenant_id = $1 AND issuer_id = $2 FOR UPDATE"  # noqa: S608 - as above
UPDATE_SCOPES = "UPDATE tenant.issuers SET scopes = $3 WHERE tenant_id = $1 AND issuer_id = $2"
DELETE_ISSUER = "DELETE FROM tenant.issuers WHERE tenant_id = $1 AND issuer_id = $2 RETURNING issuer, audience"
DELETE_DIRECTORY = "DELETE FROM tenant.issuer_directory WHERE tenant_id = $1 AND issuer = $2 AND audience = $3"
FIND_ISSUER = f"SELECT {_COLUMNS}, (facts).* FROM tenant.find_issuer($1, $2::text[])"  # noqa: S608 - as above


class PostgresIssuers:
    """The issuer store and the known issuers on the service's own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def add_issuer(self, tenant_id: TenantId, terms: IssuerTerms, max_issuers: int, actor: Actor) -> Issuer | None:
        """Keeps the issuer; None at `max_issuers`. Raises: IssuerTaken."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            if await connection.fetchval(COUNT_ISSUERS, tenant_id) >= max_issuers:
                return None
            if await connection.execute(INSERT_DIRECTORY, tenant_id, terms.issuer, terms.audience) == "INSERT 0 0":
                raise IssuerTaken
            row = await connection.fetchrow(
                INSERT_ISSUER,
                tenant_id,
                terms.issuer,
                terms.audience,
                terms.jwks_uri,
                [algorithm.value for algorithm in terms.algorithms],
                sorted(terms.scopes),
                int(terms.clock_skew.total_seconds()),
            )
            issuer = _issuer(row)
            await append_audit(connection, tenant_id, "ISSUER_ADDED", f"issuer:{issuer.issuer_id}", actor)
            await announce(connection, tenant_id, ChangeKind.ISSUER)
            return issuer

    async def list_issuers(self, tenant_id: TenantId) -> Sequence[Issuer]:
        """Returns the tenant's issuers, oldest first."""
        async with self._database.transaction(tenant_id) as connection:
            return [_issuer(row) for row in await connection.fetch(LIST_ISSUERS, tenant_id)]

    async def change_scopes(self, tenant_id: TenantId, issuer_id: UUID, decide: DecideScopes, actor: Actor) -> Issuer | None:
        """Keeps the scopes that are decided, and returns the issuer with them; None when the tenant does not have it."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(LOCK_ISSUER, tenant_id, issuer_id)
            if row is None:
                return None
            issuer = _issuer(row)
            before, after = issuer.terms.scopes, decide(issuer.terms.scopes)
            if before != after:
                await connection.execute(UPDATE_SCOPES, tenant_id, issuer_id, sorted(after))
                detail = json.dumps({"added": sorted(after - before), "removed": sorted(before - after)})
                await append_audit(connection, tenant_id, "ISSUER_SCOPES_CHANGED", f"issuer:{issuer_id}", actor, detail=detail)
                await announce(connection, tenant_id, ChangeKind.ISSUER)
            return replace(issuer, terms=replace(issuer.terms, scopes=after))

    async def remove_issuer(self, tenant_id: TenantId, issuer_id: UUID, actor: Actor) -> bool:
        """Removes the issuer; False when the tenant does not have it."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(DELETE_ISSUER, tenant_id, issuer_id)
            if row is None:
                return False
            await connection.execute(DELETE_DIRECTORY, tenant_id, row["issuer"], row["audience"])
            await append_audit(connection, tenant_id, "ISSUER_REMOVED", f"issuer:{issuer_id}", actor)
            await announce(connection, tenant_id, ChangeKind.ISSUER)
            return True

    async def find_issuer(self, issuer: str, audiences: Sequence[str]) -> KnownIssuer | None:
        """Returns the one registration; the function enters the tenant the directory names before it reads anything of it."""
        row = await self._database.fetch_row(None, FIND_ISSUER, issuer, list(audiences))
        return None if row is None else KnownIssuer(TenantId(row["tenant_id"]), _issuer(row), tenant_facts(row))


def _issuer(row: asyncpg.Record) -> Issuer:
    terms = IssuerTerms(
        issuer=row["issuer"],
        audience=row["audience"],
        jwks_uri=row["jwks_uri"],
        algorithms=tuple(Algorithm(name) for name in row["algorithms"]),
        scopes=frozenset(row["scopes"]),
        clock_skew=timedelta(seconds=row["clock_skew_seconds"]),
    )
    return Issuer(row["issuer_id"], terms, row["create_time"])
