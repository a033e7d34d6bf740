"""The rules of the limits in plain Python, without a store: what the scripts must agree with, step by step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

from services.kernel.ids import ReservationId
from services.ratelimit.limits import Limits
from services.ratelimit.window import moment


@dataclass
class OracleCall:
    """A reservation. `counted`: its request is in the log of the window."""

    state: str
    reserve_us: int
    tokens: int
    cost: int
    counted: bool = True
    leased: bool = True


@dataclass
class Oracle:
    """One tenant. `calls` is None while it has no counters."""

    limits: Limits
    window_us: int
    epoch: int = 0
    calls: dict[UUID, OracleCall] | None = None
    base_tokens: dict[str, int] = field(default_factory=dict)
    base_cost: dict[str, int] = field(default_factory=dict)

    def used(self, now_us: int) -> tuple[int, int, int, int, int]:
        """Requests, tokens and tokens today, money this month, and running calls, as of now."""
        calls = (self.calls or {}).values()
        recent = [call for call in calls if call.counted and call.reserve_us > now_us - self.window_us]
        now = moment(now_us)
        day, month = f"{now:%Y-%m-%d}", f"{now:%Y-%m}"
        return (
            len(recent),
            sum(call.tokens for call in recent),
            self.base_tokens.get(day, 0) + sum(call.tokens for call in calls if f"{moment(call.reserve_us):%Y-%m-%d}" == day),
            self.base_cost.get(month, 0) + sum(call.cost for call in calls if f"{moment(call.reserve_us):%Y-%m}" == month),
            sum(call.state == "held" and call.leased for call in calls),
        )

    def reserve(self, reservation_id: UUID, tokens: int, cost: int, now_us: int) -> str:
        """Decides a Reserve of a fresh id."""
        if self.calls is None:
            return "rebuild"
        known = self.calls.get(reservation_id)
        if known is not None:
            if known.state == "held" and known.leased:
                return "held" if (known.tokens, known.cost) == (tokens, cost) else "conflict"
            return "conflict" if known.state in ("held", "pinned") and (known.tokens, known.cost) != (tokens, cost) else "ended"
        for limit, used, need in zip(self.limits.in_order(), self.used(now_us), (1, tokens, tokens, cost, 1), strict=True):
            if limit and used + need > limit:
                return "refused"
        self.calls[reservation_id] = OracleCall("held", now_us, tokens, cost)
        return "held"

    def end(self, reservation_id: UUID, state: str, tokens: int, cost: int, *, counted: bool, only_held: bool = False) -> None:
        """Moves a hold to its end, if it is one."""
        call = (self.calls or {}).get(reservation_id)
        if call is None or call.state not in (("held",) if only_held else ("held", "pinned")):
            return
        call.state, call.tokens, call.cost, call.counted = state, tokens, cost, counted

    def pin(self, reservation_id: UUID) -> None:
        """Keeps a hold without its lease."""
        call = (self.calls or {}).get(reservation_id)
        if call is not None and call.state == "held":
            call.state = "pinned"

    def commit(self, reservation_id: UUID, kind: str, tokens: int, cost: int, epoch: int) -> bool:
        """Applies what the ledger says; no snapshot is ever pending here."""
        if self.calls is None or epoch < self.epoch:
            return True
        if epoch > self.epoch:
            self.lose()
        elif kind == "pin":
            self.pin(reservation_id)
        elif kind == "void":
            self.end(reservation_id, "void", 0, 0, counted=True)
        else:
            self.end(reservation_id, "settled", tokens, cost, counted=True)
        return True

    def lose(self) -> None:
        """Loses all counters."""
        self.calls = None
        self.base_tokens, self.base_cost = {}, {}

    def load(self, epoch: int, calls: Mapping[ReservationId, OracleCall], tokens: int, cost: int) -> None:
        """Takes a snapshot of the ledger: what is settled comes as sums, and once more as recent calls for the window only."""
        now = datetime.now(UTC)
        self.epoch, self.calls = epoch, dict(calls.items())
        settled = [call for call in calls.values() if call.state == "settled"]
        self.base_tokens = {f"{now:%Y-%m-%d}": tokens - sum(call.tokens for call in settled)}
        self.base_cost = {f"{now:%Y-%m}": cost - sum(call.cost for call in settled)}
