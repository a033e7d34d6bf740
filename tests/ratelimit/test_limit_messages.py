"""Answers as messages: made by copying what a plan's answers share, and the same as if each were built."""

from google.protobuf.duration_pb2 import Duration

from mesh.common.v1 import limit_rule_pb2
from mesh.tenant.v1.tenant_service_pb2 import TenantConfig
from services.ratelimit.adapters.tenant_rules import terms_of
from services.ratelimit.limits import Amounts, Demand, Subject
from services.ratelimit.reservation import Held
from services.ratelimit.servicers.limit_messages import held_message, limit_messages
from services.ratelimit.standing import Answer, Verdict
from services.ratelimit.terms import Terms
from tests.ratelimit.callers import now_us
from tests.ratelimit.rules import SHADOW, rule

RULES = (
    rule("rpm", "requests", 60, 10),
    rule("tpd", "tokens", "day", 5_000, "user"),
    rule("budget", "cost", "month", 7_000, "feature"),
    rule("at_once", "running", "running", 3),
    rule("largest", "tokens", "request", 900),
    rule("tried", "tokens", 30, 40, "both", mode=SHADOW),
)
LEASE = Duration(seconds=5)


def terms() -> Terms:
    """One rule of each kind."""
    return terms_of(TenantConfig(version=1, limit_rules=limit_rule_pb2.LimitRules(rules=RULES)))


def held(known: Terms, subject: Subject, used: int, granted: Amounts) -> Held:
    """A hold after which every rule has so much used, and more each."""
    now = now_us()
    figures = [value for place in range(len(RULES)) for value in (used + place, now + 1_000_000 * place if used else 0, 0)]
    return Held(known.plan(subject), Answer(Verdict.HELD, now, 4, now, granted, 0, 0, figures, known.boundaries(now)), Demand(granted))


def test_a_held_answer_tells_of_each_rule_what_its_standing_is() -> None:
    """The limits in the answer are those of the hold, rule by rule: used, what remains, when it gives something back, and whose it is."""
    known, subject = terms(), Subject("ada", "chat")
    hold = held(known, subject, 4, Amounts(7, 9))
    message = held_message(hold, LEASE)
    assert len(message.limits) == len(RULES)
    assert list(message.limits) == limit_messages(hold.limits)
    assert (message.granted.tokens, message.granted.cost_nano_usd, message.lease) == (7, 9, LEASE)


def test_an_answer_carries_nothing_of_the_one_before_it() -> None:
    """Two holds of one plan, and one of another user: each answer has its own figures, whatever was answered first."""
    known = terms()
    for user, used in (("ada", 9_000), ("ada", 0), ("bob", 2), ("ada", 1)):
        hold = held(known, Subject(user, "chat"), used, Amounts(used, 0))
        assert list(held_message(hold, LEASE).limits) == limit_messages(hold.limits)
