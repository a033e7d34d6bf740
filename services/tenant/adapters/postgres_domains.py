"""Custom domains in Postgres, each change with its audit record, and whose a name is, over all tenants."""

from collections.abc import Sequence

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import TenantDatabase
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_audit import append_audit
from services.tenant.adapters.postgres_changes import announce
from services.tenant.change_hub import ChangeKind
from services.tenant.domain import Domain, DomainTaken
from services.tenant.domain_name import NameClaim
from services.tenant.name_resolution import Named

LOCK_TENANT = "SELECT tenant_id FROM tenant.tenants WHERE tenant_id = $1 FOR UPDATE"
GET_DOMAIN = "SELECT domain, create_time FROM tenant.domains WHERE tenant_id = $1 AND domain = $2"
COUNT_DOMAINS = "SELECT count(*) FROM tenant.domains WHERE tenant_id = $1"
INSERT_DIRECTORY = "INSERT INTO tenant.domain_directory (tenant_id, domain) VALUES ($1, $2) ON CONFLICT DO NOTHING"
INSERT_DOMAIN = "INSERT INTO tenant.domains (tenant_id, domain) VALUES ($1, $2) RETURNING domain, create_time"
LIST_DOMAINS = "SELECT domain, create_time FROM tenant.domains WHERE tenant_id = $1 ORDER BY domain"
DELETE_DOMAIN = "DELETE FROM tenant.domains WHERE tenant_id = $1 AND domain = $2"
DELETE_DIRECTORY = "DELETE FROM tenant.domain_directory WHERE tenant_id = $1 AND domain = $2"
RESOLVE_NAMES = "SELECT host_slug_tenant_id, domain_tenant_id, path_slug_tenant_id FROM tenant.resolve_names($1, $2, $3)"


class PostgresDomains:
    """The domain store and the name store on the service's own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def add_domain(self, tenant_id: TenantId, domain: str, max_domains: int, actor: Actor) -> Domain | None:
        """Keeps the domain, or returns it as it is kept; None at `max_domains`. Raises: DomainTaken."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            row = await connection.fetchrow(GET_DOMAIN, tenant_id, domain)
            if row is not None:
                return _domain(row)
            if await connection.fetchval(COUNT_DOMAINS, tenant_id) >= max_domains:
                return None
            if await connection.execute(INSERT_DIRECTORY, tenant_id, domain) == "INSERT 0 0":
                raise DomainTaken
            row = await connection.fetchrow(INSERT_DOMAIN, tenant_id, domain)
            await append_audit(connection, tenant_id, "DOMAIN_ADDED", f"domain:{domain}", actor)
            await announce(connection, tenant_id, ChangeKind.DOMAIN)
            return _domain(row)

    async def list_domains(self, tenant_id: TenantId) -> Sequence[Domain]:
        """Returns the tenant's domains by name."""
        async with self._database.transaction(tenant_id) as connection:
            return [_domain(row) for row in await connection.fetch(LIST_DOMAINS, tenant_id)]

    async def remove_domain(self, tenant_id: TenantId, domain: str, actor: Actor) -> bool:
        """Removes the domain; False when the tenant does not have it."""
        async with self._database.transaction(tenant_id) as connection:
            if await connection.execute(DELETE_DOMAIN, tenant_id, domain) == "DELETE 0":
                return False
            await connection.execute(DELETE_DIRECTORY, tenant_id, domain)
            await append_audit(connection, tenant_id, "DOMAIN_REMOVED", f"domain:{domain}", actor)
            await announce(connection, tenant_id, ChangeKind.DOMAIN)
            return True

    async def find_names(self, claim: NameClaim) -> Named:
        """Returns whose each name is, from the directories alone: no tenant is entered."""
        row = await self._database.fetch_row(None, RESOLVE_NAMES, _storable(claim.host_slug), claim.domain, _storable(claim.path_slug))
        if row is None:
            return Named(None, None, None)
        return Named(*(None if found is None else TenantId(found) for found in row))


def _storable(name: str | None) -> str | None:
    # Postgres takes no NUL in a text, and nobody's name holds one.
    return None if name is None or "\x00" in name else name


def _domain(row: asyncpg.Record) -> Domain:
    return Domain(row["domain"], row["create_time"])
