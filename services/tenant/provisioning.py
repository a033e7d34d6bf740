"""How a tenant comes to be: which steps, in which order, how each is done and undone. Refuses to be one request's second tenant.

What was asked for is stored with the request, so a creation that stopped anywhere goes on by itself; `saga` does the going.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Protocol, assert_never
from uuid import UUID

from services.kernel.errors import AlreadyExists, ContentConflict, InvalidRequest, MeshError, NotFound, Unavailable, WrongState
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.request_context import remaining_seconds
from services.kernel.tenant_context import TenantContext
from services.tenant.actor import Actor
from services.tenant.api_key import ApiKeyText, new_api_key
from services.tenant.context_minting import PROVISIONING_SUBJECT, ContextMinter, Grant
from services.tenant.life_ports import DataKeyStore, PlaceKeeper
from services.tenant.plan import PlanDirectory, unknown_plan
from services.tenant.saga import Saga, SagaEngine, SagaKind, SagaState, SagaStore
from services.tenant.scopes import TENANT_SCOPES
from services.tenant.shared_flight import SharedFlight
from services.tenant.tenant_record import DEFAULT_ASSISTANT_NAME, Tenant, TenantDirectory, TenantState
from services.tenant.tenant_remains import RemovedRecords
from services.tenant.tenant_wish import TenantWish, read_wish
from services.tenant.wish_seal import WishSeal

FIRST_KEY_NAME = "First key"
MAX_SLUG_LENGTH = 63
LONGEST_WAIT_SECONDS = 60.0
LOOK_SECONDS = 0.05


class Step(IntEnum):
    """The steps by their stored numbers: append, never renumber. ORDER says which follows which."""

    RECORDED = 1
    DEFAULTS = 2
    RETRIEVAL = 3
    INFERENCE = 4
    RATELIMIT = 5
    METERING = 6
    OWNER = 7
    FIRST_KEY = 8
    ACTIVE = 9
    PLACEMENT = 10


# Defaults come before the services: they ask for the tenant's configuration while they make its place.
# The event is written in the transaction that makes the tenant ACTIVE: neither is ever there without the other.
ORDER = (
    Step.RECORDED,
    Step.PLACEMENT,
    Step.DEFAULTS,
    Step.RETRIEVAL,
    Step.INFERENCE,
    Step.RATELIMIT,
    Step.METERING,
    Step.OWNER,
    Step.FIRST_KEY,
    Step.ACTIVE,
)


class RecordOutcome(Enum):
    """What came of recording a request."""

    RECORDED = "RECORDED"
    EXISTING = "EXISTING"
    ERASED = "ERASED"
    UNKNOWN_PLAN = "UNKNOWN_PLAN"
    SLUG_TAKEN = "SLUG_TAKEN"


@dataclass(frozen=True, slots=True)
class Recorded:
    """What is recorded of a request; tenant and digest are absent for a refusal."""

    outcome: RecordOutcome
    tenant_id: TenantId | None
    content_digest: bytes | None


@dataclass(frozen=True, slots=True, repr=False)
class CreatedTenant:
    """The tenant, and its first key's text; the text is empty once the key was used or revoked. No repr: it holds a secret."""

    tenant: Tenant
    api_key: str


