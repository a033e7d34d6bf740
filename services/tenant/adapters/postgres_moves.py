"""Moves in the tenant service's own tables: each step one transaction, every change of place announced with it."""

from collections.abc import Sequence

from services.kernel.errors import NotFound, WrongState
from services.kernel.ids import TenantId
from services.kernel.placement import PlacementKind
from services.kernel.tenant_database import TenantDatabase
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_audit import append_audit
from services.tenant.adapters.postgres_events import append_events
from services.tenant.adapters.postgres_placements import ANNOUNCE, SAY_IN_TOKENS, PostgresPlacements
from services.tenant.adapters.postgres_secrets import lock_secrets
from services.tenant.moving import MOVABLE, Left
from services.tenant.placement import Placement, StoredPlace
from services.tenant.tenant_record import TenantState

BEGIN_MOVE = """
INSERT INTO tenant.placements AS p (tenant_id, kind, following_kind, following_stores, following_made) VALUES ($1, 'pool', $2, $3, $4)
ON CONFLICT (tenant_id) DO UPDATE
SET following_kind = $2, following_stores = $3, following_made = $4, moved_services = '{}', update_time = now()
WHERE p.following_kind IS NULL
RETURNING p.kind
"""
PART_MOVED = """
UPDATE tenant.placements SET moved_services = array_append(moved_services, $2), update_time = now()
WHERE tenant_id = $1 AND following_kind IS NOT NULL AND NOT $2 = ANY (moved_services)
"""
FINISH_MOVE = """
UPDATE tenant.placements
SET left_kind = kind, kind = following_kind, stores = following_stores, made = following_made,
    following_kind = NULL, following_stores = NULL, following_made = false, moved_services = '{}', update_time = now()
WHERE tenant_id = $1 AND following_kind IS NOT NULL
RETURNING left_kind, kind
"""
# What is in force may follow from the place: a silo's content is encrypted unless somebody said otherwise.
RAISE_VERSION = "UPDATE tenant.tenant_settings SET config_version = config_version + 1 WHERE tenant_id = $1"
LOCK_STATE = "SELECT state FROM tenant.tenants WHERE tenant_id = $1 FOR UPDATE"
SELECT_LEFT = "SELECT left_kind FROM tenant.placements WHERE tenant_id = $1"
FORGET_LEFT = "UPDATE tenant.placements SET left_kind = NULL WHERE tenant_id = $1"
LOOK_AGAIN = """
INSERT INTO tenant.move_directory (tenant_id, due_time) VALUES ($1, now() + make_interval(secs => $2))
ON CONFLICT (tenant_id) DO UPDATE SET due_time = excluded.due_time
"""
LOOK_NO_MORE = "DELETE FROM tenant.move_directory WHERE tenant_id = $1"
POSTPONE = "UPDATE tenant.move_directory SET due_time = now() + make_interval(secs => $2) WHERE tenant_id = $1"
SELECT_DUE = "SELECT tenant_id FROM tenant.move_directory WHERE due_time <= now() ORDER BY due_time LIMIT $1"


class PostgresMoves:
    """The move store on the service's own role."""

    def __init__(self, database: TenantDatabase, placements: PostgresPlacements) -> None:
        self._database = database
        self._placements = placements

    async def begin_move(self, tenant_id: TenantId, following: StoredPlace, actor: Actor, look_again_seconds: float) -> Placement:
        """Writes where to, and that it begins, unless a move is under way."""
        async with self._database.transaction(tenant_id) as connection:
            await lock_secrets(connection, tenant_id)
            sealed = await self._placements.seal(tenant_id, following)
            state = await connection.fetchval(LOCK_STATE, tenant_id)
            if state is None:
                raise NotFound("tenant")
            if TenantState(state) not in MOVABLE:
                raise WrongState("tenant", state, "only a tenant that is in use can be moved")
            moving_from = await connection.fetchval(BEGIN_MOVE, tenant_id, following.kind.value, sealed, following.made)
            await connection.execute(LOOK_AGAIN, tenant_id, look_again_seconds)
            if moving_from is not None:
                await append_audit(connection, tenant_id, "TENANT_MOVE_BEGUN", f"placement:{moving_from}:{following.kind.value}", actor)
            await connection.execute(ANNOUNCE, tenant_id)
        found = await self._placements.get(tenant_id)
        if found is None:
            raise NotFound("tenant")
        return found

    async def part_moved(self, tenant_id: TenantId, service: str) -> None:
        """Notes that a service's part lives at the new place."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(PART_MOVED, tenant_id, service)
            await connection.execute(ANNOUNCE, tenant_id)

    async def finish_move(self, tenant_id: TenantId, actor: Actor, grace_seconds: float) -> None:
        """Makes the new place the tenant's place; a repeated call finds no move and changes nothing."""
        async with self._database.transaction(tenant_id) as connection:
            if await connection.fetchval(LOCK_STATE, tenant_id) not in MOVABLE:
                return
            moved = await connection.fetchrow(FINISH_MOVE, tenant_id)
            if moved is None:
                return
            await connection.execute(SAY_IN_TOKENS, tenant_id, moved["kind"])
            await connection.execute(RAISE_VERSION, tenant_id)
            await connection.execute(LOOK_AGAIN, tenant_id, grace_seconds)
            await append_audit(connection, tenant_id, "TENANT_MOVED", f"placement:{moved['left_kind']}:{moved['kind']}", actor)
            await append_events(connection, tenant_id, "tenant.moved", {"from": moved["left_kind"], "to": moved["kind"]})
            await connection.execute(ANNOUNCE, tenant_id)

    async def left_behind(self, tenant_id: TenantId) -> Left:
        """Returns what is left."""
        async with self._database.transaction(tenant_id) as connection:
            kind = await connection.fetchval(SELECT_LEFT, tenant_id)
        return Left(None if kind is None else PlacementKind(kind))

    async def forget_left(self, tenant_id: TenantId) -> None:
        """Notes that nothing is left."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(FORGET_LEFT, tenant_id)
            await connection.execute(LOOK_NO_MORE, tenant_id)

    async def due(self, limit: int) -> Sequence[TenantId]:
        """Returns tenants to look at now: the directory holds ids and times alone, and is read over all of them."""
        return [TenantId(row["tenant_id"]) for row in await self._database.call(None, SELECT_DUE, limit)]

    async def postpone(self, tenant_id: TenantId, seconds: float) -> None:
        """Makes the tenant due again after that time."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(POSTPONE, tenant_id, seconds)
