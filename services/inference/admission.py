"""Lets at most so many calls run at the provider at once; the rest wait in the fair queue's order. Refuses hopeless waits."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from uuid import UUID

from mesh.common.v1 import error_reason_pb2
from services.inference.fair_queue import FairQueue
from services.kernel.errors import LimitExceeded

# How much the newest call's duration moves the estimate.
_SMOOTHING = 0.1
_FIRST_ESTIMATE_SECONDS = 2.0


class AdmissionGate:
    """The slots of one process at the provider."""

    def __init__(self, capacity: int, max_waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._max_waiting = max_waiting
        self._clock = clock
        self._running = 0
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()
        self._duration_seconds = _FIRST_ESTIMATE_SECONDS

    @property
    def running(self) -> int:
        """How many slots are taken."""
        return self._running

    @property
    def waiting(self) -> int:
        """How many calls wait for a slot."""
        return len(self._queue)

    def expected_wait_seconds(self) -> float:
        """Returns how long one more call would wait, by the duration of recent calls."""
        if self._running < self._capacity:
            return 0.0
        return self._duration_seconds * (len(self._queue) + 1) / self._capacity

    @asynccontextmanager
    async def slot(self, tenant_id: UUID, *, weight: int, expected_tokens: int, remaining_seconds: float) -> AsyncIterator[None]:
        """Holds a slot for the block; waits for it in turn, and leaves the queue at once when cancelled.

        Raises: LimitExceeded QUEUE_FULL when too many wait or the wait would outlast the call's deadline.
        """
        self._refuse_hopeless(remaining_seconds)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.push(turn, tenant_id, cost=expected_tokens, weight=weight)
        self._admit()
        try:
            await turn
        except BaseException:
            self._withdraw(turn)
            raise
        started = self._clock()
        try:
            yield
        finally:
            self._duration_seconds += _SMOOTHING * (self._clock() - started - self._duration_seconds)
            self._leave()

    def _refuse_hopeless(self, remaining_seconds: float) -> None:
        expected = self.expected_wait_seconds()
        if expected == 0.0 or (len(self._queue) < self._max_waiting and expected <= remaining_seconds):
            return
        raise LimitExceeded(
            error_reason_pb2.ERROR_REASON_QUEUE_FULL,
            f"too many calls wait for the model; the expected wait is {expected:.1f} s: try again later or allow the call more time",
            retry_after_seconds=min(expected, 60.0),
            expected_wait_ms=str(int(expected * 1000)),
        )

    def _admit(self) -> None:
        while self._running < self._capacity:
            turn = self._queue.pop()
            if turn is None:
                return
            if turn.cancelled():
                # Given up in this very turn of the loop; its own clean-up has not run yet. The slot goes to the next in line.
                continue
            self._running += 1
            turn.set_result(None)

    def _withdraw(self, turn: "asyncio.Future[None]") -> None:
        if turn.done() and not turn.cancelled():
            # Cancelled in the instant between being admitted and running: the slot goes on to the next.
            self._leave()
        else:
            self._queue.remove(turn)

    def _leave(self) -> None:
        self._running -= 1
        self._admit()