class ProvisioningStore(Protocol):
    """Where each step becomes durable. Every method is one transaction, marks its step and is safe to repeat.

    With a lease it raises LeaseLost, and changes nothing, unless that is still the saga's.
    """

    async def record(
        self, tenant_id: TenantId, request_id: UUID, wish: TenantWish, sealed_stores: str, region: str, actor: Actor
    ) -> Recorded:
        """Claims request id and slug and writes the tenant with its saga, or answers what the request recorded before."""
        ...

    async def take_up(self, tenant_id: TenantId, request_id: UUID, wish: TenantWish, sealed_stores: str, actor: Actor) -> None:
        """Begins the saga of a tenant that was recorded without one; one that is there stays as it is."""
        ...

    async def is_known(self, request_id: UUID) -> bool:
        """Tells whether the request was recorded before."""
        ...

    async def write_defaults(self, tenant_id: TenantId, assistant_name: str, step: Step, lease: UUID) -> None:
        """Writes the settings unless they are there."""
        ...

    async def write_owner(self, tenant_id: TenantId, email: str, step: Step, lease: UUID) -> None:
        """Writes the owner unless there is one."""
        ...

    async def hold(self, tenant_id: TenantId, lease: UUID) -> None:
        """Asks whether the lease still is the saga's."""
        ...

    async def finish_step(self, tenant_id: TenantId, step: Step, lease: UUID) -> None:
        """Notes that the step is done."""
        ...

    async def issue_first_key(
        self,
        tenant_id: TenantId,
        key: ApiKeyText,
        display_name: str,
        scopes: frozenset[str],
        actor: Actor,
        step: Step,
        lease: UUID | None,
    ) -> bool:
        """Stores the key as the first one, in place of an earlier first key that was never used; False when that one stays.

        Without a lease it is for a tenant that is made already.
        """
        ...

    async def activate(self, tenant_id: TenantId, step: Step, lease: UUID) -> None:
        """Lets the tenant be used, tells of it, and ends the saga."""
        ...

    async def undo_step(self, tenant_id: TenantId, step: Step, lease: UUID) -> None:
        """Removes what the step wrote here, if anything, and notes that it is undone."""
        ...

    async def give_up(self, tenant_id: TenantId, step: Step, actor: Actor, lease: UUID) -> None:
        """Makes the tenant FAILED, lets its slug go and ends the saga; the request id stays spent."""
        ...


class LifecyclePeer(Protocol):
    """A service that keeps something for each tenant."""

    async def provision(self, context: TenantContext) -> None:
        """Makes the tenant's place there. Safe to repeat. Raises: MeshError."""
        ...

    async def erase(self, context: TenantContext) -> Sequence[RemovedRecords]:
        """Removes the tenant there. Safe to repeat. Raises: MeshError."""
        ...


