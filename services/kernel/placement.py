"""Where a tenant's content is: in the shared tables, in a schema of its own, or in a database of its own. Nothing else decides it.

What is remembered here may be old: every place itself refuses a tenant that has moved away (SQLSTATE TM001), and then it is asked again.
"""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import structlog
from pydantic import SecretStr

from mesh.tenant.v1 import placement_service_pb2, placement_service_pb2_grpc
from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId
from services.kernel.request_context import maybe_tenant, remaining_seconds
from services.kernel.rpc.channel import MeshChannel
from services.kernel.single_flight import SingleFlightCache
from services.kernel.tenant_context import TenantContext

log = structlog.get_logger(__name__)

FETCH_TIMEOUT_SECONDS = 2.0
CAPACITY = 10_000
# How long a call waits for a move that has closed the old place and not named the new one yet.
MOVING_SECONDS = 5.0
_ASK_AGAIN_SECONDS = 0.05
_SCHEMA_NAME = re.compile(r"|[a-z][a-z0-9_]{0,40}")


class PlacementKind(StrEnum):
    """How much of a store a tenant shares with others."""

    POOL = "pool"
    BRIDGE = "bridge"
    SILO = "silo"


@dataclass(frozen=True, slots=True)
class Place:
    """One place. An empty schema, DSN or URL means the service's own; the key goes with the URL."""

    kind: PlacementKind
    schema: str = ""
    dsn: SecretStr = field(default=SecretStr(""), repr=False)
    qdrant_url: str = ""
    qdrant_api_key: SecretStr = field(default=SecretStr(""), repr=False)

    def __post_init__(self) -> None:
        if not _SCHEMA_NAME.fullmatch(self.schema):
            msg = "a schema's name is made of lower-case letters, digits and underscores"
            raise ValueError(msg)


HOME = Place(PlacementKind.POOL)


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a tenant is, and where it is being moved to, if it is. `migration_dsn` is for making tables, and empty unless asked for."""

    place: Place
    following: Place | None = None
    migration_dsn: SecretStr = field(default=SecretStr(""), repr=False)


class PlaceSource(Protocol):
    """Who knows where tenants are."""

    async def fetch(self, tenant_id: TenantId, context: TenantContext | None) -> Whereabouts:
        """Returns where the tenant is. Raises: NotFound when it is gone, Unavailable when nobody can tell."""
        ...


class PlaceDirectory:
    """Remembers where tenants are, and asks once for all who wait."""

    def __init__(self, source: PlaceSource, *, capacity: int = CAPACITY, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._known: SingleFlightCache[TenantId, Place] = SingleFlightCache(capacity)
        self._monotonic = monotonic

    def peek(self, tenant_id: TenantId) -> Place | None:
        """Returns what is remembered, without asking."""
        return self._known.peek(tenant_id)

    async def find(self, tenant_id: TenantId) -> Place:
        """Returns where the tenant is.

        A context that says `pool`, and work without a context, need no question: the shared place refuses who does not live there.
        """
        known = self._known.peek(tenant_id)
        if known is not None:
            return known
        context = maybe_tenant()
        if context is None or context.tenant_id != tenant_id or context.placement == PlacementKind.POOL:
            return HOME
        return await self._known.get(tenant_id, lambda: self._current(tenant_id, context))

    async def moved(self, tenant_id: TenantId, left: Place) -> Place:
        """Returns where the tenant is now that `left` has refused it; waits a little while a move ends. Raises: Unavailable."""
        give_up_at = self._monotonic() + min(MOVING_SECONDS, remaining_seconds(MOVING_SECONDS))
        context = maybe_tenant()
        while True:
            self.forget(tenant_id)
            whereabouts = await self._source.fetch(tenant_id, context)
            # Where it lives first: what it is moving to is only a copy until its own place refuses it as well.
            for place in (whereabouts.place, whereabouts.following):
                if place is not None and place != left:
                    log.info("tenant_found_elsewhere", tenant_id=str(tenant_id), kind=place.kind.value)
                    return await self._known.get(tenant_id, lambda found=place: _at_once(found))  # type: ignore[misc] # bound per turn
            if self._monotonic() + _ASK_AGAIN_SECONDS >= give_up_at:
                raise Unavailable("placement", "the tenant's data is being moved; try again shortly")
            await asyncio.sleep(_ASK_AGAIN_SECONDS)

    def forget(self, tenant_id: TenantId | None) -> None:
        """Forgets one tenant's place, or everybody's for None: the next call asks again."""
        self._known.forget(tenant_id)

    async def _current(self, tenant_id: TenantId, context: TenantContext) -> Place:
        return (await self._source.fetch(tenant_id, context)).place


class RemotePlaces:
    """Asks the tenant service, in the name of the tenant itself: without its context nobody learns where it is."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        self._stub = placement_service_pb2_grpc.PlacementServiceStub(channel.channel)

    async def fetch(self, tenant_id: TenantId, context: TenantContext | None, *, for_tables: bool = False) -> Whereabouts:
        """Returns where the tenant is; with `for_tables` also what its tables are made with."""
        if context is None or context.tenant_id != tenant_id:
            raise Unavailable("placement", "where the tenant lives is not known here yet; it is once the tenant itself calls")
        response = await self._channel.unary(
            self._stub.GetPlacement,
            placement_service_pb2.GetPlacementRequest(for_tables=for_tables),
            timeout_seconds=FETCH_TIMEOUT_SECONDS,
            tenant=context,
            idempotent=True,
        )
        following = _place(response.following) if response.HasField("following") else None
        return Whereabouts(_place(response.place), following, SecretStr(response.migration_dsn))


def _place(message: placement_service_pb2.Place) -> Place:
    return Place(
        kind=_KINDS[message.isolation],
        schema=message.schema_name,
        dsn=SecretStr(message.postgres_dsn),
        qdrant_url=message.qdrant_url,
        qdrant_api_key=SecretStr(message.qdrant_api_key),
    )


_KINDS = {
    placement_service_pb2.ISOLATION_POOL: PlacementKind.POOL,
    placement_service_pb2.ISOLATION_BRIDGE: PlacementKind.BRIDGE,
    placement_service_pb2.ISOLATION_SILO: PlacementKind.SILO,
}


async def _at_once(place: Place) -> Place:
    return place
