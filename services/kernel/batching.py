"""Group commit for anything: many concurrent submissions become one flush, and one bad item fails alone."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from opentelemetry.context import Context

from services.kernel.errors import Unavailable
from services.kernel.telemetry.shared_work import context_under, span_parent

I = TypeVar("I")  # noqa: E741 - input
O = TypeVar("O")  # noqa: E741 - output


class Submission(NamedTuple, Generic[I, O]):
    """An item that waits, its answer to be, and where its submitter's trace stands."""

    item: I
    answer: "asyncio.Future[O]"
    parent: Context | None


class Batcher(Generic[I, O]):
    """Coalesces `submit` calls into `flush(items) -> results`, one result or exception an item, in order.

    An idle batcher flushes at once, so a lone caller waits for nothing; what arrives while `max_in_flight` flushes run is gathered for
    the next one. Cancelling a submitter withdraws its waiting, not its item.

    `size` is what an item counts for, 1 unless it is given. A flush has at most `max_batch`, or one item that is larger. A flush begins
    beside another only when `enough` waits, or when the oldest is under way for `beside_seconds`: nobody waits longer for it than that.
    """

    def __init__(
        self,
        flush: Callable[[list[I]], Awaitable[Sequence[O | Exception]]],
        *,
        size: Callable[[I], int] | None = None,
        max_batch: int = 256,
        max_in_flight: int = 1,
        enough: int = 1,
        beside_seconds: float = math.inf,
        max_waiting: int = 65_536,
    ) -> None:
        self._flush = flush
        self._size = size
        self._enough = enough
        self._beside_seconds = beside_seconds
        self._max_batch = max_batch
        self._max_in_flight = max_in_flight
        self._max_waiting = max_waiting
        self._waiting: list[Submission[I, O]] = []
        # Kept while they come and go: added up for each who comes, it would cost more the more wait.
        self._waiting_size = 0
        # Since when each is under way.
        self._flushes: dict[asyncio.Task[None], float] = {}
        self._look: asyncio.TimerHandle | None = None
        self._closed = False

    async def submit(self, item: I) -> O:
        """Adds the item to the next flush and returns its result.

        Raises: what the flush answered for this item, or the flush's own failure; Unavailable when closed or overfull.
        """
        self._refuse_when_full(1)
        future: asyncio.Future[O] = asyncio.get_running_loop().create_future()
        self._waiting.append(Submission(item, future, span_parent()))
        self._waiting_size += 1 if self._size is None else self._size(item)
        self._start_flushes()
        return await future

    async def submit_all(self, items: Sequence[I]) -> list[O | Exception]:
        """Adds items to the next flushes, as many to each as fit, and returns a result or the failure of each, in order.

        Raises: Unavailable when closed or overfull.
        """
        self._refuse_when_full(len(items))
        loop, parent = asyncio.get_running_loop(), span_parent()
        futures: list[asyncio.Future[O]] = [loop.create_future() for _ in items]
        self._waiting.extend(Submission(item, future, parent) for item, future in zip(items, futures, strict=True))
        self._waiting_size += len(items) if self._size is None else sum(map(self._size, items))
        self._start_flushes()
        results: list[O | Exception] = []
        try:
            # One after another: those of a flush are done together, and what is done makes nobody wait.
            for future in futures:
                try:
                    results.append(await future)
                except Exception as error:
                    results.append(error)
        except BaseException:
            for future in futures:
                # Nobody is left to hear of a failure; one that came already is not reported as unheard any more either.
                future.cancel()
            raise
        return results

    async def close(self) -> None:
        """Refuses new items and waits until every accepted one has been flushed."""
        self._closed = True
        while self._flushes:
            await asyncio.wait(self._flushes)

    def _refuse_when_full(self, count: int) -> None:
        if self._closed or len(self._waiting) + count > self._max_waiting:
            raise Unavailable("batcher", "this process is shutting down or overloaded; try again shortly")

    def _start_flushes(self) -> None:
        while self._waiting and self._may_begin():
            batch = self._taken()
            # Owned here: kept in the set until done, awaited by close. In a context of its own: a batch is of many callers, and the
            # tenant and deadline of the one who happened to start it must not reach the others' items. Its spans hang under the first.
            context = context_under(batch[0].parent)
            loop = asyncio.get_running_loop()
            task = loop.create_task(self._run(batch), name="batcher.flush", context=context)
            self._flushes[task] = loop.time()
            task.add_done_callback(self._finished)

    def _may_begin(self) -> bool:
        if not self._flushes:
            return True
        if len(self._flushes) >= self._max_in_flight:
            return False
        return self._waiting_size >= self._enough or self._is_late()

    def _is_late(self) -> bool:
        """Whether the oldest flush is under way for so long that the next begins beside it; looks again when it will be."""
        if self._beside_seconds == math.inf:
            return False
        loop = asyncio.get_running_loop()
        left = next(iter(self._flushes.values())) + self._beside_seconds - loop.time()
        if left > 0 and self._look is None:
            self._look = loop.call_later(left, self._look_again)
        return left <= 0

    def _look_again(self) -> None:
        self._look = None
        self._start_flushes()

    def _taken(self) -> list[Submission[I, O]]:
        """Takes those that make the next flush."""
        count, size = self._fitting()
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        self._waiting_size -= size
        return batch

    def _fitting(self) -> tuple[int, int]:
        """Returns how many of those that wait make the next flush, and what they count for."""
        if self._size is None:
            count = min(len(self._waiting), self._max_batch)
            return count, count
        count, size = 0, 0
        for item, _, _ in self._waiting:
            more = self._size(item)
            if count and size + more > self._max_batch:
                break
            count, size = count + 1, size + more
        return count, size

    def _finished(self, task: asyncio.Task[None]) -> None:
        del self._flushes[task]
        self._start_flushes()

    async def _run(self, batch: list[Submission[I, O]]) -> None:
        try:
            results = await self._flush([submission.item for submission in batch])
            if len(results) != len(batch):
                msg = f"a flush of {len(batch)} items answered {len(results)} results"
                raise RuntimeError(msg)
        except BaseException as error:
            _fail(batch, error)
            if not isinstance(error, Exception):
                raise
            return
        for (_, future, _), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


def _fail(batch: Sequence[Submission[I, O]], error: BaseException) -> None:
    for _, future, _ in batch:
        if future.done():
            continue
        if isinstance(error, asyncio.CancelledError):
            future.cancel()
        else:
            future.set_exception(error)
