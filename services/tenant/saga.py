"""A saga: steps in an order, each durable before the next, run by one replica at a time, ended by whoever is alive.

Refuses to stop half-way: what fails for now is tried again, what fails for good is undone in reverse. A plan says what the steps are.
A lease is also a fence: every transaction that records something of a saga refuses who does not hold the lease any more, so that a
replica which slept through its lease changes nothing when it wakes.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Protocol
from uuid import UUID, uuid4

import structlog

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import MeshError, Unavailable, reason_name
from services.kernel.ids import TenantId
from services.tenant.actor import Actor

log = structlog.get_logger(__name__)

MAX_ATTEMPTS = 20
# The lease of a saga that was read and not taken: nobody's, so nothing can be recorded with it.
NO_LEASE = UUID(int=0)
_FIRST_PAUSE_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 60.0
# Status codes that a repetition cannot change. A refused identity is none of them: it is a fault of the deployment, which people mend.
_FOR_GOOD = frozenset({"INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE", "UNIMPLEMENTED", "ALREADY_EXISTS"})


class SagaKind(StrEnum):
    """Which saga of a tenant's life."""

    PROVISION = "PROVISION"
    ERASE = "ERASE"


class SagaState(StrEnum):
    """Where a saga is. DONE and FAILED are its ends."""

    RUNNING = "RUNNING"
    COMPENSATING = "COMPENSATING"
    DONE = "DONE"
    FAILED = "FAILED"

    @property
    def is_end(self) -> bool:
        """True when nothing is left to do."""
        return self in (SagaState.DONE, SagaState.FAILED)


class StepState(StrEnum):
    """Where a step is; one that has not begun has no record."""

    BEGUN = "BEGUN"
    DONE = "DONE"
    UNDONE = "UNDONE"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step as it is kept; `detail` is JSON that the plan wrote."""

    step: int
    state: StepState
    begin_time: datetime
    end_time: datetime | None
    detail: str


@dataclass(frozen=True, slots=True, repr=False)
class Saga:
    """A saga as it is kept. `content` is what was asked for, empty once ended. No repr: it holds a mail address.

    `lease` is that of this attempt: a new one each time the saga is taken, and never used again.
    """

    tenant_id: TenantId
    kind: SagaKind
    request_id: UUID
    content_digest: bytes
    state: SagaState
    content: Mapping[str, str]
    actor: Actor
    cause: str
    attempts: int
    create_time: datetime
    steps: Mapping[int, StepRecord]
    lease: UUID = NO_LEASE

    def is_in(self, step: int, *states: StepState) -> bool:
        """Tells whether a step is in one of the states."""
        record = self.steps.get(step)
        return record is not None and record.state in states


class LeaseLost(Unavailable):
    """Another has taken the saga over, or ended it; nothing was recorded."""

    def __init__(self) -> None:
        super().__init__("tenant", "another replica goes on with this; repeat the call with the same request id")


class SagaStore(Protocol):
    """Where sagas are kept. Every method is one transaction."""

    async def load(self, tenant_id: TenantId, kind: SagaKind) -> Saga | None:
        """Returns the saga with its steps."""
        ...

    async def take(self, tenant_id: TenantId, kind: SagaKind, lease: UUID, lease_seconds: float) -> Saga | None:
        """Takes the lease of a saga that has not ended; None when it has, or another holds it."""
        ...

    async def renew(self, tenant_id: TenantId, kind: SagaKind, lease: UUID, lease_seconds: float) -> bool:
        """Prolongs the lease; False when it is another's by now."""
        ...

    async def release(self, tenant_id: TenantId, kind: SagaKind, lease: UUID) -> None:
        """Gives the lease back, if it is still this one."""
        ...

    async def begin_step(self, tenant_id: TenantId, kind: SagaKind, step: int, lease: UUID) -> None:
        """Notes that the step begins. Raises: LeaseLost."""
        ...

    async def put_off(self, tenant_id: TenantId, kind: SagaKind, cause: str, pause_seconds: float, lease: UUID) -> None:
        """Notes why an attempt stopped and when the next is due, unless it is another's by now."""
        ...

    async def turn_back(self, tenant_id: TenantId, kind: SagaKind, cause: str, lease: UUID) -> None:
        """Makes a running saga COMPENSATING. Raises: LeaseLost."""
        ...


