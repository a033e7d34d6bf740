"""Where each tenant's content lives: which place it is given, how that is made, told to the services and dropped again.

Refuses a place there is no room or server for before anything of the tenant is recorded.
"""

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Protocol
from urllib.parse import SplitResult, urlsplit
from uuid import UUID

from services.kernel.errors import InvalidRequest, WrongState
from services.kernel.ids import TenantId
from services.kernel.placement import PlacementKind

# The services that keep a tenant's content, in the order in which they are moved.
CONTENT_SERVICES = ("retrieval", "inference")


@dataclass(frozen=True, slots=True, repr=False)
class SiloStores:
    """A tenant's own stores; every field is a secret, so there is no repr. Empty fields mean the shared or the service's own.

    A service that has no DSN of its own here reads and writes, or makes its tables, with the one for all.
    """

    postgres_dsn: str = ""
    postgres_owner_dsn: str = ""
    qdrant_url: str = ""
    qdrant_api_key: str = ""
    retrieval_dsn: str = ""
    retrieval_owner_dsn: str = ""
    inference_dsn: str = ""
    inference_owner_dsn: str = ""

    @property
    def has_database(self) -> bool:
        """True when a database is named."""
        return any((self.postgres_dsn, self.postgres_owner_dsn, self.retrieval_dsn, self.inference_dsn))

    def dsn_for(self, service: str) -> str:
        """Returns what the service reads and writes with."""
        return {"retrieval": self.retrieval_dsn, "inference": self.inference_dsn}.get(service) or self.postgres_dsn

    def owner_dsn_for(self, service: str) -> str:
        """Returns what the service's tables are made with."""
        return {"retrieval": self.retrieval_owner_dsn, "inference": self.inference_owner_dsn}.get(service) or self.postgres_owner_dsn

    def named(self) -> dict[str, str]:
        """Returns the fields as they are stored: those that came later only when there is something in them."""
        return {name: value for name, value in asdict(self).items() if value or name in _ALWAYS_STORED}


# What stood in every stored wish and placement before services had roles of their own: their digests and replicas must go on reading alike.
_ALWAYS_STORED = frozenset({"postgres_dsn", "postgres_owner_dsn", "qdrant_url", "qdrant_api_key"})


@dataclass(frozen=True, slots=True)
class PlacementWish:
    """What place a tenant shall have; empty DSNs of a silo mean that its database is to be made."""

    kind: PlacementKind = PlacementKind.POOL
    silo: SiloStores = field(default_factory=SiloStores, repr=False)


@dataclass(frozen=True, slots=True)
class StoredPlace:
    """One place as it is kept. `made` says that its database is this service's to drop."""

    kind: PlacementKind
    stores: SiloStores = field(default_factory=SiloStores, repr=False)
    made: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tenant lives, where it is moving to if it is, and which services' parts live there already.

    `left_kind` is a place it has left and that is not removed yet.
    """

    place: StoredPlace
    following: StoredPlace | None = None
    moved_services: frozenset[str] = frozenset()
    left_kind: PlacementKind | None = None
    update_time: datetime | None = None

    def place_for(self, service: str) -> StoredPlace:
        """Returns where the service's part lives now."""
        return self.following if self.following is not None and service in self.moved_services else self.place

    def following_for(self, service: str) -> StoredPlace | None:
        """Returns where the service's part is moving to."""
        return None if service in self.moved_services else self.following


POOLED = Placement(StoredPlace(PlacementKind.POOL))
# Raises when a place is not wanted any more. Asked where nothing can be dropped before what follows is made: an answer from before
# that would let a place be made behind its tenant's end.
Refusal = Callable[[], Awaitable[None]]


async def never() -> None:
    """Refuses nothing."""


class PlacementStore(Protocol):
    """Where placements are kept. Every method is one transaction and safe to repeat."""

    async def get(self, tenant_id: TenantId, *, with_stores: bool = True) -> Placement | None:
        """Returns the tenant's placement: the pool for one without a row; None for a tenant that is not there.

        Without the stores no address is opened, whose key may be gone.
        """
        ...

    async def settle(self, tenant_id: TenantId, place: StoredPlace, lease: UUID | None) -> StoredPlace:
        """Writes a new tenant's place unless it has one, and returns the one it has; what tokens say of it changes with it.

        With a lease it raises LeaseLost, and writes nothing, unless that is still the creation's.
        """
        ...


