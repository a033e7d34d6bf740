"""Those of this process who wait for their turn: woken when they are first in line or when a clock frees something, never by looking again.

The line itself is in the store, so that it is one line for all processes. A place in it is a ticket with a short lease: what a dead process
leaves behind is passed over after `TICKET_SECONDS`.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import structlog

from services.kernel.errors import MeshError, Unavailable
from services.kernel.ids import ReservationId, TenantId
from services.kernel.request_context import remaining_seconds
from services.ratelimit.decision import Refusal
from services.ratelimit.limit_rule import SECOND_US, Window
from services.ratelimit.provider_share import ShareRefused
from services.ratelimit.turn import Pause, Place, Queued, Stand

log = structlog.get_logger(__name__)

# As scripts have it.
TICKET_SECONDS = 1.5
RENEW_SECONDS = 0.5
_FOREVER = 86_400.0
# An answer must still reach its caller.
_LEAST_MARGIN_SECONDS, _MOST_MARGIN_SECONDS = 0.05, 0.25

T = TypeVar("T")


class TicketStore(Protocol):
    """Keeps the lines."""

    async def keep_places(self, tenant_id: TenantId, ids: Sequence[ReservationId], line: str = "") -> list[bool]:
        """Prolongs tickets by `TICKET_SECONDS`; tells of each whether it still has its place. Raises: Unavailable."""
        ...

    async def leave(self, tenant_id: TenantId, ids: Sequence[ReservationId], line: str = "") -> None:
        """Takes tickets out of the line. Raises: Unavailable."""
        ...


@dataclass(eq=False, slots=True)
class _Seat:
    tenant_id: TenantId
    reservation_id: ReservationId
    since_us: int = 0
    # The line it has a ticket in; None: it has none.
    line: str | None = None
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    under_way: "asyncio.Task[Any] | None" = None


class WaitingRoom:
    """Lets demands wait. Who goes away, is admitted or is refused for good leaves no ticket."""

    def __init__(self, store: TicketStore) -> None:
        self._store = store
        self._seats: dict[ReservationId, set[_Seat]] = {}
        self._occupied = asyncio.Event()
        self._leaving: set[asyncio.Task[None]] = set()

    async def turn(
        self,
        tenant_id: TenantId,
        reservation_id: ReservationId,
        until: float,
        first: T,
        attempt: Callable[[Stand | None], Coroutine[object, object, T]],
    ) -> T:
        """Asks again whenever it may be this demand's turn, until time.monotonic() is `until`; returns the last outcome.

        `first` is the outcome that made it wait. The last attempt of one whose time is over stands in no line: like a caller who
        never waited it is admitted if it fits, and else learns what keeps it out. Raises: what `attempt` raises.
        """
        pause = pause_after(first, until - time.monotonic())
        if pause is None:
            return first
        seat = self._sit(tenant_id, reservation_id)
        try:
            while (left := until - time.monotonic()) > 0:
                seat.woken.clear()
                outcome = await self._ask(seat, attempt, Stand(keep=True, since_us=seat.since_us))
                pause = pause_after(outcome, left)
                if pause is None:
                    if not isinstance(outcome, Refusal | MeshError):
                        seat.line = None  # its ticket went as it was admitted
                    return outcome
                place = _place_of(outcome)
                if place is None or not place.since_us:
                    break  # the line is full
                await self._stand(seat, place)
                await self._passed(seat, pause, until)
            return await self._ask(seat, attempt, None)
        finally:
            await self._rise(seat)

    def wake(self, ids: Iterable[ReservationId]) -> None:
        """It may be their turn. Ids of others' are ignored."""
        for reservation_id in ids:
            for seat in self._seats.get(reservation_id, ()):
                seat.woken.set()

    def wake_all(self) -> None:
        """Calls may have been missed: whoever waits here asks once more."""
        self.wake(list(self._seats))

    async def run(self) -> None:
        """Prolongs the tickets of all who wait here, twice a second, until cancelled."""
        while True:
            await self._occupied.wait()
            await asyncio.sleep(RENEW_SECONDS)
            by_line: dict[tuple[TenantId, str], list[ReservationId]] = {}
            for seats in self._seats.values():
                for seat in seats:
                    if seat.line is not None:
                        by_line.setdefault((seat.tenant_id, seat.line), []).append(seat.reservation_id)
            async with asyncio.TaskGroup() as group:
                for (tenant_id, line), ids in by_line.items():
                    group.create_task(self._renew(tenant_id, line, ids))

    async def close(self) -> None:
        """Waits for those who are leaving; their tickets end by themselves else."""
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=1.0)

    def _sit(self, tenant_id: TenantId, reservation_id: ReservationId) -> _Seat:
        seat = _Seat(tenant_id, reservation_id)
        self._seats.setdefault(reservation_id, set()).add(seat)
        self._occupied.set()
        return seat

    async def _stand(self, seat: _Seat, place: Place) -> None:
        left, seat.line, seat.since_us = seat.line, place.line, place.since_us
        if left is not None and left != place.line:
            # Nobody is kept waiting behind one that waits for something else; it comes back to its old place.
            with suppress(Unavailable):
                await self._store.leave(seat.tenant_id, [seat.reservation_id], left)

    async def _rise(self, seat: _Seat) -> None:
        others = self._seats[seat.reservation_id]
        others.discard(seat)
        if others:
            return
        del self._seats[seat.reservation_id]
        if not self._seats:
            self._occupied.clear()
        if seat.line is None and seat.under_way is None:
            return
        # Its caller may be gone: leaving is nobody's to cancel, and has a context and a time of its own.
        task = asyncio.get_running_loop().create_task(self._leave(seat), name="ratelimit.leave", context=Context())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        await asyncio.shield(task)

    async def _leave(self, seat: _Seat) -> None:
        lines = set() if seat.line is None else {seat.line}
        if seat.under_way is not None:
            # An attempt that its caller left behind may still write its ticket.
            await asyncio.wait([seat.under_way])
            lines.add(_line_left(seat.under_way))
        try:
            for line in lines:
                await self._store.leave(seat.tenant_id, [seat.reservation_id], line)
        except Unavailable:
            log.info("ticket_left_to_its_lease", tenant_id=str(seat.tenant_id))

    async def _ask(self, seat: _Seat, attempt: Callable[[Stand | None], Coroutine[object, object, T]], stand: Stand | None) -> T:
        task = asyncio.get_running_loop().create_task(attempt(stand), name="ratelimit.turn")
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            seat.under_way = task
            task.add_done_callback(_forget)
            raise

    async def _passed(self, seat: _Seat, pause: Pause, until: float) -> None:
        left = until - time.monotonic()
        seconds = left if pause.seconds is None else min(left, pause.seconds)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                await seat.woken.wait()

    async def _renew(self, tenant_id: TenantId, line: str, ids: Sequence[ReservationId]) -> None:
        try:
            kept = await self._store.keep_places(tenant_id, ids, line)
        except Unavailable:
            return
        self.wake(reservation_id for reservation_id, has_place in zip(ids, kept, strict=True) if not has_place)


