"""What callers saw of decisions, and what the store kept of them: the material of a replay in the order of the store's time."""

from dataclasses import dataclass, field
from uuid import UUID

from services.ratelimit.limit_rule import Unit
from services.ratelimit.limits import Amounts, Demand, Subject

# By how much the machine's clock may be set while it runs: far less than the clocks of a test are wrong.
_STEP_US = 1_000_000


@dataclass(slots=True)
class Raise:
    """An Extend to these totals that was admitted, or may have been: somewhere in [from_us, to_us]. `to_us` is None where nobody knows."""

    amounts: Amounts
    from_us: int
    to_us: int | None


@dataclass(slots=True)
class Asked:
    """One id: all that was asked for under it, and when by the clock of the machine, which the store shares."""

    id: UUID
    tenant_id: UUID
    subject: Subject
    demand: Demand
    product_unit: str = ""
    raises: list[Raise] = field(default_factory=list)
    # When something may have renewed its lease, in [from, to], and whether it is known to have.
    renewals: list[tuple[int, int, bool]] = field(default_factory=list)
    # When a caller was first told of the hold.
    reserve_us: int = 0
    # Its caller tried to let it go before anything was opened.
    let_go: bool = False


@dataclass(frozen=True, slots=True)
class Told:
    """An answer. `figures`: used by rule, exact only where the answer is that of the first try."""

    asked: Asked
    time_us: int
    rule: str = ""
    used: int = 0
    limit: int = 0
    figures: dict[str, int] = field(default_factory=dict)
    # Of an Extend that was refused: how much more of each.
    more: Amounts | None = None


@dataclass(slots=True)
class Kept:
    """The store's record of an id. `end_us` is None while it is held."""

    state: str
    reserve_us: int
    amounts: Amounts
    end_us: int | None


@dataclass
class DecisionLog:
    """Everything of one run. `unknown_count`: tries whose answer was lost.

    `wrong_times`: answers dated when nobody was asking. `second_holds`: one id that was told of two holds.
    """

    asked: dict[UUID, Asked] = field(default_factory=dict)
    held: list[Told] = field(default_factory=list)
    refused: list[Told] = field(default_factory=list)
    kept: dict[UUID, Kept] = field(default_factory=dict)
    decision_count: int = 0
    unknown_count: int = 0
    wrong_times: list[str] = field(default_factory=list)
    second_holds: list[str] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)

    def note(self, name: str) -> None:
        """Counts an answer that decides nothing."""
        self.others[name] = self.others.get(name, 0) + 1

    def date(self, asked: Asked, time_us: int, since_us: int, until_us: int) -> None:
        """Checks the time of an answer against when it was asked for, by the clock of the machine."""
        if not since_us - _STEP_US <= time_us <= until_us + _STEP_US:
            self.wrong_times.append(f"{asked.id}: asked in {since_us}..{until_us}, decided at {time_us}")


def need(unit: Unit, asked: Asked, amounts: Amounts) -> int | None:
    """How much of a unit an id stands for; None where the unit does not count it. The contract's words: Reserve and Consume."""
    attempt = asked.demand.attempt
    if asked.product_unit or unit is Unit.PRODUCT:
        return asked.demand.quantity if asked.product_unit and unit is Unit.PRODUCT else None
    match unit:
        case Unit.REQUESTS:
            return 1 if attempt == 1 else None
        case Unit.RETRIES:
            return 1 if attempt > 1 else None
        case Unit.RUNNING:
            return 1
        case Unit.TOKENS:
            return amounts.tokens
        case _:
            return amounts.cost_nano_usd
