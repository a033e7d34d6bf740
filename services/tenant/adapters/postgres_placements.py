"""Placements in the tenant service's own tables, with their addresses sealed for the tenant they belong to."""

import json
from uuid import UUID

from services.kernel.ids import TenantId
from services.kernel.placement import PlacementKind
from services.kernel.tenant_database import TenantDatabase
from services.tenant.adapters.postgres_secrets import PLACEMENT_PURPOSE, lock_secrets
from services.tenant.adapters.saga_steps import require_lease
from services.tenant.placement import POOLED, Placement, SiloStores, StoredPlace
from services.tenant.saga import SagaKind
from services.tenant.secret_box import SecretBox

SELECT_PLACEMENT = """
SELECT kind, stores, made, following_kind, following_stores, following_made, moved_services, left_kind, update_time
FROM tenant.placements WHERE tenant_id = $1
"""
TENANT_EXISTS = "SELECT true FROM tenant.tenants WHERE tenant_id = $1"
LOCK_TENANT = "SELECT true FROM tenant.tenants WHERE tenant_id = $1 FOR UPDATE"
INSERT_PLACEMENT = """
INSERT INTO tenant.placements (tenant_id, kind, stores, made) VALUES ($1, $2, $3, $4) ON CONFLICT (tenant_id) DO NOTHING
"""
SAY_IN_TOKENS = "UPDATE tenant.tenants SET placement = $2 WHERE tenant_id = $1 AND placement <> $2"
ANNOUNCE = "SELECT tenant.announce($1, 'PLACEMENT')"


class PostgresPlacements:
    """The placement store on the service's own role."""

    def __init__(self, database: TenantDatabase, box: SecretBox) -> None:
        self._database = database
        self._box = box

    async def get(self, tenant_id: TenantId, *, with_stores: bool = True) -> Placement | None:
        """Returns the tenant's placement, with its secrets opened or left out."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(SELECT_PLACEMENT, tenant_id)
            if row is None:
                return POOLED if await connection.fetchval(TENANT_EXISTS, tenant_id) else None
        stores, following_stores = (row["stores"], row["following_stores"]) if with_stores else (None, None)
        following = None
        if row["following_kind"] is not None:
            following = await self._place(tenant_id, row["following_kind"], following_stores, row["following_made"])
        return Placement(
            place=await self._place(tenant_id, row["kind"], stores, row["made"]),
            following=following,
            moved_services=frozenset(row["moved_services"]),
            left_kind=None if row["left_kind"] is None else PlacementKind(row["left_kind"]),
            update_time=row["update_time"],
        )

    async def settle(self, tenant_id: TenantId, place: StoredPlace, lease: UUID | None) -> StoredPlace:
        """Writes the place unless there is one, and what tokens say. Raises: LeaseLost."""
        async with self._database.transaction(tenant_id) as connection:
            if lease is not None:
                await require_lease(connection, tenant_id, SagaKind.PROVISION, lease)
            await lock_secrets(connection, tenant_id)
            sealed = await self.seal(tenant_id, place)
            await connection.execute(LOCK_TENANT, tenant_id)
            await connection.execute(INSERT_PLACEMENT, tenant_id, place.kind.value, sealed, place.made)
            row = await connection.fetchrow(SELECT_PLACEMENT, tenant_id)
            await connection.execute(SAY_IN_TOKENS, tenant_id, row["kind"])
            await connection.execute(ANNOUNCE, tenant_id)
        return await self._place(tenant_id, row["kind"], row["stores"], row["made"])

    async def seal(self, tenant_id: TenantId, place: StoredPlace) -> bytes | None:
        """Returns the sealed addresses; None where there are none."""
        if place.stores == SiloStores():
            return None
        return await self._box.seal(tenant_id, PLACEMENT_PURPOSE, json.dumps(place.stores.named()).encode())

    async def _place(self, tenant_id: TenantId, kind: str, sealed: bytes | None, made: bool) -> StoredPlace:
        stores = SiloStores() if sealed is None else SiloStores(**json.loads(await self._box.open(tenant_id, PLACEMENT_PURPOSE, sealed)))
        return StoredPlace(PlacementKind(kind), stores, made)
