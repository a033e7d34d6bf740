"""Moves one service's part of a tenant to another place while it is used: copied under way, then finished behind a closed wall.

The order is the guarantee. While the wall is closed nobody reads or writes the tenant here; the copy is committed, and only then the note
that the tenant lives elsewhere. A crash before the note leaves the tenant where it was; one after it leaves it where it is going.

An erasure ends a move: behind the service's tombstone nothing is noted, and what was copied before it is removed by the erasure.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import asyncpg
import structlog

from services.kernel.errors import NotFound, Unavailable
from services.kernel.ids import TenantId
from services.kernel.place_making import PlaceMaker, TableSource, hold_off_erasure, refuse_erased
from services.kernel.placement import HOME, Place, PlacementKind, Whereabouts
from services.kernel.table_copying import TenantTable, copy_tables, digest, prepare
from services.kernel.tenant_context import TenantContext
from services.kernel.tenant_database import Connection, PlaceMissing, TenantDatabase

log = structlog.get_logger(__name__)

# How long the tenant may be kept waiting while the wall is closed: less than any statement of a call is given.
CLOSED_SECONDS = 4.0
ATTEMPTS = 8
MAX_PASSES = 10
# A pass that finds no more than this is followed by closing the wall.
FEW_ROWS = 50
_BETWEEN_SECONDS = 0.2
MOVING, AWAY = "MOVING", "AWAY"
LOCK = "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))"


class Belongings(Protocol):
    """What a service keeps of a tenant outside Postgres."""

    async def copy(self, tenant_id: TenantId, source: Place, target: Place) -> int:
        """Makes the target's equal to the source's; returns how many records were written or removed. Repeatable."""
        ...

    async def drop_shared(self, tenant_id: TenantId, now_at: Place) -> dict[str, int]:
        """Removes what is left in the shared stores of a tenant that lives elsewhere; returns counts by kind."""
        ...

    async def drop_copy(self, tenant_id: TenantId, target: Place) -> None:
        """Removes what `copy` made in stores of the target's own. Repeatable."""
        ...