class ProvisioningPlan:
    """The steps of a creation, done and undone."""

    def __init__(
        self,
        store: ProvisioningStore,
        directory: TenantDirectory,
        peers: Mapping[Step, tuple[str, LifecyclePeer]],
        places: PlaceKeeper,
        seal: WishSeal,
        data_keys: DataKeyStore,
        minter: ContextMinter,
    ) -> None:
        self._store = store
        self._directory = directory
        self._peers = peers
        self._places = places
        self._seal = seal
        self._data_keys = data_keys
        self._minter = minter
        # Keys made while a caller of this process waits for one. The text is kept nowhere else.
        self._wanted_keys: dict[TenantId, str] = {}

    order: Sequence[int] = ORDER
    can_fail = True

    async def run(self, step: int, saga: Saga) -> None:
        """Does the step and marks it done. Raises: MeshError."""
        tenant_id, lease, wish = saga.tenant_id, saga.lease, read_wish(saga.content)
        match Step(step):
            case Step.RECORDED:
                await self._store.finish_step(tenant_id, Step.RECORDED, lease)
            case Step.PLACEMENT:
                await self._places.settle(tenant_id, await self._seal.open(saga), lease, lambda: self._store.hold(tenant_id, lease))
                await self._store.finish_step(tenant_id, Step.PLACEMENT, lease)
            case Step.DEFAULTS:
                await self._store.write_defaults(tenant_id, wish.assistant_name or DEFAULT_ASSISTANT_NAME, Step.DEFAULTS, lease)
            case Step.RETRIEVAL | Step.INFERENCE | Step.RATELIMIT | Step.METERING as at:
                await self._provision_peer(at, tenant_id, lease)
            case Step.OWNER:
                await self._store.write_owner(tenant_id, wish.owner_email, Step.OWNER, lease)
            case Step.FIRST_KEY:
                text = await self.issue_first_key(tenant_id, wish.plan, saga.actor, lease)
                if tenant_id in self._wanted_keys:
                    self._wanted_keys[tenant_id] = text
            case Step.ACTIVE:
                await self._store.activate(tenant_id, Step.ACTIVE, lease)
            case unknown:
                assert_never(unknown)

    async def undo(self, step: int, saga: Saga) -> None:
        """Undoes the step; the first one last, which ends the saga. Raises: MeshError."""
        match Step(step):
            case Step.RETRIEVAL | Step.INFERENCE | Step.RATELIMIT | Step.METERING as at:
                await self._peers[at][1].erase(await self._context(saga.tenant_id))
            case Step.PLACEMENT:
                # The keys go with the place: whatever was sealed for the tenant is gone by now.
                await self._places.drop(saga.tenant_id)
                await self._data_keys.destroy(saga.tenant_id)
            case Step.RECORDED:
                await self._store.give_up(saga.tenant_id, Step.RECORDED, saga.actor, saga.lease)
                return
            case Step.DEFAULTS | Step.OWNER | Step.FIRST_KEY | Step.ACTIVE:
                pass
            case unknown:
                assert_never(unknown)
        await self._store.undo_step(saga.tenant_id, Step(step), saga.lease)

    @contextmanager
    def wanting_key(self, tenant_id: TenantId) -> Iterator[Callable[[], str]]:
        """Keeps the text of a first key that is made while the block runs; the yielded function returns it, empty when none was."""
        self._wanted_keys[tenant_id] = ""
        try:
            yield lambda: self._wanted_keys.get(tenant_id, "")
        finally:
            self._wanted_keys.pop(tenant_id, None)

    async def issue_first_key(self, tenant_id: TenantId, plan: str, actor: Actor, lease: UUID | None = None) -> str:
        """Returns the first key's text, in place of one that was never used; empty when the first key stays."""
        key = new_api_key(plan)
        issued = await self._store.issue_first_key(tenant_id, key, FIRST_KEY_NAME, TENANT_SCOPES, actor, Step.FIRST_KEY, lease)
        return str(key) if issued else ""

    async def _provision_peer(self, step: Step, tenant_id: TenantId, lease: UUID) -> None:
        name, peer = self._peers[step]
        context = await self._context(tenant_id)
        try:
            await peer.provision(context)
        except MeshError as error:
            # Its own words would name a call the caller did not make; the engine looks at what stands behind ours.
            raise Unavailable(name, f"{name} could not make the tenant's place; repeat the call with the same request id") from error
        await self._store.finish_step(tenant_id, step, lease)

    async def _context(self, tenant_id: TenantId) -> TenantContext:
        facts = await self._directory.get_facts(tenant_id)
        if facts is None:
            raise NotFound("tenant")
        return self._minter.mint(Grant(tenant_id, facts, PROVISIONING_SUBJECT, frozenset()))


