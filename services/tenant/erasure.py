"""The end of a tenant: which steps, in which order, and the receipt. Refuses to turn back, and to call gone what it did not look for."""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import Protocol, assert_never
from uuid import UUID

from services.kernel.context_token import SigningKey
from services.kernel.errors import ContentConflict, InvalidRequest, NotFound, Unavailable, WrongState
from services.kernel.ids import TenantId
from services.kernel.request_context import remaining_seconds
from services.kernel.tenant_context import TenantContext
from services.kernel.tenant_scan import ScannedStore
from services.tenant.actor import Actor
from services.tenant.context_minting import PROVISIONING_SUBJECT, ContextMinter, Grant
from services.tenant.life_ports import DataKeyStore, PlaceKeeper
from services.tenant.receipt import ErasureReceipt, sign_receipt
from services.tenant.saga import Saga, SagaEngine, SagaKind, SagaState, SagaStore
from services.tenant.tenant_record import TenantState
from services.tenant.tenant_remains import KeyRecords, RemovedRecords

LONGEST_WAIT_SECONDS = 60.0
LOOK_SECONDS = 0.05
DATA_KEYS = "key_store:tenant_keys.data_keys"


class EraseStep(IntEnum):
    """The steps by their stored numbers: append, never renumber. ERASE_ORDER says which follows which."""

    CLOSED = 1
    KEYS_DEAD = 2
    INVENTORY = 3
    INFERENCE = 4
    RETRIEVAL = 5
    METERING = 6
    RATELIMIT = 7
    PLACEMENT = 8
    DATA_KEYS = 9
    OWN_RECORDS = 10
    VERIFIED = 11
    RECEIPT = 12


# Metering before ratelimit: what its outbox still tells the limits is told to a tenant that is there, and what comes later finds the
# limits' tombstone. The data keys go after the data they seal, so that a repeated step can still count what it removes.
ERASE_ORDER = tuple(EraseStep)


@dataclass(frozen=True, slots=True, repr=False)
class ErasureWish:
    """What to erase. No repr: canaries are the tenant's own data."""

    tenant_id: TenantId
    request_id: UUID
    confirm_slug: str
    canaries: tuple[str, ...]

    def digest(self) -> bytes:
        """Returns the SHA-256 of the content: a repeated request must have the same."""
        content = [str(self.tenant_id), self.confirm_slug, *self.canaries]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).digest()


class ErasureStore(Protocol):
    """The tenant service's own part, step by step. Every method is one transaction and safe to repeat.

    With a lease it raises LeaseLost, and changes nothing, unless that is still the saga's.
    """

    async def begin(self, wish: ErasureWish, actor: Actor) -> TenantState | None:
        """Makes the tenant ERASING with its saga if it is ACTIVE, SUSPENDED or FAILED and the slug is right.

        Returns the state it found, None for no such tenant; nothing is written in any other state. Raises: InvalidRequest for another slug.
        """
        ...

    async def finish_step(self, tenant_id: TenantId, step: EraseStep, detail: str, lease: UUID) -> None:
        """Notes that the step is done, and what it found."""
        ...

    async def revoke_keys(self, tenant_id: TenantId, step: EraseStep, actor: Actor, lease: UUID) -> None:
        """Revokes every key, durably."""
        ...

    async def remove_own(self, tenant_id: TenantId, step: EraseStep, actor: Actor, lease: UUID) -> None:
        """Removes the records, and notes how many."""
        ...

    async def keep_receipt(self, tenant_id: TenantId, request_id: UUID, receipt: ErasureReceipt, step: EraseStep, lease: UUID) -> None:
        """Stores the receipt, tells of the erasure and ends the saga."""
        ...

    async def receipt(self, tenant_id: TenantId) -> ErasureReceipt | None:
        """Returns the receipt."""
        ...

    async def scan(self, tenant_id: TenantId, canaries: Sequence[str]) -> Sequence[ScannedStore]:
        """Looks through this service's own tables."""
        ...


class ErasurePeer(Protocol):
    """A service that holds something of tenants."""

    async def erase(self, context: TenantContext) -> Sequence[RemovedRecords]:
        """Removes the tenant there. Raises: MeshError."""
        ...

    async def scan(self, context: TenantContext, canaries: Sequence[str]) -> Sequence[ScannedStore]:
        """Looks for what is left there. Raises: MeshError."""
        ...


