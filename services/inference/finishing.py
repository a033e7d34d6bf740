"""Work that must finish although its call is over: owned here, tried again until it is acknowledged, waited for on close."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar
from uuid import UUID

import structlog

from services.kernel.errors import MeshError
from services.kernel.request_context import bind_tenant
from services.kernel.tenant_context import TenantContext

log = structlog.get_logger(__name__)

T = TypeVar("T")
KEEP_TRYING_SECONDS = 600.0
_FIRST_DELAY_SECONDS = 0.05
_MAX_DELAY_SECONDS = 1.0
_TRANSIENT = frozenset(("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED", "UNKNOWN", "INTERNAL"))


class Finishing:
    """The unfinished ends of one process."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, tenant: TenantContext, work: Coroutine[object, object, T], *, call_id: UUID | None = None) -> "asyncio.Task[T]":
        """Starts work that goes to its end whatever becomes of the caller, in a scope of its own."""
        # Owned by this object: kept until done, awaited by close.
        task = asyncio.get_running_loop().create_task(_in_own_scope(tenant, work, call_id), name="finishing")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def wait(self, task: "asyncio.Task[T]", seconds: float) -> T | None:
        """Returns the task's result, or None when it takes longer; cancelling the waiter does not stop the task.

        Raises: what the work raised, if it ended in time.
        """
        done, _ = await asyncio.wait((task,), timeout=seconds)
        return task.result() if done else None

    async def close(self, seconds: float = 5.0) -> None:
        """Waits for what is unfinished; what is left then, the ledger's lease sweep lists as unresolved."""
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=seconds)
            for task in late:
                task.cancel()
            if late:
                log.error("calls_left_unfinished", count=len(late))
                await asyncio.wait(late)

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, MeshError):
            log.error("finishing_failed", exc_info=error)


async def until_acknowledged(send: Callable[[], Awaitable[T]]) -> T:
    """Repeats a repeatable call until it is answered. Raises: the answer when it is final, or the last failure after ten minutes."""
    give_up_time = time.monotonic() + KEEP_TRYING_SECONDS
    delay = _FIRST_DELAY_SECONDS
    while True:
        try:
            return await send()
        except MeshError as error:
            if error.code.name not in _TRANSIENT or time.monotonic() > give_up_time:
                raise
            log.warning("acknowledgement_missing", error=str(error), retry_seconds=round(delay, 3))
        await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        delay = min(delay * 2, _MAX_DELAY_SECONDS)


async def _in_own_scope(tenant: TenantContext, work: Coroutine[object, object, T], call_id: UUID | None) -> T:
    # The call's own deadline must not reach what outlives the call.
    with bind_tenant(tenant, call_id=call_id):
        return await work