class TenantMover:
    """One service's moves. `tables` are listed parents first."""

    def __init__(
        self,
        database: TenantDatabase,
        source: TableSource,
        maker: PlaceMaker,
        home_schema: str,
        tables: Sequence[TenantTable],
        belongings: Belongings | None = None,
    ) -> None:
        self._database = database
        self._source = source
        self._maker = maker
        self._home = home_schema
        self._tables = tables
        self._belongings = belongings

    async def move(self, context: TenantContext) -> dict[str, int]:
        """Moves the context's tenant to where the tenant service says it is going; returns its rows by table.

        Idempotent. Raises: NotFound for a tenant that is erased meanwhile, Unavailable when the tenant writes faster than can be copied,
        or a store is away: repeat the call.
        """
        tenant_id = _id_of(context)
        whereabouts = await self._source.fetch(tenant_id, context, for_tables=True)
        if whereabouts.following is None:
            return await self._counts(tenant_id, whereabouts.place)
        await self._maker.make_tables(whereabouts.following, whereabouts.migration_dsn)
        async with self._database.transaction_at(whereabouts.place, tenant_id, walled=False) as connection:
            await self._note(connection, tenant_id, whereabouts.following, MOVING)
        for attempt in range(ATTEMPTS):
            await self._copy_open(tenant_id, whereabouts)
            try:
                await self._finish(tenant_id, whereabouts)
                break
            except (asyncpg.LockNotAvailableError, TimeoutError) as error:
                log.info("move_postponed", tenant_id=str(tenant_id), attempt=attempt, error=type(error).__name__)
                await asyncio.sleep(_BETWEEN_SECONDS * (attempt + 1))
        else:
            raise Unavailable("placement", "the tenant writes faster than can be copied; repeat the call at a quieter time")
        if whereabouts.place.kind is not PlacementKind.POOL:
            await self._maker.note_away(tenant_id, whereabouts.following)
        return await self._counts(tenant_id, whereabouts.following)

    async def drop_left(self, context: TenantContext) -> dict[str, int]:
        """Removes what a tenant that lives elsewhere left in the shared stores; returns counts by kind. Idempotent.

        Nothing of a tenant that lives in the pool is touched, whoever asks.
        """
        tenant_id, removed = _id_of(context), dict[str, int]()
        async with self._database.transaction_at(HOME, tenant_id, walled=False) as connection:
            if await self._state(connection, tenant_id) != AWAY:
                return {}
            for table in reversed(self._tables):
                done = await connection.execute(f"DELETE FROM {table.name} WHERE tenant_id = $1", tenant_id)  # noqa: S608 - this code's names
                removed[f"postgres:{self._home}.{table.name}"] = int(done.rpartition(" ")[2])
        if self._belongings is not None:
            place = (await self._source.fetch(tenant_id, context)).place
            removed |= await self._belongings.drop_shared(tenant_id, place)
        return removed

    async def erase_copies(self, context: TenantContext) -> None:
        """Removes, for a tenant that is being erased, what it left behind and what a move that is under way has copied. Idempotent."""
        tenant_id = _id_of(context)
        try:
            await self.drop_left(context)
            async with self._database.transaction(tenant_id) as connection:
                state = await self._state(connection, tenant_id)
            if state == MOVING and (following := (await self._source.fetch(tenant_id, context)).following) is not None:
                async with self._database.transaction_at(following, tenant_id, walled=False) as copy:
                    # Whoever is copying ends first; who copies later finds the tombstone.
                    await copy.fetchval(LOCK, _copying(tenant_id))
                    for table in reversed(self._tables):
                        await copy.execute(f"DELETE FROM {table.name} WHERE tenant_id = $1", tenant_id)  # noqa: S608 - this code's names
                if self._belongings is not None:
                    await self._belongings.drop_copy(tenant_id, following)
        except (NotFound, PlaceMissing):
            # The place, or all that was known of the tenant, is gone already.
            return

    async def _copy_open(self, tenant_id: TenantId, whereabouts: Whereabouts) -> None:
        for _ in range(MAX_PASSES):
            changed = await self._copy_once(tenant_id, whereabouts)
            if self._belongings is not None:
                changed += await self._copy_belongings(self._belongings, tenant_id, whereabouts)
            if changed <= FEW_ROWS:
                return

    async def _copy_belongings(self, belongings: Belongings, tenant_id: TenantId, whereabouts: Whereabouts) -> int:
        changed = await belongings.copy(tenant_id, whereabouts.place, _following(whereabouts))
        try:
            async with self._database.transaction_at(whereabouts.place, tenant_id, walled=False) as ours:
                await refuse_erased(ours, self._home, tenant_id)
        except NotFound:
            # Too many to be copied inside a transaction, and so the erasure did not wait for them.
            await belongings.drop_copy(tenant_id, _following(whereabouts))
            raise
        return changed

    async def _copy_once(self, tenant_id: TenantId, whereabouts: Whereabouts) -> int:
        async with self._database.transaction_at(_following(whereabouts), tenant_id, walled=False) as copy:
            # Before the source is looked at: a pass that saw an older source must not write over one that saw a newer.
            await copy.fetchval(LOCK, _copying(tenant_id))
            async with self._database.transaction_at(whereabouts.place, tenant_id, walled=False, snapshot=True) as ours:
                # Begun behind the lock: an erasure that this snapshot does not show yet comes for the copy after it.
                await refuse_erased(ours, self._home, tenant_id)
                if await self._state(ours, tenant_id) == AWAY:
                    return 0
                await prepare(ours)
                await prepare(copy)
                return await copy_tables(ours, copy, self._tables, tenant_id)

    async def _finish(self, tenant_id: TenantId, whereabouts: Whereabouts) -> None:
        source, target = whereabouts.place, _following(whereabouts)
        async with asyncio.timeout(CLOSED_SECONDS), self._database.transaction_at(source, tenant_id, walled=False) as ours:
            # The copy's connection first: while the wall is closed, whoever waits at it may hold all the others.
            async with self._database.transaction_at(target, tenant_id, walled=False) as copy:
                await copy.fetchval(LOCK, _copying(tenant_id))
                await prepare(ours)
                await prepare(copy)
                await ours.execute("SET LOCAL lock_timeout = '2s'")
                await ours.fetchval(LOCK, f"{source.schema or self._home}.{self._home}_placed_tenants:{tenant_id}")
                await refuse_erased(ours, self._home, tenant_id)
                if await self._state(ours, tenant_id) == AWAY:
                    return
                await copy_tables(ours, copy, self._tables, tenant_id)
                await self._verify(ours, copy, tenant_id)
                if self._belongings is not None:
                    await self._belongings.copy(tenant_id, source, target)
            await self._note(ours, tenant_id, target, AWAY)

    async def _note(self, connection: Connection, tenant_id: TenantId, place: Place, state: str) -> None:
        # An erased tenant that the list still named would be looked for at a place that is gone, by its own erasure above all.
        await hold_off_erasure(connection, self._home, tenant_id)
        await connection.execute(
            f"INSERT INTO {self._home}_placed_tenants AS p (tenant_id, kind, state) VALUES ($1, $2, $3) "  # noqa: S608 - a schema's name
            "ON CONFLICT (tenant_id) DO UPDATE SET kind = excluded.kind, state = excluded.state, update_time = clock_timestamp() "
            f"WHERE p.state <> '{AWAY}'",
            tenant_id,
            place.kind.value,
            state,
        )

    async def _verify(self, ours: Connection, copy: Connection, tenant_id: TenantId) -> None:
        for table in self._tables:
            if await digest(ours, table, tenant_id) != await digest(copy, table, tenant_id):
                # Read back from the copy itself: a trigger, a default or a lost row there must stop the move.
                raise MoveNotVerified(table.name)

    async def _state(self, connection: Connection, tenant_id: TenantId) -> str | None:
        state: str | None = await connection.fetchval(
            f"SELECT state FROM {self._home}_placed_tenants WHERE tenant_id = $1",  # noqa: S608 - a schema's name
            tenant_id,
        )
        return state

    async def _counts(self, tenant_id: TenantId, place: Place) -> dict[str, int]:
        async with self._database.transaction_at(place, tenant_id) as connection:
            return {
                f"postgres:{self._home}.{table.name}": await connection.fetchval(
                    f"SELECT count(*) FROM {table.name} WHERE tenant_id = $1",  # noqa: S608 - this code's names
                    tenant_id,
                )
                for table in self._tables
            }


class MoveNotVerified(Unavailable):
    """The copy differs from what was copied; the tenant stays where it is."""

    def __init__(self, table: str) -> None:
        super().__init__("placement", f"the copy of {table} differs from the original; nothing was moved, repeat the call", table=table)


def _id_of(context: TenantContext) -> TenantId:
    if context.tenant_id is None:
        msg = "a move is of the tenant its context names"
        raise ValueError(msg)
    return context.tenant_id


def _copying(tenant_id: TenantId) -> str:
    return f"copying:{tenant_id}"


def _following(whereabouts: Whereabouts) -> Place:
    if whereabouts.following is None:
        msg = "no move is under way"
        raise ValueError(msg)
    return whereabouts.following
