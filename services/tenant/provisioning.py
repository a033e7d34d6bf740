"""How a tenant comes to be: step by step, each durable before the next, each safe to repeat. Refuses to be one request's second tenant.

A creation that stopped anywhere goes on where it stopped when it is asked for again with the same request id and content.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum, IntEnum
from typing import Protocol, assert_never
from uuid import UUID

from services.kernel.errors import AlreadyExists, ContentConflict, InvalidRequest, MeshError, NotFound, Unavailable, WrongState
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.tenant_context import TenantContext
from services.tenant.actor import Actor
from services.tenant.api_key import ApiKeyText, new_api_key
from services.tenant.context_minting import PROVISIONING_SUBJECT, ContextMinter, Grant
from services.tenant.placement import PlacementWish
from services.tenant.scopes import TENANT_SCOPES
from services.tenant.shared_flight import SharedFlight
from services.tenant.tenant_record import DEFAULT_ASSISTANT_NAME, Tenant, TenantDirectory

FIRST_KEY_NAME = "First key"
MAX_SLUG_LENGTH = 63


class Step(IntEnum):
    """The steps in order; the number is how many are done once it is. Numbers are stored: append, never renumber.

    Defaults come before the services: they ask for the tenant's configuration while they make its place.
    """

    RECORDED = 1
    DEFAULTS = 2
    RETRIEVAL = 3
    INFERENCE = 4
    RATELIMIT = 5
    METERING = 6
    OWNER = 7
    FIRST_KEY = 8
    ACTIVE = 9


@dataclass(frozen=True, slots=True)
class TenantWish:
    """What tenant to make."""

    slug: str
    display_name: str
    plan: str
    owner_email: str
    assistant_name: str
    placement: PlacementWish = field(default_factory=PlacementWish)

    def digest(self) -> bytes:
        """Returns the SHA-256 of the content: a repeated request must have the same."""
        content = asdict(self)
        if self.placement == PlacementWish():
            # A wish that says nothing of its place has the digest it had before places could be chosen.
            del content["placement"]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).digest()


class RecordOutcome(Enum):
    """What came of recording a request."""

    RECORDED = "RECORDED"
    EXISTING = "EXISTING"
    ERASED = "ERASED"
    UNKNOWN_PLAN = "UNKNOWN_PLAN"
    SLUG_TAKEN = "SLUG_TAKEN"


@dataclass(frozen=True, slots=True)
class Recorded:
    """What is recorded of a request; tenant, digest and steps are absent for a refusal."""

    outcome: RecordOutcome
    tenant_id: TenantId | None
    content_digest: bytes | None
    steps_done: int


@dataclass(frozen=True, slots=True, repr=False)
class CreatedTenant:
    """The tenant, and its first key's text; the text is empty once the key was used or revoked. No repr: it holds a secret."""

    tenant: Tenant
    api_key: str


class ProvisioningStore(Protocol):
    """Where each step becomes durable. Every method is one transaction and safe to repeat."""

    async def record(self, tenant_id: TenantId, request_id: UUID, wish: TenantWish, region: str, actor: Actor) -> Recorded:
        """Claims request id and slug and writes the tenant, or answers what the request recorded before."""
        ...

    async def is_known(self, request_id: UUID) -> bool:
        """Tells whether the request was recorded before."""
        ...

    async def write_defaults(self, tenant_id: TenantId, assistant_name: str, step: Step) -> None:
        """Writes the settings unless they are there."""
        ...

    async def write_owner(self, tenant_id: TenantId, email: str, step: Step) -> None:
        """Writes the owner unless there is one."""
        ...

    async def finish_step(self, tenant_id: TenantId, step: Step) -> None:
        """Notes that the step is done."""
        ...

    async def issue_first_key(
        self, tenant_id: TenantId, key: ApiKeyText, display_name: str, scopes: frozenset[str], actor: Actor, step: Step
    ) -> bool:
        """Stores the key as the first one, in place of an earlier first key that was never used; False when that one stays."""
        ...

    async def activate(self, tenant_id: TenantId, step: Step) -> None:
        """Lets the tenant be used."""
        ...


class PlaceGiver(Protocol):
    """Where the tenant's content gets a place, before the services make their tables in it."""

    async def refuse_impossible(self, wish: PlacementWish) -> None:
        """Refuses a wish that could not be fulfilled, before anything is recorded. Raises: InvalidRequest, WrongState."""
        ...

    async def settle(self, tenant_id: TenantId, wish: PlacementWish) -> None:
        """Makes the tenant's schema or database, empty. Safe to repeat. Raises: MeshError."""
        ...


class LifecyclePeer(Protocol):
    """A service that keeps something for each tenant."""

    async def provision(self, context: TenantContext) -> None:
        """Makes the tenant's place there. Safe to repeat. Raises: MeshError."""
        ...


