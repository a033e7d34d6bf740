"""Concurrent demands of one tenant share a script call: what arrives while one is under way makes the next.

A lone caller waits for nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context

from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId
from services.ratelimit.request import Ask
from services.ratelimit.standing import Answer
from services.ratelimit.terms import Terms

_MOST_WAITING = 65_536

Decide = Callable[[TenantId, Terms, Sequence[Ask]], Awaitable[list[Answer]]]
_Waiting = tuple[Terms, Ask, "asyncio.Future[Answer]"]


class DecisionQueue:
    """Gathers demands by tenant. A caller that is cancelled gets no answer; whether its demand was decided is unknown."""

    def __init__(self, decide: Decide) -> None:
        self._decide = decide
        self._waiting: dict[TenantId, list[_Waiting]] = {}
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, tenant_id: TenantId, terms: Terms, ask: Ask) -> Answer:
        """Returns the answer to one demand. Raises: what the decision raised; Unavailable when overfull."""
        waiting = self._waiting.get(tenant_id)
        if waiting is None:
            waiting = self._waiting[tenant_id] = []
            # One turn of the loop lets those in that have arrived already; most callers are alone all the same.
            try:
                await asyncio.sleep(0)
                if not waiting:
                    return (await self._decide(tenant_id, terms, [ask]))[0]
            finally:
                self._hand_over(tenant_id)
            return await self._with_others(waiting, 0, terms, ask)
        return await self._with_others(waiting, len(waiting), terms, ask)

    async def _with_others(self, waiting: list[_Waiting], place: int, terms: Terms, ask: Ask) -> Answer:
        if self._count >= _MOST_WAITING:
            raise Unavailable("ratelimit", "too many decisions wait in this process; try again shortly")
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        waiting.insert(place, (terms, ask, future))
        self._count += 1
        return await future

    def _hand_over(self, tenant_id: TenantId) -> None:
        """Begins a task for those who wait. One for each caller would cost those who are alone as much as the rest of this file."""
        if not self._waiting[tenant_id]:
            del self._waiting[tenant_id]
            return
        # In a context of its own: a batch is of many callers, and the deadline of the first must not be the others'.
        task = asyncio.get_running_loop().create_task(self._drain(tenant_id), name="ratelimit.decisions", context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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
