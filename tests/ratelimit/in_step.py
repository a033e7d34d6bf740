"""The limits and the oracle of one tenant, kept in step: what the oracle must know of the clock, of leases and of the ledger."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from uuid import UUID

from mesh.metering.v1 import ledger_service_pb2 as ledger
from services.kernel.errors import ContentConflict, InvalidRequest, LimitExceeded, MeshError, ReservationLost
from services.kernel.ids import ReservationId, new_uuid7
from services.ratelimit.calendar_periods import Calendar, moment
from services.ratelimit.decision import Refusal
from services.ratelimit.limit_rule import CALENDAR, SECOND_US, LimitRule
from services.ratelimit.limits import NOTHING, Amounts, Demand, Subject
from services.ratelimit.reservation import Held
from services.ratelimit.settlement import Settlement
from services.ratelimit.terms import Terms
from tests.ratelimit.demands import DURABLE
from tests.ratelimit.limits_by_hand import Backing, LimitsByHand
from tests.ratelimit.oracle import Granted, Oracle, OracleCall

LEASE_US = 5 * SECOND_US
STATES = {
    ledger.CALL_STATE_OPEN: "held",
    ledger.CALL_STATE_UNRESOLVED: "pinned",
    ledger.CALL_STATE_SETTLED: "settled",
    ledger.CALL_STATE_VOID: "void",
}

T = TypeVar("T")


class InStep:
    """Both of them, what was asked of them so far, and how they are compared."""

    def __init__(self, loop: asyncio.AbstractEventLoop, backing: Backing) -> None:
        super().__init__()
        self._loop, self._backing = loop, backing
        self.ids: list[ReservationId] = []
        # When leases end.
        self.until_us: dict[ReservationId, int] = {}
        # How many calls there must be before everything is lost again.
        self.loses_after = 3
        # What the ledger has to tell.
        self.outbox: list[Settlement] = []

    def begin_with(self, rules: list[LimitRule], calendar_name: str, calendar: Calendar) -> None:
        """Begins with a tenant that was never seen."""
        self.calendar_name = calendar_name
        self.limits = LimitsByHand(self._backing, self._terms(rules, calendar, 1))
        self.oracle = Oracle(rules, calendar, durable_units=frozenset({DURABLE}))
        self.tenant_id = self.limits.at_store.tenant_id
        self._set_clock(self.limits.scripts.now_us)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    def _outcome(self, work: Coroutine[Any, Any, Held | Refusal]) -> Held | Refusal | MeshError:
        try:
            return self._do(work)
        except MeshError as error:
            return error

    def _terms(self, rules: list[LimitRule], calendar: Calendar, version: int) -> Terms:
        return Terms(rules, calendar, version=version, calendar_name=self.calendar_name, features=[DURABLE])

    def _pick(self, number: int) -> ReservationId:
        """Mostly one of the latest."""
        return self.ids[-1 - number % min(len(self.ids), 5 if number < 50 else 1000)]

    def _new_id(self, skew_us: int) -> ReservationId:
        """By the clock of a caller, which is wrong by so much."""
        self.ids.append(ReservationId(new_uuid7(moment(self.now_us + skew_us))))
        return self.ids[-1]

    def _pass(self, us: int) -> None:
        if us:
            self._set_clock(self.now_us + us)

    def _set_clock(self, to_us: int) -> None:
        self.now_us = to_us
        self._do(self.limits.scripts.set_clock(to_us))
        for id, call in (self.oracle.calls or {}).items():
            call.leased = self.until_us.get(ReservationId(id), 0) > to_us

    def _leased(self, reservation_id: ReservationId) -> None:
        self.until_us[reservation_id] = self.now_us + LEASE_US

    def _reloaded(self, *, but: ReservationId | None = None) -> None:
        """What was asked of a store without counters was answered after it had them from the ledger; `but` went there afterwards."""
        if self.oracle.calls is None:
            self._loaded(but=but)

    def _loaded(self, *, only_rules_changed: bool = False, but: ReservationId | None = None) -> None:
        calls: dict[ReservationId, OracleCall] = {}
        for id, call in self.limits.ledger.calls.items():
            # What it knows of a fence alone was never held.
            if call.reserve_us and (but is None or id != but.bytes):
                reservation_id, amounts = ReservationId(UUID(bytes=id)), Amounts(call.tokens, call.cost)
                demand = Demand(amounts, 0 if call.product_unit else call.attempt, call.quantity)
                subject = Subject(call.user, call.feature)
                calls[reservation_id] = OracleCall(
                    STATES[call.state], call.reserve_us, amounts, demand, subject, product_unit=call.product_unit
                )
                self._leased(reservation_id)
        self.oracle.load(self.limits.ledger.epoch, calls, self.now_us, only_rules_changed=only_rules_changed)

    def _decided(self, fences: int, outcome: Held | Refusal | MeshError, ask: Callable[[], Granted]) -> Granted:
        """What the oracle says; of what it refuses, again after the ledger was asked, which must be wherever it may help."""
        told, doubtful = ask(), bool(self._expired())
        if told.verdict != "refused":
            assert self.limits.fence_count == fences
        elif self.limits.fence_count > fences:
            self._fenced()
            return ask()
        elif isinstance(outcome, Refusal):
            assert not doubtful or outcome.frees_us is None
        return told

    def _undecided(self) -> list[ReservationId]:
        undecided = (ledger.CALL_STATE_OPEN, ledger.CALL_STATE_UNRESOLVED)
        return [ReservationId(UUID(bytes=id)) for id, call in self.limits.ledger.calls.items() if call.state in undecided]

    def _expired(self) -> list[ReservationId]:
        return [ReservationId(id) for id, call in (self.oracle.calls or {}).items() if call.state == "held" and not call.leased]

    def _fenced(self) -> None:
        """What the ledger was asked about ends as it says: what it never opened goes, what is open stays, what is settled waits."""
        for reservation_id in self._expired():
            state = self.limits.ledger.calls[reservation_id.bytes].state
            if state == ledger.CALL_STATE_UNRESOLVED:
                self.oracle.pin(reservation_id)
            elif state == ledger.CALL_STATE_VOID:
                self.oracle.end(reservation_id, "released", NOTHING, counted=False, only_held=True)

    def _changed_nothing(self, before: list[object], fences: int) -> None:
        # Of a tenant that had to be loaded, or whose leases were asked about, the next invariant speaks.
        if before[0] and self.limits.fence_count == fences:
            assert self._do(self.limits.contents()) == before

    def _is_exact(self, held: Held, subject: Subject) -> None:
        calendar, began_us = self.oracle.calendar, held.answer.reserve_us
        for status in held.limits:
            window = status.rule.window
            # A period that ended meanwhile is told of as it ended.
            if window not in CALENDAR or calendar.period(window, began_us) == calendar.period(window, self.now_us):
                assert (status.rule.name, status.used) == (status.rule.name, self.oracle.used(status.rule, subject, self.now_us))


def verdict_of(outcome: Held | Refusal | MeshError) -> str:
    """What came of a question, in the oracle's words. Raises: what is none of them."""
    match outcome:
        case Held():
            return "held"
        case Refusal() | LimitExceeded() | InvalidRequest():
            return "refused"
        case ContentConflict():
            return "conflict"
        case ReservationLost():
            return "ended"
        case _:
            raise outcome


def minted_us(reservation_id: ReservationId) -> int:
    """The time that an id carries."""
    return (reservation_id.int >> 80) * 1000