class TenantProvisioning:
    """Makes tenants. Calls of one request in this process share one run and its answer."""

    def __init__(
        self,
        store: ProvisioningStore,
        directory: TenantDirectory,
        peers: Mapping[Step, tuple[str, LifecyclePeer]],
        minter: ContextMinter,
        places: PlaceGiver,
        *,
        region: str,
    ) -> None:
        self._store = store
        self._directory = directory
        self._peers = peers
        self._minter = minter
        self._places = places
        self._region = region
        self._runs: SharedFlight[tuple[UUID, bytes], CreatedTenant] = SharedFlight()

    async def create(self, request_id: UUID, wish: TenantWish, actor: Actor) -> CreatedTenant:
        """Makes the tenant and returns it once it is ready.

        Raises: AlreadyExists for a taken slug, ContentConflict for a request id used with other content, NotFound for an unknown plan,
        WrongState when the tenant of this request was erased or its place cannot be made, Unavailable when a service cannot be reached:
        repeat the call.
        """
        if len(wish.slug) > MAX_SLUG_LENGTH:
            raise InvalidRequest("slug", f"must have at most {MAX_SLUG_LENGTH} characters")
        return await self._runs.run((request_id, wish.digest()), lambda: self._create(request_id, wish, actor))

    async def _create(self, request_id: UUID, wish: TenantWish, actor: Actor) -> CreatedTenant:
        if not await self._store.is_known(request_id):
            await self._places.refuse_impossible(wish.placement)
        recorded = await self._store.record(TenantId(new_uuid7()), request_id, wish, self._region, actor)
        tenant_id = _accepted(recorded, wish)
        api_key = ""
        for step in Step:
            # The first key is looked at in every run: an answer that never arrived took the key's text with it.
            if step > recorded.steps_done or step is Step.FIRST_KEY:
                api_key = await self._run_step(step, tenant_id, wish, actor) or api_key
        tenant = await self._directory.get_tenant(tenant_id)
        if tenant is None:
            raise NotFound("tenant")
        return CreatedTenant(tenant, api_key)

    async def _run_step(self, step: Step, tenant_id: TenantId, wish: TenantWish, actor: Actor) -> str:
        match step:
            case Step.RECORDED:
                pass
            case Step.DEFAULTS:
                # With the defaults and not a step of its own: stored step numbers stay, and the services come after it.
                await self._places.settle(tenant_id, wish.placement)
                await self._store.write_defaults(tenant_id, wish.assistant_name or DEFAULT_ASSISTANT_NAME, step)
            case Step.RETRIEVAL | Step.INFERENCE | Step.RATELIMIT | Step.METERING:
                await self._provision_peer(step, tenant_id)
            case Step.OWNER:
                await self._store.write_owner(tenant_id, wish.owner_email, step)
            case Step.FIRST_KEY:
                return await self._issue_first_key(step, tenant_id, wish, actor)
            case Step.ACTIVE:
                await self._store.activate(tenant_id, step)
            case _:
                assert_never(step)
        return ""

    async def _provision_peer(self, step: Step, tenant_id: TenantId) -> None:
        name, peer = self._peers[step]
        facts = await self._directory.get_facts(tenant_id)
        if facts is None:
            raise NotFound("tenant")
        context = self._minter.mint(Grant(tenant_id, facts, PROVISIONING_SUBJECT, frozenset()))
        try:
            await peer.provision(context)
        except MeshError as error:
            # Whatever a service answered, the caller's next step is one: repeat. Its own words would name a call the caller did not make.
            raise Unavailable(name, f"{name} could not make the tenant's place; repeat the call with the same request id") from error
        await self._store.finish_step(tenant_id, step)

    async def _issue_first_key(self, step: Step, tenant_id: TenantId, wish: TenantWish, actor: Actor) -> str:
        key = new_api_key(wish.plan)
        issued = await self._store.issue_first_key(tenant_id, key, FIRST_KEY_NAME, TENANT_SCOPES, actor, step)
        return str(key) if issued else ""


def _accepted(recorded: Recorded, wish: TenantWish) -> TenantId:
    match recorded.outcome:
        case RecordOutcome.UNKNOWN_PLAN:
            raise NotFound("plan")
        case RecordOutcome.SLUG_TAKEN:
            raise AlreadyExists("tenant", "slug", f"the slug {wish.slug} is taken; choose another")
        case RecordOutcome.ERASED:
            raise WrongState("tenant", "ERASED", "the tenant this request made was erased; use a new request id to make another")
        case RecordOutcome.RECORDED | RecordOutcome.EXISTING:
            if recorded.tenant_id is None or recorded.content_digest != wish.digest():
                raise ContentConflict("tenant", "this request id was used with other content; use a new one")
            return recorded.tenant_id
        case _:
            assert_never(recorded.outcome)