class TenantProvisioning:
    """Makes tenants. Calls of one request in this process share one run and its answer."""

    def __init__(
        self,
        store: ProvisioningStore,
        sagas: SagaStore,
        plan: ProvisioningPlan,
        engine: SagaEngine,
        directory: TenantDirectory,
        plans: PlanDirectory,
        places: PlaceKeeper,
        seal: WishSeal,
        *,
        region: str,
    ) -> None:
        self._store = store
        self._sagas = sagas
        self._plan = plan
        self._engine = engine
        self._directory = directory
        self._plans = plans
        self._places = places
        self._seal = seal
        self._region = region
        self._runs: SharedFlight[tuple[UUID, bytes], CreatedTenant] = SharedFlight()

    async def create(self, request_id: UUID, wish: TenantWish, actor: Actor) -> CreatedTenant:
        """Makes the tenant and returns it once it is ready; what is begun goes on without the caller.

        Raises: AlreadyExists for a taken slug, ContentConflict for a request id used with other content, NotFound for an unknown plan,
        WrongState when the tenant of this request was erased or could not be made, Unavailable when a service cannot be reached.
        """
        if len(wish.slug) > MAX_SLUG_LENGTH:
            raise InvalidRequest("slug", f"must have at most {MAX_SLUG_LENGTH} characters")
        return await self._runs.run((request_id, wish.digest()), lambda: self._create(request_id, wish, actor))

    async def _create(self, request_id: UUID, wish: TenantWish, actor: Actor) -> CreatedTenant:
        known = await self._store.is_known(request_id)
        if not known:
            await self._refuse_unoffered(wish)
            await self._places.refuse_impossible(wish.placement)
        tenant_id = _accepted(await self._record(request_id, wish, actor, sealing=not known), wish)
        with self._plan.wanting_key(tenant_id) as issued:
            await self._until_done(tenant_id, request_id, wish, actor)
            tenant = await self._ready(tenant_id)
            # Looked at in every run: an answer that never arrived took the key's text with it.
            api_key = issued() or await self._plan.issue_first_key(tenant_id, wish.plan, actor)
        return CreatedTenant(tenant, api_key)

    async def _ready(self, tenant_id: TenantId) -> Tenant:
        tenant = await self._directory.get_tenant(tenant_id)
        if tenant is None:
            raise NotFound("tenant")
        if tenant.state not in (TenantState.ACTIVE, TenantState.SUSPENDED):
            raise WrongState("tenant", tenant.state, f"the tenant of this request is {tenant.state}; use a new request id to make another")
        return tenant

    async def _refuse_unoffered(self, wish: TenantWish) -> None:
        for plan in await self._plans.list_plans():
            if plan.name == wish.plan and wish.placement.kind not in plan.isolation:
                kind = wish.placement.kind.upper()
                raise WrongState("plan", kind, f"the plan {plan.name} offers {', '.join(plan.isolation)}; choose one, or another plan")

    async def _record(self, request_id: UUID, wish: TenantWish, actor: Actor, *, sealing: bool) -> Recorded:
        tenant_id = TenantId(new_uuid7())
        # What is recorded already has its addresses: a repeat makes no keys for a tenant that will never be.
        sealed_stores = await self._seal.seal_before_record(tenant_id, wish) if sealing else ""
        recorded = await self._store.record(tenant_id, request_id, wish, sealed_stores, self._region, actor)
        if sealed_stores and recorded.tenant_id != tenant_id:
            await self._seal.drop(tenant_id)
        return recorded

    async def _take_up(self, tenant_id: TenantId, request_id: UUID, wish: TenantWish, actor: Actor) -> bool:
        tenant = await self._directory.get_tenant(tenant_id)
        if tenant is None or tenant.state is not TenantState.PROVISIONING:
            return False
        # Recorded before creations were sagas, by a caller who gave up: this one says again what is wanted.
        await self._store.take_up(tenant_id, request_id, wish, await self._seal.seal(tenant_id, wish), actor)
        return True

    async def _until_done(self, tenant_id: TenantId, request_id: UUID, wish: TenantWish, actor: Actor) -> None:
        give_up_at = time.monotonic() + remaining_seconds(LONGEST_WAIT_SECONDS)
        while True:
            saga = await self._sagas.load(tenant_id, SagaKind.PROVISION)
            if saga is None and await self._take_up(tenant_id, request_id, wish, actor):
                continue
            if saga is None or saga.state is SagaState.DONE:
                return
            if saga.state is not SagaState.RUNNING:
                raise WrongState("tenant", saga.state, f"the tenant could not be made ({saga.cause}); use a new request id to try again")
            if not await self._attempt(tenant_id):
                if time.monotonic() >= give_up_at:
                    raise Unavailable("tenant", "the tenant is still being made; repeat the call with the same request id")
                await asyncio.sleep(LOOK_SECONDS)

    async def _attempt(self, tenant_id: TenantId) -> bool:
        try:
            return await self._engine.run(tenant_id, SagaKind.PROVISION)
        except MeshError:
            saga = await self._sagas.load(tenant_id, SagaKind.PROVISION)
            if saga is not None and saga.state is not SagaState.RUNNING:
                # It failed for good: the next look says so, which tells the caller more than the step's own words.
                return True
            raise


def _accepted(recorded: Recorded, wish: TenantWish) -> TenantId:
    match recorded.outcome:
        case RecordOutcome.UNKNOWN_PLAN:
            raise unknown_plan()
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