class DueSagas(Protocol):
    """Sagas of all tenants that wait for somebody."""

    async def due(self, limit: int) -> Sequence[tuple[TenantId, SagaKind]]:
        """Returns sagas that have not ended, are due and that nobody holds."""
        ...


class SagaPlan(Protocol):
    """What a kind of saga does. Steps mark themselves done in the transaction of what they do, under the saga's lease."""

    @property
    def order(self) -> Sequence[int]:
        """The steps in order, by their stored numbers."""
        ...

    @property
    def can_fail(self) -> bool:
        """False for a saga that never turns back."""
        ...

    async def run(self, step: int, saga: Saga) -> None:
        """Does the step and marks it done. Safe to repeat. Raises: MeshError."""
        ...

    async def undo(self, step: int, saga: Saga) -> None:
        """Undoes the step, begun or done, and marks it undone. Safe to repeat. Raises: MeshError."""
        ...


class SagaEngine:
    """Runs sagas to their end, one attempt a call."""

    def __init__(self, store: SagaStore, plans: Mapping[SagaKind, SagaPlan], *, lease_seconds: float, max_attempts: int) -> None:
        self._store = store
        self._plans = plans
        self._lease_seconds = lease_seconds
        self._max_attempts = max_attempts

    async def run(self, tenant_id: TenantId, kind: SagaKind) -> bool:
        """Makes one attempt; False when the saga has ended before, or another replica has it.

        Raises: what the step that stopped it raised, once that is noted and the next attempt is due.
        """
        saga = await self._store.take(tenant_id, kind, uuid4(), self._lease_seconds)
        if saga is None:
            return False
        async with self._held(saga) as attempt:
            try:
                attempt.failure = await self._attempt(saga)
            except LeaseLost as lost:
                attempt.failure = lost
        if isinstance(attempt.failure, LeaseLost):
            log.warning("saga_lease_lost", tenant_id=str(tenant_id), kind=kind)
            return False
        if attempt.failure is not None:
            raise attempt.failure
        return True

    async def _attempt(self, saga: Saga) -> Exception | None:
        plan = self._plans[saga.kind]
        try:
            if saga.state is SagaState.RUNNING:
                failure = await self._go_on(plan, saga)
                if failure is None or not await self._turns_back(plan, saga, failure):
                    return failure
                saga = replace(await self._store.load(saga.tenant_id, saga.kind) or saga, lease=saga.lease)
                await self._go_back(plan, saga)
                return failure
            await self._go_back(plan, saga)
        except LeaseLost:
            raise
        except Exception as error:
            await self._put_off(saga, error)
            return error
        return None

    async def _go_on(self, plan: SagaPlan, saga: Saga) -> Exception | None:
        for step in plan.order:
            if saga.is_in(step, StepState.DONE):
                continue
            try:
                await self._store.begin_step(saga.tenant_id, saga.kind, step, saga.lease)
                await plan.run(step, saga)
            except LeaseLost:
                raise
            except Exception as error:
                return error
        return None

    async def _turns_back(self, plan: SagaPlan, saga: Saga, failure: Exception) -> bool:
        if plan.can_fail and (is_for_good(failure) or saga.attempts + 1 >= self._max_attempts):
            log.warning("saga_turned_back", tenant_id=str(saga.tenant_id), kind=saga.kind, cause=cause_of(failure))
            await self._store.turn_back(saga.tenant_id, saga.kind, cause_of(failure), saga.lease)
            return True
        await self._put_off(saga, failure)
        return False

    async def _go_back(self, plan: SagaPlan, saga: Saga) -> None:
        for step in reversed(plan.order):
            if saga.is_in(step, StepState.BEGUN, StepState.DONE):
                await plan.undo(step, saga)

    async def _put_off(self, saga: Saga, failure: Exception) -> None:
        pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0 ** min(saga.attempts, 10))
        log.warning("saga_put_off", tenant_id=str(saga.tenant_id), kind=saga.kind, cause=cause_of(failure), attempts=saga.attempts + 1)
        pause *= random.uniform(0.8, 1.2)  # noqa: S311 - jitter
        await self._store.put_off(saga.tenant_id, saga.kind, cause_of(failure), pause, saga.lease)

    @contextlib.asynccontextmanager
    async def _held(self, saga: Saga) -> AsyncIterator["_Attempt"]:
        attempt = _Attempt()
        try:
            async with asyncio.TaskGroup() as group:
                keeper = group.create_task(self._keep(saga))
                try:
                    yield attempt
                finally:
                    keeper.cancel()
        finally:
            # Shielded: a caller that hangs up leaves the saga to the next one at once, and not after the lease.
            with contextlib.suppress(MeshError):
                await asyncio.shield(self._store.release(saga.tenant_id, saga.kind, saga.lease))

    async def _keep(self, saga: Saga) -> None:
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            try:
                if not await self._store.renew(saga.tenant_id, saga.kind, saga.lease, self._lease_seconds):
                    # The step under way finds out by itself when it records something; until then it may be repeated beside another's.
                    return
            except MeshError as error:
                log.warning("saga_lease_not_renewed", tenant_id=str(saga.tenant_id), reason=error.reason_name)


