"""Answers as messages: made by filling anew what a plan's answers share, and the same as if each were built."""

from dataclasses import replace

from google.protobuf.duration_pb2 import Duration

from mesh.common.v1 import limit_rule_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from mesh.tenant.v1.tenant_service_pb2 import TenantConfig
from services.ratelimit.adapters.tenant_rules import terms_of
from services.ratelimit.limits import Amounts, Demand, Shortening, Subject
from services.ratelimit.reservation import Held
from services.ratelimit.servicers.held_messages import held_content
from services.ratelimit.servicers.limit_messages import limit_messages
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


def held_message(hold: Held, lease: Duration) -> messages.ReserveResponse:
    """The answer as its caller reads it."""
    return messages.ReserveResponse.FromString(held_content(hold, lease))


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


def test_an_answer_of_another_lease_or_length_says_so() -> None:
    """What is filled anew is all that answers may differ in: what was shortened, waited, granted, and held for how long."""
    known, subject, short = terms(), Subject("ada", "chat"), Shortening(200, 20, 0)
    plain = held(known, subject, 4, Amounts(7, 9))
    others = (
        replace(plain, demand=Demand(Amounts(207, 9), shortening=short), answer=replace(plain.answer, epoch=5, output_tokens=100)),
        replace(plain, waited_seconds=1.5, answer=replace(plain.answer, granted=Amounts(0, 0), reserve_us=plain.answer.reserve_us - 1)),
        replace(plain, degraded=True),
    )
    shortened, waited, degraded = (held_message(other, LEASE) for other in others)
    assert (shortened.epoch, shortened.granted_output_tokens, shortened.shortened) == (5, 100, True)
    assert (waited.waited.ToMilliseconds(), waited.reserve_time.ToMicroseconds()) == (1_500, others[1].answer.reserve_us)
    assert (degraded.degraded, len(degraded.limits), degraded.epoch) == (True, 0, 4)
    expected = held_message(plain, LEASE).SerializeToString(deterministic=True)
    for other in others:
        alone = held_message(replace(other, plan=terms().plan(subject)), LEASE)
        assert alone == held_message(other, LEASE) != held_message(plain, LEASE)
        assert held_message(plain, LEASE).SerializeToString(deterministic=True) == expected
    longer = Duration(seconds=7)
    assert [held_message(plain, lease).lease for lease in (LEASE, longer, LEASE)] == [LEASE, longer, LEASE]
