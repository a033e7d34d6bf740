"""How rules stand by one answer of the store: what is used of each, and when it gives something back. Reads figures, decides nothing."""

from collections.abc import Iterator, Sequence
from enum import IntEnum

from services.kernel.hot_value import hot_value
from services.ratelimit.calendar_periods import Boundaries
from services.ratelimit.limit_rule import CALENDAR, LimitRule, Window
from services.ratelimit.limits import NOTHING, Amounts, Subject
from services.ratelimit.terms import Plan
from services.ratelimit.turn import Place


class Verdict(IntEnum):
    """What the store answers; those from 8 to 11 are not about the demand. QUEUED: it fits, and others wait before it."""

    HELD = 1
    REFUSED = 2
    OLD = 3
    AHEAD = 4
    ENDED = 5
    CONFLICT = 6
    DONE = 7
    REBUILD = 8
    BEHIND = 9
    LOST = 10
    ANOTHERS = 11
    QUEUED = 12


_NOBODY = Subject()


@hot_value
class Answer:
    """The store's answer to one demand. `figures`: by threes a rule of the plan: used, next reset of its log, when it has room.

    `version` comes with BEHIND: that of the configuration to decide by. `subject` comes with ANOTHERS: whose reservation it is.
    `place`: of a demand that may wait and was not admitted.
    """

    verdict: Verdict
    now_us: int = 0
    epoch: int = 0
    reserve_us: int = 0
    granted: Amounts = NOTHING
    output_tokens: int = 0
    expired_holds: int = 0
    figures: Sequence[int] = ()
    periods: tuple[Boundaries, ...] = ()
    version: int = 0
    subject: Subject = _NOBODY
    place: Place | None = None


def is_unready(answers: Sequence[Answer]) -> bool:
    """Whether nothing was decided, of any of them: the counters are to be made first, or the rules are behind."""
    return answers[0].verdict in (Verdict.REBUILD, Verdict.BEHIND)


@hot_value
class LimitStatus:
    """One rule as it stands. `reset_us` is None where no clock gives anything back."""

    rule: LimitRule
    used: int
    reset_us: int | None
    subject: Subject

    @property
    def limit(self) -> int:
        """The most that may be used."""
        return self.rule.limit

    @property
    def remaining(self) -> int:
        """What is left: never below 0, as more may be used than was held."""
        return max(0, self.rule.limit - self.used)


def statuses(plan: Plan, answer: Answer) -> list[LimitStatus]:
    """Every rule of the plan as it stands, in the tenant's order."""
    figures = answer.figures
    return [
        LimitStatus(rule, figures[3 * place], reset_us(rule, answer, figures[3 * place + 1]), part)
        for place, (rule, part) in enumerate(zip(plan.rules, plan.parts, strict=True))
    ]


def refusing(plan: Plan, answer: Answer, *, shadow: bool) -> Iterator[tuple[int, LimitRule, int]]:
    """The rules that refuse, of those in shadow mode or of the others: place, rule, and when its log has room (-1: it does not say)."""
    for place, rule in enumerate(plan.rules):
        frees = answer.figures[3 * place + 2]
        if frees and rule.shadow is shadow:
            yield place, rule, frees


def reset_us(rule: LimitRule, answer: Answer, of_log: int) -> int | None:
    """When the rule gives something back."""
    if rule.window is Window.SLIDING:
        # An empty window has nothing to give back: it is as free as it will be now.
        return of_log or answer.now_us
    return period_end_us(rule, answer) if rule.window in CALENDAR else None


def period_end_us(rule: LimitRule, answer: Answer) -> int:
    """When the calendar window of the rule ends that the answer's time is in."""
    bounds = answer.periods[CALENDAR.index(rule.window)]
    return next(end for end in bounds[1:] if answer.now_us < end)


def current_day(answer: Answer) -> tuple[int, int]:
    """Begin and end of the day that the answer's time is in: months and cycles end with days."""
    days = answer.periods[CALENDAR.index(Window.DAY)]
    place = next(place for place in range(1, len(days)) if answer.now_us < days[place])
    return days[place - 1], days[place]
