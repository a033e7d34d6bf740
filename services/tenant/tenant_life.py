"""What an operator does to a tenant between its beginning and its end, and how a creation is watched. Refuses states it does not fit."""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol
from uuid import UUID

from services.kernel.errors import NotFound, WrongState
from services.kernel.ids import TenantId
from services.tenant.actor import Actor
from services.tenant.saga import Saga, SagaKind, SagaStore
from services.tenant.tenant_record import Tenant, TenantDirectory, TenantState

WATCH_SECONDS = 0.1


class LifeStore(Protocol):
    """Where states are changed."""

    async def change_state(self, tenant_id: TenantId, before: TenantState, after: TenantState, actor: Actor) -> TenantState | None:
        """Changes the state if it is `before`, audits and tells it; returns the state found, None for no tenant."""
        ...

    async def find_request(self, request_id: UUID) -> TenantId | None:
        """Returns the tenant a creation made."""
        ...


class TenantLife:
    """Suspends, resumes and watches."""

    def __init__(self, store: LifeStore, sagas: SagaStore, directory: TenantDirectory, *, watch_seconds: float = WATCH_SECONDS) -> None:
        self._store = store
        self._sagas = sagas
        self._directory = directory
        self._watch_seconds = watch_seconds

    async def suspend(self, tenant_id: TenantId, actor: Actor) -> Tenant:
        """Refuses the tenant's credentials from now on. Idempotent. Raises: NotFound, WrongState."""
        return await self._change(tenant_id, TenantState.ACTIVE, TenantState.SUSPENDED, actor)

    async def resume(self, tenant_id: TenantId, actor: Actor) -> Tenant:
        """Lets the tenant in again. Idempotent. Raises: NotFound, WrongState."""
        return await self._change(tenant_id, TenantState.SUSPENDED, TenantState.ACTIVE, actor)

    async def watch(self, request_id: UUID) -> AsyncIterator[Saga]:
        """Yields the creation as it is now and after every change, until it has ended. Raises: NotFound."""
        tenant_id = await self._store.find_request(request_id)
        seen: object = None
        while True:
            saga = None if tenant_id is None else await self._sagas.load(tenant_id, SagaKind.PROVISION)
            if saga is None:
                raise NotFound("request")
            shape = (saga.state, saga.attempts, saga.steps)
            if shape != seen:
                seen = shape
                yield saga
            if saga.state.is_end:
                return
            # The row is asked, not the process: whichever replica runs the saga, every watcher sees it.
            await asyncio.sleep(self._watch_seconds)

    async def _change(self, tenant_id: TenantId, before: TenantState, after: TenantState, actor: Actor) -> Tenant:
        found = await self._store.change_state(tenant_id, before, after, actor)
        tenant = await self._directory.get_tenant(tenant_id)
        if found is None or tenant is None:
            raise NotFound("tenant")
        if found not in (before, after):
            raise WrongState("tenant", found, f"the tenant is {found}; only an ACTIVE or SUSPENDED one can be changed")
        return tenant