class SchemaMaker(Protocol):
    """Makes and drops bridge schemas in the shared database. Idempotent."""

    async def refuse_full(self) -> None:
        """Raises: WrongState when no further schema may be made, or none can be."""
        ...

    async def make(self, tenant_id: TenantId, refuse_unwanted: Refusal = never) -> None:
        """Makes the schema, without tables. Raises: WrongState when the database is full, what `refuse_unwanted` raises."""
        ...

    async def drop(self, tenant_id: TenantId) -> None:
        """Drops the schema with everything in it."""
        ...


class SiloMaker(Protocol):
    """Makes and drops databases with their roles. Idempotent, and safe to repeat after a crash at any point."""

    async def refuse_absent(self) -> None:
        """Raises: WrongState without a server to make databases on, Unavailable when it does not answer."""
        ...

    def plan(self, tenant_id: TenantId) -> SiloStores:
        """Returns DSNs with new passwords for a database that is not made yet. Raises: WrongState without a server for it."""
        ...

    async def make(self, tenant_id: TenantId, stores: SiloStores, refuse_unwanted: Refusal = never) -> None:
        """Makes database and roles with the planned passwords, without tables. Raises: what `refuse_unwanted` raises."""
        ...

    async def drop(self, tenant_id: TenantId) -> None:
        """Drops database and roles."""
        ...


class Probe(Protocol):
    """Knocks at stores that somebody else made."""

    async def refuse_unreachable(self, stores: SiloStores) -> None:
        """Raises: Unavailable for an address that does not answer, InvalidRequest for a login that it refuses."""
        ...


class Placements:
    """Gives places to tenants and takes them back."""

    def __init__(self, store: PlacementStore, schemas: SchemaMaker, silos: SiloMaker, probe: Probe) -> None:
        self._store = store
        self._schemas = schemas
        self._silos = silos
        self._probe = probe

    async def refuse_impossible(self, wish: PlacementWish) -> None:
        """Refuses a wish that could not be fulfilled. Raises: InvalidRequest, WrongState, Unavailable for stores that do not answer."""
        refuse_malformed(wish)
        match wish.kind:
            case PlacementKind.BRIDGE:
                await self._schemas.refuse_full()
            case PlacementKind.SILO if not wish.silo.has_database:
                await self._silos.refuse_absent()
                await self._probe.refuse_unreachable(wish.silo)
            case PlacementKind.SILO:
                await self._probe.refuse_unreachable(wish.silo)
            case _:
                pass

    async def settle(self, tenant_id: TenantId, wish: PlacementWish, lease: UUID, refuse_unwanted: Refusal = never) -> None:
        """Gives a new tenant its place, empty: each service makes its own tables in it. Idempotent."""
        if wish.kind is PlacementKind.POOL:
            return
        # Written before it is made: a crash in between leaves the passwords known, and the next run makes the rest with them.
        place = await self._store.settle(tenant_id, self.planned(tenant_id, wish), lease)
        await self.make(tenant_id, place, refuse_unwanted)

    def planned(self, tenant_id: TenantId, wish: PlacementWish) -> StoredPlace:
        """Returns the place of a wish; nothing is made yet."""
        made = wish.kind is PlacementKind.SILO and not wish.silo.has_database
        if not made:
            return StoredPlace(wish.kind, wish.silo)
        plan = self._silos.plan(tenant_id)
        stores = replace(plan, qdrant_url=wish.silo.qdrant_url, qdrant_api_key=wish.silo.qdrant_api_key)
        return StoredPlace(wish.kind, stores, made=True)

    async def make(self, tenant_id: TenantId, place: StoredPlace, refuse_unwanted: Refusal = never) -> None:
        """Makes what the place needs, unless it is not wanted any more. Idempotent."""
        if place.kind is PlacementKind.BRIDGE:
            await self._schemas.make(tenant_id, refuse_unwanted)
        elif place.made:
            await self._silos.make(tenant_id, place.stores, refuse_unwanted)

    async def get(self, tenant_id: TenantId) -> Placement | None:
        """Returns where the tenant lives; None when it is gone."""
        return await self._store.get(tenant_id)

    async def drop_schema(self, tenant_id: TenantId) -> None:
        """Drops the schema of a tenant that has moved on from it. Idempotent."""
        await self._schemas.drop(tenant_id)

    async def drop(self, tenant_id: TenantId) -> list[str]:
        """Drops the places of a tenant that ends, once the services have removed what they keep; returns what was dropped. Idempotent."""
        # A repeated call may come after the keys: names and kinds are enough to drop by.
        placement = await self._store.get(tenant_id, with_stores=False) or POOLED
        dropped: list[str] = []
        left = None if placement.left_kind is None else StoredPlace(placement.left_kind)
        for place in (placement.place, placement.following, left):
            if place is not None and place.kind is PlacementKind.BRIDGE:
                await self._schemas.drop(tenant_id)
                dropped.append(f"postgres schema t_{tenant_id.hex}")
            elif place is not None and place.made:
                await self._silos.drop(tenant_id)
                dropped.append(f"postgres database t_{tenant_id.hex}")
        return dropped


