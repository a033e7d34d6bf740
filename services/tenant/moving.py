"""Moves tenants while they are used: place made, each service's part moved, tokens told, and what was left behind removed later.

Every step is durable before the next and safe to repeat, so that a move that stopped anywhere is gone on with, by a caller or by the sweep.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from services.kernel.errors import MeshError, NotFound, WrongState
from services.kernel.ids import TenantId
from services.kernel.placement import PlacementKind
from services.kernel.tenant_context import TenantContext
from services.tenant.actor import Actor
from services.tenant.context_minting import PROVISIONING_SUBJECT, ContextMinter, Grant
from services.tenant.placement import CONTENT_SERVICES, Placement, Placements, PlacementWish, StoredPlace
from services.tenant.tenant_record import TenantDirectory, TenantState

log = structlog.get_logger(__name__)

SWEEP_SECONDS = 2.0
TENANTS_AT_ONCE = 10
# A caller who began a move is left to it for this long before the sweep goes on with it.
HANDS_OFF_SECONDS = 30.0
POSTPONED_SECONDS = 10.0
MOVABLE = frozenset((TenantState.ACTIVE, TenantState.SUSPENDED))


@dataclass(frozen=True, slots=True)
class Left:
    """What a finished move left behind: the kind of place; None when nothing is left."""

    kind: PlacementKind | None


class MoveStore(Protocol):
    """Where moves are kept. Every method is one transaction and safe to repeat."""

    async def begin_move(self, tenant_id: TenantId, following: StoredPlace, actor: Actor, look_again_seconds: float) -> Placement:
        """Writes where to, and that it begins, unless a move is under way; returns the placement. The sweep looks at it after that time."""
        ...

    async def part_moved(self, tenant_id: TenantId, service: str) -> None:
        """Notes that a service's part lives at the new place."""
        ...

    async def finish_move(self, tenant_id: TenantId, actor: Actor, grace_seconds: float) -> None:
        """Makes the new place the tenant's place, in tokens too; what is left is due for removal after the grace."""
        ...

    async def left_behind(self, tenant_id: TenantId) -> Left:
        """Returns what is due or will be due for removal."""
        ...

    async def forget_left(self, tenant_id: TenantId) -> None:
        """Notes that nothing is left."""
        ...

    async def due(self, limit: int) -> Sequence[TenantId]:
        """Returns tenants with a move to go on with or something to remove, now."""
        ...

    async def postpone(self, tenant_id: TenantId, seconds: float) -> None:
        """Makes the tenant due again after that time."""
        ...


class MovingPeer(Protocol):
    """A service that keeps content."""

    async def move(self, context: TenantContext) -> None:
        """Moves its part. Safe to repeat. Raises: MeshError."""
        ...

    async def drop_left(self, context: TenantContext) -> None:
        """Removes what its part left in the shared stores. Safe to repeat. Raises: MeshError."""
        ...


class TenantMoves:
    """Makes moves, and finishes those that nobody finished."""

    def __init__(
        self,
        placements: Placements,
        store: MoveStore,
        directory: TenantDirectory,
        peers: Mapping[str, MovingPeer],
        minter: ContextMinter,
        *,
        grace_seconds: float,
    ) -> None:
        self._placements = placements
        self._store = store
        self._directory = directory
        self._peers = peers
        self._minter = minter
        self._grace_seconds = grace_seconds

    async def move(self, tenant_id: TenantId, wish: PlacementWish, actor: Actor) -> Placement:
        """Moves the tenant and returns its placement.

        Raises: NotFound, WrongState for a tenant that is not in use, lives in a place of its kind made otherwise or moves elsewhere,
        Unavailable: repeat the call.
        """
        placement = await self._existing(tenant_id)
        if placement.following is None:
            if placement.place.kind is wish.kind:
                return placement
            if placement.place.kind is PlacementKind.SILO:
                raise WrongState("placement", "SILO", "a tenant is not moved out of a database of its own")
            await self._refuse_unmovable(tenant_id)
            await self._placements.refuse_impossible(wish)
            planned = self._placements.planned(tenant_id, wish)
            placement = await self._store.begin_move(tenant_id, planned, actor, HANDS_OFF_SECONDS)
        if placement.following is None or placement.following.kind is not wish.kind:
            raise WrongState("placement", "MOVING", "the tenant is being moved to another place; wait until it is there")
        return await self._go_on(tenant_id, placement, actor)

    async def sweep_forever(self) -> None:
        """Goes on with moves and removals that are due, until cancelled."""
        while True:
            try:
                due = await self._store.due(TENANTS_AT_ONCE)
            except MeshError as error:
                due = []
                log.warning("sweep_postponed", reason=error.reason_name)
            for tenant_id in due:
                try:
                    # Before it is tried: one that fails again and again must not keep the others from their turn.
                    await self._store.postpone(tenant_id, POSTPONED_SECONDS)
                    await self.go_on(tenant_id)
                except MeshError as error:
                    log.warning("move_postponed", tenant_id=str(tenant_id), reason=error.reason_name)
            await asyncio.sleep(SWEEP_SECONDS)

    async def go_on(self, tenant_id: TenantId) -> None:
        """Takes the tenant's move a step further, to its end if nothing fails."""
        placement = await self._placements.get(tenant_id)
        if placement is None:
            await self._store.forget_left(tenant_id)
        elif placement.following is not None:
            await self._go_on(tenant_id, placement, Actor(PROVISIONING_SUBJECT, "", ""))
        else:
            await self._remove_left(tenant_id)

    async def _go_on(self, tenant_id: TenantId, placement: Placement, actor: Actor) -> Placement:
        if placement.following is not None:
            # Looked at again and again: a tenant that is being erased gets no new place.
            await self._refuse_unmovable(tenant_id)
            await self._placements.make(tenant_id, placement.following, lambda: self._refuse_unmovable(tenant_id))
            for service in CONTENT_SERVICES:
                if service not in placement.moved_services:
                    await self._refuse_unmovable(tenant_id)
                    await self._peers[service].move(await self._context(tenant_id))
                    await self._store.part_moved(tenant_id, service)
            await self._store.finish_move(tenant_id, actor, self._grace_seconds)
            log.info("tenant_moved", tenant_id=str(tenant_id), kind=placement.following.kind.value)
        return await self._existing(tenant_id)

    async def _remove_left(self, tenant_id: TenantId) -> None:
        left = await self._store.left_behind(tenant_id)
        if left.kind is not None:
            for service in CONTENT_SERVICES:
                await self._peers[service].drop_left(await self._context(tenant_id))
            if left.kind is PlacementKind.BRIDGE:
                await self._placements.drop_schema(tenant_id)
        await self._store.forget_left(tenant_id)

    async def _existing(self, tenant_id: TenantId) -> Placement:
        placement = await self._placements.get(tenant_id)
        if placement is None:
            raise NotFound("tenant")
        return placement

    async def _refuse_unmovable(self, tenant_id: TenantId) -> None:
        facts = await self._directory.get_facts(tenant_id)
        if facts is None:
            raise NotFound("tenant")
        if facts.state not in MOVABLE:
            raise WrongState("tenant", facts.state.value, "only a tenant that is in use can be moved")

    async def _context(self, tenant_id: TenantId) -> TenantContext:
        facts = await self._directory.get_facts(tenant_id)
        if facts is None:
            raise NotFound("tenant")
        return self._minter.mint(Grant(tenant_id, facts, PROVISIONING_SUBJECT, frozenset()))
