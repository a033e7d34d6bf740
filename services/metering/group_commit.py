"""Puts concurrent requests of one kind into one transaction. A request is answered whole; transactions are bounded in items."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from services.kernel.batching import Batcher
from services.kernel.request_context import RequestScope, enter_scope

I = TypeVar("I")  # noqa: E741 - item
O = TypeVar("O")  # noqa: E741 - outcome

MAX_ITEMS = 1_024
# One: what comes while a transaction is under way shares the next one. A second would halve the batches and add transactions.
MAX_IN_FLIGHT = 1


class GroupCommit(Generic[I, O]):
    """Runs `commit(items) -> outcomes` for many requests at once; an idle one commits a lone request without waiting."""

    def __init__(self, commit: Callable[[Sequence[I]], Awaitable[Sequence[O]]]) -> None:
        self._commit = commit
        self._batcher: Batcher[Sequence[I], list[O]] = Batcher(self._flush, max_in_flight=MAX_IN_FLIGHT)

    async def submit(self, items: Sequence[I]) -> list[O]:
        """Returns the outcomes of the items, in order, once they are on disk."""
        return await self._batcher.submit(items)

    async def close(self) -> None:
        """Refuses new requests and waits for those accepted."""
        await self._batcher.close()

    async def _flush(self, requests: list[Sequence[I]]) -> Sequence[list[O] | Exception]:
        # A flush runs in the context of whoever came first, whose deadline must not cut short the others.
        enter_scope(RequestScope(caller="metering"))
        answers: list[list[O] | Exception] = []
        for group in _bounded(requests):
            answers.extend(await self._commit_group(group))
        return answers

    async def _commit_group(self, group: list[Sequence[I]]) -> Sequence[list[O] | Exception]:
        try:
            outcomes = await self._commit([item for request in group for item in request])
        # Whatever it is, it belongs to those whose items were in this transaction: raised, it would fail the other groups' callers too.
        except Exception as error:
            return [error] * len(group)
        answers: list[list[O]] = []
        taken = 0
        for request in group:
            answers.append(list(outcomes[taken : taken + len(request)]))
            taken += len(request)
        return answers


def _bounded(requests: list[Sequence[I]]) -> list[list[Sequence[I]]]:
    """Splits requests into groups of at most MAX_ITEMS items, never splitting a request."""
    groups: list[list[Sequence[I]]] = []
    room = 0
    for request in requests:
        if not groups or len(request) > room:
            groups.append([])
            room = MAX_ITEMS
        groups[-1].append(request)
        room -= len(request)
    return groups
