"""Makes silos on one Postgres server: database `t_<hex>` in which each service has roles of its own, as at home.

Every step looks first, so a run may stop anywhere.
"""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from services.kernel.errors import InvalidRequest, Unavailable
from services.kernel.ids import TenantId
from services.kernel.migrate import ensure_role
from services.kernel.tenant_scan import ScannedStore
from services.tenant.adapters.store_probe import address_of, knock
from services.tenant.placement import CONTENT_SERVICES, Refusal, SiloStores, never, no_silo_server

_CONNECT_SECONDS = 5.0
_STATEMENT_SECONDS = 30.0
_LOCK_KEY = 7_400_000_002
COUNT_DATABASES = "SELECT count(*) FROM pg_database WHERE datname = $1"
COUNT_ROLES = "SELECT count(*) FROM pg_roles WHERE starts_with(rolname, $1 || '_')"
LIST_ROLES = "SELECT rolname AS name FROM pg_roles WHERE starts_with(rolname, $1 || '_')"
DATABASE_EXISTS = "SELECT true FROM pg_database WHERE datname = $1"


class PostgresSiloMaker:
    """One server, reached as a role that may create databases and roles."""

    def __init__(self, admin_dsn: str) -> None:
        self._admin_dsn = admin_dsn

    async def refuse_absent(self) -> None:
        """Raises: WrongState without a server, Unavailable when it does not answer."""
        self._refuse_unset()
        address = address_of(self._admin_dsn)
        try:
            await knock("TENANTRY_SILO_ADMIN_DSN", self._admin_dsn)
        except InvalidRequest:
            # No caller can mend it.
            raise Unavailable("silo", f"{address} refuses the login of TENANTRY_SILO_ADMIN_DSN", address=address) from None

    def plan(self, tenant_id: TenantId) -> SiloStores:
        """Returns DSNs with new passwords."""
        self._refuse_unset()
        return SiloStores(
            retrieval_dsn=self._dsn(tenant_id, "retrieval_service"),
            retrieval_owner_dsn=self._dsn(tenant_id, "retrieval_placement"),
            inference_dsn=self._dsn(tenant_id, "inference_service"),
            inference_owner_dsn=self._dsn(tenant_id, "inference_placement"),
        )

    async def make(self, tenant_id: TenantId, stores: SiloStores, refuse_unwanted: Refusal = never) -> None:
        """Makes roles, then the database, then who may connect to it."""
        name = _name(tenant_id)
        async with self._administrator() as connection:
            await refuse_unwanted()
            # Owns the database and nothing in it: whoever owns one may drop the schemas of all.
            await ensure_role(connection, f"{name}_owner", login=False, password=None)
            await connection.execute(f"GRANT {name}_owner TO CURRENT_USER")
            if not await connection.fetchval(DATABASE_EXISTS, name):
                await connection.execute(f"CREATE DATABASE {name} OWNER {name}_owner")
            await connection.execute(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC")
            for service in CONTENT_SERVICES:
                await _make_roles(connection, name, stores.dsn_for(service), stores.owner_dsn_for(service))

    async def drop(self, tenant_id: TenantId) -> None:
        """Drops the database, cutting who is connected, then the roles."""
        name = _name(tenant_id)
        async with self._administrator() as connection:
            await connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            for role in await connection.fetch(LIST_ROLES, name):
                await connection.execute(f"DROP ROLE IF EXISTS {role['name']}")

    async def scan(self, tenant_id: TenantId) -> list[ScannedStore]:
        """Counts the tenant's databases and roles on the server; without one there are none."""
        if not self._admin_dsn:
            return []
        async with self._administrator() as connection:
            counts = {
                "silo:pg_database": await connection.fetchval(COUNT_DATABASES, _name(tenant_id)),
                "silo:pg_roles": await connection.fetchval(COUNT_ROLES, _name(tenant_id)),
            }
        return [ScannedStore(store, count, 0, False, "all") for store, count in counts.items()]

    @asynccontextmanager
    async def _administrator(self) -> AsyncIterator[asyncpg.Connection]:
        self._refuse_unset()
        try:
            connection = await asyncpg.connect(  # noqa: TID251 - another server than the service's own, for a moment
                self._admin_dsn, timeout=_CONNECT_SECONDS, command_timeout=_STATEMENT_SECONDS
            )
        except (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.CannotConnectNowError):
            raise Unavailable("silo") from None
        try:
            # One at a time: two runs of one tenant would both find nothing and then stumble over each other.
            await connection.execute("SELECT pg_advisory_lock($1)", _LOCK_KEY)
            yield connection
        finally:
            await connection.close()

    def _refuse_unset(self) -> None:
        if not self._admin_dsn:
            raise no_silo_server()

    def _dsn(self, tenant_id: TenantId, role: str) -> str:
        parts, name = urlsplit(self._admin_dsn), _name(tenant_id)
        address = parts.netloc.rpartition("@")[2]
        return urlunsplit(("postgresql", f"{name}_{role}:{secrets.token_hex(24)}@{address}", f"/{name}", parts.query, ""))


async def _make_roles(connection: asyncpg.Connection, database: str, dsn: str, owner_dsn: str) -> None:
    service, placement = urlsplit(dsn), urlsplit(owner_dsn)
    # By the planned names: a plan of an earlier release has one login for both services, and is made as it was planned.
    reader, maker = str(service.username), str(placement.username)
    owner = f"{maker.removesuffix('_placement')}_owner"
    await ensure_role(connection, owner, login=False, password=None)
    await ensure_role(connection, reader, login=True, password=service.password)
    await ensure_role(connection, maker, login=True, password=placement.password)
    await connection.execute(f"GRANT {owner} TO {maker} WITH INHERIT FALSE, SET TRUE")
    await connection.execute(f"GRANT {owner} TO CURRENT_USER")
    await connection.execute(f"GRANT CONNECT ON DATABASE {database} TO {reader}, {maker}")
    # Its schema is its own to make, as the owner; it is the only thing a service owns there.
    await connection.execute(f"GRANT CREATE ON DATABASE {database} TO {owner}")


def _name(tenant_id: TenantId) -> str:
    return f"t_{tenant_id.hex}"