@dataclass(slots=True)
class _Attempt:
    failure: Exception | None = None


class SagaRunner:
    """One loop for `BackgroundTasks`: ends the sagas whose callers and replicas are gone."""

    def __init__(self, due: DueSagas, engine: SagaEngine, *, poll_seconds: float, at_once: int = 4) -> None:
        self._due = due
        self._engine = engine
        self._poll_seconds = poll_seconds
        self._at_once = at_once

    async def run(self) -> None:
        """Looks for due sagas until cancelled; one that fails does not hold up the others."""
        while True:
            try:
                await self.look()
            except MeshError as error:
                log.warning("saga_look_failed", reason=error.reason_name)
            await asyncio.sleep(self._poll_seconds * random.uniform(0.8, 1.2))  # noqa: S311 - jitter

    async def look(self) -> int:
        """Makes one attempt at each due saga and returns how many there were."""
        found = await self._due.due(self._at_once)
        async with asyncio.TaskGroup() as group:
            for tenant_id, kind in found:
                group.create_task(self._attempt(tenant_id, kind))
        return len(found)

    async def _attempt(self, tenant_id: TenantId, kind: SagaKind) -> None:
        try:
            if await self._engine.run(tenant_id, kind):
                log.info("saga_ended", tenant_id=str(tenant_id), kind=kind)
        except MeshError:
            # Noted with its cause by the engine.
            return
        except Exception:
            log.exception("saga_attempt_crashed", tenant_id=str(tenant_id), kind=kind)


def is_for_good(failure: Exception) -> bool:
    """Tells whether repeating cannot help."""
    # A service's refusal comes wrapped in the words for the caller; what it was stands behind them.
    origin = failure.__cause__ if isinstance(failure.__cause__, MeshError) else failure
    return isinstance(origin, MeshError) and origin.code.name in _FOR_GOOD


def cause_of(failure: Exception) -> str:
    """Says in one short line what stopped an attempt, without texts that may carry data."""
    if not isinstance(failure, MeshError):
        return reason_name(error_reason_pb2.ERROR_REASON_INTERNAL)
    origin = failure.__cause__ if isinstance(failure.__cause__, MeshError) else failure
    dependency = failure.metadata.get("dependency", "")
    return f"{origin.reason_name} {dependency}".strip()