def refuse_malformed(wish: PlacementWish) -> None:
    """Refuses stores that fit neither each other nor the kind; never repeats one. Raises: InvalidRequest."""
    silo = wish.silo
    if wish.kind is not PlacementKind.SILO and silo != SiloStores():
        raise InvalidRequest("silo", "is for isolation SILO alone")
    if silo.has_database:
        _refuse_database(silo)
    if silo.qdrant_api_key and not silo.qdrant_url:
        raise InvalidRequest("silo.qdrant_api_key", "comes with silo.qdrant_url")
    if silo.qdrant_url and urlsplit(silo.qdrant_url).scheme not in ("http", "https"):
        raise InvalidRequest("silo.qdrant_url", "must read like https://host:6334")


def _refuse_database(silo: SiloStores) -> None:
    if bool(silo.retrieval_dsn) != bool(silo.inference_dsn):
        raise InvalidRequest("silo.retrieval_postgres_dsn", "comes with silo.inference_postgres_dsn, or neither is given")
    if bool(silo.postgres_dsn) == bool(silo.retrieval_dsn):
        raise InvalidRequest("silo.postgres_dsn", "is given, or one DSN for each service is: not both, and with an owner's not neither")
    if not silo.postgres_owner_dsn:
        raise InvalidRequest("silo.postgres_dsn", "comes with silo.postgres_owner_dsn, or neither is given")
    owner, others = _postgres("silo.postgres_owner_dsn", silo.postgres_owner_dsn), set[str | None]()
    for field_name, dsn in database_dsns(silo).items():
        if field_name == "silo.postgres_owner_dsn":
            continue
        service = _postgres(field_name, dsn)
        if service.username == owner.username:
            raise InvalidRequest(field_name, "must log in as another role than the tables' owner")
        if service.username in others:
            raise InvalidRequest(field_name, "must log in as another role than the other service's")
        if (service.hostname, service.port, service.path) != (owner.hostname, owner.port, owner.path):
            raise InvalidRequest(field_name, "must name the same database as silo.postgres_owner_dsn")
        others.add(service.username)


def database_dsns(silo: SiloStores) -> dict[str, str]:
    """Returns the DSNs that came with a wish, by the field's name on the wire."""
    named = {
        "silo.postgres_owner_dsn": silo.postgres_owner_dsn,
        "silo.postgres_dsn": silo.postgres_dsn,
        "silo.retrieval_postgres_dsn": silo.retrieval_dsn,
        "silo.inference_postgres_dsn": silo.inference_dsn,
    }
    return {field_name: dsn for field_name, dsn in named.items() if dsn}


def _postgres(field_name: str, dsn: str) -> SplitResult:
    try:
        parts = urlsplit(dsn)
        complete = parts.scheme in ("postgresql", "postgres") and parts.hostname and parts.username and parts.path.strip("/")
        _ = parts.port
    except ValueError:
        complete = None
    if not complete:
        raise InvalidRequest(field_name, "must read like postgresql://role:password@host:5432/database")
    return parts


def no_schema_maker() -> WrongState:
    """Builds the refusal of a bridge where none can be made."""
    return WrongState(
        "placement", "NO_BRIDGE", "no schema can be made here: set TENANTRY_POSTGRES_PLACEMENT_DSN at the tenant service, or choose POOL"
    )


def no_silo_server() -> WrongState:
    """Builds the refusal of a silo where none can be made."""
    return WrongState(
        "placement",
        "NO_SILO",
        "no database can be made here: set TENANTRY_SILO_ADMIN_DSN at the tenant service, or give silo.postgres_dsn and its owner's",
    )


def bridge_full(limit: int) -> WrongState:
    """Builds the refusal of one schema too many."""
    return WrongState("placement", "FULL", f"the database holds its {limit} schemas: choose POOL or SILO, or another cell")
