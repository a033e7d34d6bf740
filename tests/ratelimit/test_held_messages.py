"""Answers of many tenants by the same code, one after another: each is what it would be if nothing had been answered before it."""

import random
from collections.abc import Iterator

from google.protobuf.duration_pb2 import Duration

from mesh.common.v1 import limit_rule_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from mesh.tenant.v1.tenant_service_pb2 import TenantConfig
from services.ratelimit.adapters.tenant_rules import terms_of
from services.ratelimit.limits import NOBODY, Amounts, Demand, Shortening, Subject
from services.ratelimit.reservation import Held
from services.ratelimit.servicers.held_messages import held_content
from services.ratelimit.servicers.limit_messages import duration, limit_messages, refusal_message, set_timestamp
from services.ratelimit.standing import Answer, Verdict
from services.ratelimit.terms import Plan, Terms
from tests.ratelimit.callers import now_us
from tests.ratelimit.rules import SHADOW, rule

DAY_US = 86_400_000_000
LEASES = (Duration(seconds=5), Duration(seconds=5), Duration(seconds=9))
SUBJECTS = (NOBODY, Subject("ada"), Subject("", "chat"), Subject("ada", "chat"), Subject("ада,\"x\\'", "chat"))


def rules_of(rng: random.Random) -> list[limit_rule_pb2.LimitRule]:
    """Some rules, of the same names as everybody's and with other limits."""
    all_of_them = [
        rule("rate", "requests", 60, rng.randrange(1, 50)),
        rule("day", "tokens", "day", rng.randrange(1, 9_000), "user"),
        rule("budget", "cost", "month", rng.randrange(1, 10**15), "feature"),
        rule("cycle", "tokens", "cycle", rng.randrange(1, 9_000), "both"),
        rule("at_once", "running", "running", rng.randrange(1, 9)),
        rule("largest", "tokens", "request", rng.randrange(1, 900)),
        rule("tried", "tokens", 30, rng.randrange(1, 40), "both", mode=SHADOW),
        rule("tried_cost", "cost", "day", rng.randrange(1, 40), mode=SHADOW),
    ]
    return rng.sample(all_of_them, rng.randrange(len(all_of_them) + 1))


def terms(rng: random.Random, zone: str) -> Terms:
    """A tenant's rules."""
    return terms_of(TenantConfig(version=1, limit_rules=limit_rule_pb2.LimitRules(rules=rules_of(rng), time_zone=zone)))


def held(rng: random.Random, known: Terms, plan: Plan) -> Held:
    """A hold of which everything may be there or not."""
    now = now_us() + rng.choice((0, DAY_US, 31 * DAY_US))
    figures: list[int] = []
    for each in plan.rules:
        would_refuse = now + rng.randrange(1_000_000) if each.shadow and rng.random() < 0.3 else 0
        figures += (rng.choice((0, 1, 39, 10_000, 2**53)), rng.choice((0, now + rng.randrange(10**8))), would_refuse)
    amounts = Amounts(rng.randrange(3), rng.randrange(3))
    short = rng.choice((None, None, Shortening(200, 20, 0)))
    demand = Demand(amounts, rng.randrange(1, 4), shortening=short)
    if rng.random() < 0.1:
        return Held.from_allowance(plan, demand, rng.randrange(4))
    output = rng.choice((20, 200)) if short else 0
    answer = Answer(Verdict.HELD, now, rng.randrange(4), rng.choice((0, now)), amounts, output, 0, figures, known.boundaries(now))
    return Held(plan, answer, demand, waited_seconds=rng.choice((0.0, 0.0, 1.5)))


def built_afresh(hold: Held, lease: Duration) -> messages.ReserveResponse:
    """The answer, made of what the hold says and of nothing else."""
    answer = hold.answer
    message = messages.ReserveResponse(
        epoch=answer.epoch,
        lease=lease,
        limits=limit_messages(hold.limits),
        granted=messages.Amounts(tokens=answer.granted.tokens, cost_nano_usd=answer.granted.cost_nano_usd),
        granted_output_tokens=answer.output_tokens,
        shortened=hold.shortened,
        shadow_refusals=[refusal_message(item) for item in hold.shadow_refusals],
        degraded=hold.degraded,
    )
    message.reserve_time.SetInParent()
    set_timestamp(message.reserve_time, answer.reserve_us)
    if hold.waited_seconds:
        message.waited.CopyFrom(duration(hold.waited_seconds))
    return message


def holds(rng: random.Random, tenants: list[Terms]) -> Iterator[tuple[Held, Duration]]:
    """Holds of anybody in any order; of some the rules change in between."""
    for _ in range(1_500):
        if rng.random() < 0.02:
            tenants[rng.randrange(len(tenants))] = terms(rng, rng.choice(("", "Asia/Kathmandu")))
        known = rng.choice(tenants)
        yield held(rng, known, known.plan(rng.choice(SUBJECTS))), rng.choice(LEASES)


def test_each_of_many_answers_is_as_if_it_were_the_only_one() -> None:
    """Whatever was answered before it, and to whom: what is read from it is what the hold says, and nothing else."""
    rng = random.Random(77)
    tenants = [terms(rng, zone) for zone in ("", "", "America/New_York", "Pacific/Kiritimati")]
    for hold, lease in holds(rng, tenants):
        assert messages.ReserveResponse.FromString(held_content(hold, lease)) == built_afresh(hold, lease)


def test_every_field_of_an_answer_is_of_the_rules_or_written_each_time() -> None:
    """An answer's form is shared by all who have the same rules: a field that the contract gains must be sorted in here, and in `fill`."""
    of_the_rules = {"rule", "limit", "unit", "mode"}
    written = {"used", "remaining", "reset_time", "user", "feature"}
    assert {field.name for field in messages.LimitStatus.DESCRIPTOR.fields} == of_the_rules | written
    of_the_form, filled = {"lease"}, {"epoch", "reserve_time", "limits", "granted", "granted_output_tokens", "shortened"}
    added = {"shadow_refusals", "waited", "degraded"}
    assert {field.name for field in messages.ReserveResponse.DESCRIPTOR.fields} == of_the_form | filled | added
