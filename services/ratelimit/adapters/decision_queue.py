"""Concurrent demands of one tenant share a script call: what arrives while one is under way makes the next.

A lone caller waits for nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context

from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId
from services.ratelimit.reservation import Ask
from services.ratelimit.standing import Answer
from services.ratelimit.terms import Terms

_MOST_WAITING = 65_536

Decide = Callable[[TenantId, Terms, Sequence[Ask]], Awaitable[list[Answer]]]
_Waiting = tuple[Terms, Ask, "asyncio.Future[Answer]"]


class DecisionQueue:
    """Gathers demands by tenant. Cancelling a caller withdraws its waiting, not its demand."""

    def __init__(self, decide: Decide) -> None:
        self._decide = decide
        self._waiting: dict[TenantId, list[_Waiting]] = {}
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, tenant_id: TenantId, terms: Terms, ask: Ask) -> Answer:
        """Returns the answer to one demand. Raises: what the decision raised; Unavailable when overfull."""
        if self._count >= _MOST_WAITING:
            raise Unavailable("ratelimit", "too many decisions wait in this process; try again shortly")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        waiting = self._waiting.get(tenant_id)
        self._count += 1
        if waiting is not None:
            waiting.append((terms, ask, future))
        else:
            self._waiting[tenant_id] = [(terms, ask, future)]
            # In a context of its own: a batch is of many callers, and the deadline of the first must not be the others'.
            task = loop.create_task(self._drain(tenant_id), name="ratelimit.decisions", context=Context())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def _drain(self, tenant_id: TenantId) -> None:
        while batch := self._waiting[tenant_id]:
            self._waiting[tenant_id] = []
            self._count -= len(batch)
            by_terms: dict[int, list[_Waiting]] = {}
            for item in batch:
                by_terms.setdefault(id(item[0]), []).append(item)
            for same in by_terms.values():
                await self._answer(tenant_id, same)
        del self._waiting[tenant_id]

    async def _answer(self, tenant_id: TenantId, batch: list[_Waiting]) -> None:
        try:
            answers = await self._decide(tenant_id, batch[0][0], [ask for _, ask, _ in batch])
        except Exception as error:
            for _, _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, _, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)