def until_of(max_wait_seconds: float) -> float:
    """When, on time.monotonic(), a caller must have its answer who waits at most so long and never past its deadline."""
    left = remaining_seconds(_FOREVER)
    margin = min(_MOST_MARGIN_SECONDS, max(_LEAST_MARGIN_SECONDS, left / 10))
    return time.monotonic() + min(max_wait_seconds, left - margin)


def pause_after(outcome: object, left_seconds: float) -> Pause | None:
    """How long to wait before asking again; None when an outcome is final, or nothing frees in what is left of the time."""
    if isinstance(outcome, Queued):
        return Pause(None)
    if isinstance(outcome, Refusal):
        return _pause_of(outcome, left_seconds)
    if isinstance(outcome, ShareRefused) and outcome.place is not None and outcome.retry_after_seconds is not None:
        return Pause(outcome.retry_after_seconds) if outcome.retry_after_seconds <= left_seconds else None
    return None


def _pause_of(refusal: Refusal, left_seconds: float) -> Pause | None:
    place, frees_us = refusal.place, refusal.frees_us
    if place is None or frees_us is None or not refusal.may_wait:
        return None
    # What runs ends by no clock: the time a refusal names for it is a guess.
    times = [] if refusal.status.rule.window is Window.RUNNING else [frees_us]
    latest_us = place.now_us + int(left_seconds * SECOND_US)
    if refusal.holds_help and (place.returns_us or place.expired_holds) and refusal.clock_us <= latest_us:
        # A hold whose caller died comes back by itself.
        times += [place.returns_us] if place.returns_us else []
    elif not times or frees_us > latest_us:
        return None
    if place.ahead or not times:
        return Pause(None)
    return Pause(max(0, max(refusal.clock_us, min(times)) - place.now_us) / SECOND_US)


def _forget(task: "asyncio.Task[Any]") -> None:
    # Nobody is left to hear of it.
    if not task.cancelled():
        task.exception()


def _place_of(outcome: object) -> Place | None:
    return outcome.place if isinstance(outcome, Queued | Refusal | ShareRefused) else None


def _line_left(attempt: "asyncio.Task[Any]") -> str:
    # Where an attempt wrote its ticket that nobody waited for.
    if attempt.cancelled() or attempt.exception() is not None:
        return ""
    place = _place_of(attempt.result())
    return "" if place is None else place.line
