"""The replay itself: what it must find, and what it must not take for a fault."""

from uuid import UUID, uuid4

import pytest

from mesh.metering.v1 import ledger_service_pb2 as ledger
from services.kernel.ids import new_uuid7
from services.ratelimit.limit_rule import SECOND_US, LimitRule, Scope, Unit, Window
from services.ratelimit.limits import NOBODY, Amounts, Demand
from services.ratelimit.terms import Terms
from tests.ratelimit.decision_log import Asked, DecisionLog, Kept, Raise, Told
from tests.ratelimit.replay import Findings, Replay
from tests.ratelimit.scripted_peer import LedgerCall

BEGAN_US = 1_800_000_000_000_000
TENANT = uuid4()


class Story:
    """Calls of one tenant under one budget of 100, second by second."""

    def __init__(self) -> None:
        self.log = DecisionLog()
        self.calls: dict[bytes, LedgerCall] = {}

    def call(self, second: int, cost: int, *, end: int | None = None, billed: int = 0) -> Asked:
        """A call that was held, and settled at what was billed."""
        asked = Asked(new_uuid7(), TENANT, NOBODY, Demand(Amounts(0, cost)))
        state, end_us = ("held", None) if end is None else ("settled", at_us(end))
        self.log.asked[asked.id] = asked
        self.log.held.append(Told(asked, at_us(second)))
        self.log.kept[asked.id] = Kept(state, at_us(second), Amounts(0, cost if end is None else billed), end_us)
        if end is not None:
            self.calls[asked.id.bytes] = LedgerCall(ledger.CALL_STATE_SETTLED, cost=billed)
        return asked

    def findings(self) -> Findings:
        """What the replay finds."""
        findings = Findings()
        budget = LimitRule("budget", Unit.COST, Window.MONTH, 100, scope=Scope.TENANT)
        Replay(self.log, TENANT, Terms([budget]), 60 * SECOND_US, findings, self.calls).run()
        return findings


def at_us(second: int) -> int:
    """A moment of the story."""
    return BEGAN_US + second * SECOND_US


@pytest.mark.parametrize(("asked_at", "answered_at", "wrong"), [(2, 2, 0), (2, 5, 0), (4, 4, 1), (4, 5, 1)])
def test_a_raise_is_right_if_it_fitted_when_it_may_have_been_made(asked_at: int, answered_at: int, wrong: int) -> None:
    """Another call is billed more than it held at second 3: raised before that it fitted, and raised after it did not."""
    story = Story()
    story.call(0, 40, end=3, billed=80)
    story.call(1, 20).raises.append(Raise(Amounts(0, 50), at_us(asked_at), at_us(answered_at)))
    assert len(story.findings().over_admissions) == wrong


def test_an_end_that_the_ledger_does_not_know_frees_nothing() -> None:
    """A hold that went without the ledger's word is one that should have kept the next call out."""
    story = Story()
    first = story.call(0, 80, end=1, billed=10)
    story.call(2, 30)
    assert (story.findings().over_admissions, story.findings().unfounded_ends) == ([], [])
    story.calls[first.id.bytes].state = ledger.CALL_STATE_UNRESOLVED
    findings = story.findings()
    assert [len(findings.over_admissions), len(findings.unfounded_ends)] == [1, 1]


def test_a_decision_at_another_time_than_it_was_asked_for_is_found() -> None:
    """A clock that is a second and more off is none that the store has."""
    log, asked = DecisionLog(), Asked(UUID(int=1), TENANT, NOBODY, Demand())
    log.date(asked, at_us(5), at_us(4), at_us(6))
    assert log.wrong_times == []
    log.date(asked, at_us(43), at_us(4), at_us(6))
    assert len(log.wrong_times) == 1