class ErasurePlan:
    """The steps of an erasure. It never turns back: what cannot be done now is tried until it can."""

    order: Sequence[int] = ERASE_ORDER
    can_fail = False

    def __init__(
        self,
        store: ErasureStore,
        sagas: SagaStore,
        peers: Mapping[EraseStep, ErasurePeer],
        places: PlaceKeeper,
        data_keys: DataKeyStore,
        key_records: KeyRecords,
        minter: ContextMinter,
        signing_key: SigningKey,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._sagas = sagas
        self._peers = peers
        self._places = places
        self._data_keys = data_keys
        self._key_records = key_records
        self._minter = minter
        self._signing_key = signing_key
        self._clock = clock

    async def run(self, step: int, saga: Saga) -> None:
        """Does the step and marks it done. Raises: MeshError."""
        tenant_id, at, lease = saga.tenant_id, EraseStep(step), saga.lease
        match at:
            case EraseStep.CLOSED:
                await self._store.finish_step(tenant_id, at, "[]", lease)
            case EraseStep.KEYS_DEAD:
                await self._store.revoke_keys(tenant_id, at, saga.actor, lease)
            case EraseStep.INVENTORY:
                await self._store.finish_step(tenant_id, at, _json(await self.scan(tenant_id, ())), lease)
            case EraseStep.INFERENCE | EraseStep.RETRIEVAL | EraseStep.METERING | EraseStep.RATELIMIT:
                await self._store.finish_step(tenant_id, at, _json(await self._peers[at].erase(self._context(tenant_id))), lease)
            case EraseStep.PLACEMENT:
                await self._store.finish_step(
                    tenant_id, at, _json([RemovedRecords(name, 1) for name in await self._places.drop(tenant_id)]), lease
                )
            case EraseStep.DATA_KEYS:
                destroyed = await self._data_keys.destroy(tenant_id)
                await self._key_records.note(tenant_id, "DATA_KEY_DESTROYED", "data_key:all", saga.actor)
                await self._store.finish_step(tenant_id, at, _json([RemovedRecords(DATA_KEYS, destroyed)]), lease)
            case EraseStep.OWN_RECORDS:
                await self._store.remove_own(tenant_id, at, saga.actor, lease)
            case EraseStep.VERIFIED:
                await self._store.finish_step(tenant_id, at, _json(await self._verify(tenant_id, _canaries(saga))), lease)
            case EraseStep.RECEIPT:
                await self._sign(saga)
            case _:
                assert_never(at)

    async def undo(self, step: int, saga: Saga) -> None:
        """Never called: an erasure does not turn back."""

    async def scan(self, tenant_id: TenantId, canaries: Sequence[str]) -> list[ScannedStore]:
        """Looks through every store of all five services. Raises: MeshError."""
        found = list(await self._store.scan(tenant_id, canaries))
        for peer in self._peers.values():
            found += await peer.scan(self._context(tenant_id), canaries)
        return found

    async def _verify(self, tenant_id: TenantId, canaries: Sequence[str]) -> list[ScannedStore]:
        found = await self.scan(tenant_id, canaries)
        if is_clean(found):
            return found
        # A writer that was faster than its tombstone: once more, and then it is told as it is.
        for peer in self._peers.values():
            await peer.erase(self._context(tenant_id))
        return await self.scan(tenant_id, canaries)

    async def _sign(self, saga: Saga) -> None:
        # Read again: the saga in hand was taken before these steps were done.
        fresh = await self._sagas.load(saga.tenant_id, SagaKind.ERASE)
        if fresh is None:
            raise NotFound("tenant")
        details = {EraseStep(number): json.loads(record.detail) for number, record in fresh.steps.items()}
        verification = [ScannedStore(**item) for item in details[EraseStep.VERIFIED]]
        statement = {
            "statement": "erasure of a tenant",
            "tenant_id": str(saga.tenant_id),
            "request_id": str(saga.request_id),
            "begin_time": _stamp(saga.create_time),
            "end_time": _stamp(self._clock()),
            "found": [{"store": item["store"], "count": item["found"]} for item in details[EraseStep.INVENTORY] if item["found"]],
            "removed": [
                {"service": step.name.lower(), "store": item["kind"], "count": item["count"]}
                for step in (*self._peers, EraseStep.PLACEMENT, EraseStep.DATA_KEYS, EraseStep.OWN_RECORDS)
                for item in details[step]
            ],
            "verification": {
                "verified": is_clean(verification),
                "stores": [asdict(item) for item in verification],
                "canary_sha256": [hashlib.sha256(text.encode()).hexdigest() for text in _canaries(saga)],
            },
        }
        receipt = sign_receipt(statement, self._signing_key)
        await self._store.keep_receipt(saga.tenant_id, saga.request_id, receipt, EraseStep.RECEIPT, saga.lease)

    def _context(self, tenant_id: TenantId) -> TenantContext:
        # Minted without facts: in the later steps the tenant's record is gone, and nothing here depends on its plan.
        return self._minter.mint(Grant(tenant_id, None, PROVISIONING_SUBJECT, frozenset()))


class TenantErasure:
    """Erases tenants, and says later what came of it."""

    def __init__(self, store: ErasureStore, sagas: SagaStore, plan: ErasurePlan, engine: SagaEngine) -> None:
        self._store = store
        self._sagas = sagas
        self._plan = plan
        self._engine = engine

    async def erase(self, wish: ErasureWish, actor: Actor) -> ErasureReceipt:
        """Erases the tenant and returns the receipt; what is begun goes on without the caller.

        Raises: NotFound, InvalidRequest(confirm_slug), WrongState while it is being made, ContentConflict for another request's erasure,
        Unavailable when a service cannot be reached.
        """
        saga = await self._sagas.load(wish.tenant_id, SagaKind.ERASE)
        if saga is None and (kept := await self._store.receipt(wish.tenant_id)) is not None:
            # Longer ago than sagas are kept; receipts are kept for ever.
            if json.loads(kept.body)["request_id"] != str(wish.request_id):
                raise _another_erases()
            return kept
        if saga is None:
            await self._begin(wish, actor)
            saga = await self._sagas.load(wish.tenant_id, SagaKind.ERASE)
        if saga is None:
            raise NotFound("tenant")
        if (saga.request_id, saga.content_digest) != (wish.request_id, wish.digest()):
            raise _another_erases()
        return await self._until_done(wish.tenant_id)

    async def receipt(self, tenant_id: TenantId) -> ErasureReceipt:
        """Returns the receipt. Raises: NotFound."""
        receipt = await self._store.receipt(tenant_id)
        if receipt is None:
            raise NotFound("receipt")
        return receipt

    async def verify(self, tenant_id: TenantId, canaries: Sequence[str]) -> list[ScannedStore]:
        """Looks again. Raises: NotFound when the tenant was never erased."""
        await self.receipt(tenant_id)
        return await self._plan.scan(tenant_id, canaries)

    async def _begin(self, wish: ErasureWish, actor: Actor) -> None:
        state = await self._store.begin(wish, actor)
        if state is None:
            raise NotFound("tenant")
        if state is TenantState.PROVISIONING:
            raise WrongState("tenant", state, "the tenant is still being made; erase it once that has ended")

    async def _until_done(self, tenant_id: TenantId) -> ErasureReceipt:
        give_up_at = time.monotonic() + remaining_seconds(LONGEST_WAIT_SECONDS)
        while True:
            saga = await self._sagas.load(tenant_id, SagaKind.ERASE)
            if saga is not None and saga.state is SagaState.DONE:
                return await self.receipt(tenant_id)
            if not await self._engine.run(tenant_id, SagaKind.ERASE):
                if time.monotonic() >= give_up_at:
                    raise Unavailable("tenant", "the erasure goes on; repeat the call for its receipt")
                await asyncio.sleep(LOOK_SECONDS)


def is_clean(found: Sequence[ScannedStore]) -> bool:
    """Tells whether nothing is left that should not be: no id outside of what is kept on purpose, and no canary anywhere."""
    return all((item.kept or item.found == 0) and item.canaries == 0 for item in found)


def slug_refused() -> InvalidRequest:
    """The refusal of an erasure whose slug is not the tenant's."""
    return InvalidRequest("confirm_slug", "is not the slug of this tenant; nothing was erased")


def _another_erases() -> ContentConflict:
    return ContentConflict("erasure", "another request erases this tenant; ask GetErasureReceipt for its receipt")


def _canaries(saga: Saga) -> list[str]:
    return list(json.loads(saga.content.get("canaries", "[]")))


def _json(items: Sequence[RemovedRecords] | Sequence[ScannedStore]) -> str:
    return json.dumps([asdict(item) for item in items])


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
