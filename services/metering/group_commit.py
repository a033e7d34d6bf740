"""Puts concurrent requests of one kind into one transaction. A request is answered whole; transactions are bounded in items."""

from collections.abc import Awaitable, Callable, Sequence
from itertools import chain
from typing import Generic, TypeVar

from services.kernel.batching import Batcher
from services.kernel.request_context import RequestScope, enter_scope

I = TypeVar("I")  # noqa: E741 - item
O = TypeVar("O")  # noqa: E741 - outcome

MAX_ITEMS = 1_024
# One: what comes while a transaction is under way shares the next one. A second would halve the batches and add transactions.
MAX_IN_FLIGHT = 1


class GroupCommit(Generic[I, O]):
    """Runs `commit(items) -> outcomes` for many requests at once; an idle one commits a lone request without waiting.

    A transaction begins beside another, up to `max_in_flight`, only when `enough` items wait.
    """

    def __init__(
        self, commit: Callable[[Sequence[I]], Awaitable[Sequence[O]]], *, max_in_flight: int = MAX_IN_FLIGHT, enough: int = 1
    ) -> None:
        self._commit = commit
        self._batcher: Batcher[Sequence[I], list[O]] = Batcher(
            self._flush, size=len, max_batch=MAX_ITEMS, max_in_flight=max_in_flight, enough=enough
        )

    async def submit(self, items: Sequence[I]) -> list[O]:
        """Returns the outcomes of the items, in order, once they are on disk."""
        return await self._batcher.submit(items)

    async def close(self) -> None:
        """Refuses new requests and waits for those accepted."""
        await self._batcher.close()

    async def _flush(self, requests: list[Sequence[I]]) -> list[list[O]]:
        # A flush runs in the context of whoever came first, whose deadline must not cut short the others.
        enter_scope(RequestScope(caller="metering"))
        outcomes = await self._commit(list(chain.from_iterable(requests)))
        answers: list[list[O]] = []
        taken = 0
        for request in requests:
            answers.append(list(outcomes[taken : taken + len(request)]))
            taken += len(request)
        return answers
