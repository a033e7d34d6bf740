"""Tenants of whom the configuration says the same are decided by the same rules, made ready once; any difference parts them."""

import gc
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.common.v1 import limit_rule_pb2
from mesh.tenant.v1.tenant_service_pb2 import FeatureTerms, PlanLimits, TenantConfig
from services.ratelimit.adapters.tenant_rules import SharedTerms, terms_of
from services.ratelimit.limits import Subject
from services.ratelimit.terms import PlanForm
from tests.ratelimit.rules import rule


def config() -> TenantConfig:
    """One rule of each scope, in a place of its own."""
    rules = [rule("rpm", "requests", 60, 10), rule("tpd", "tokens", "day", 5_000, "user")]
    made = TenantConfig(version=3, limit_rules=limit_rule_pb2.LimitRules(rules=rules, time_zone="Asia/Kathmandu", weight=2))
    made.limit_rules.cycle_anchor_time.FromDatetime(datetime(2026, 2, 7, 3, tzinfo=UTC))
    made.features["search"].enabled = True
    return made


def moved(timestamp: Timestamp, seconds: int) -> None:
    """Moves a time."""
    timestamp.FromSeconds(timestamp.seconds + seconds)


CHANGES: dict[str, Callable[[TenantConfig], object]] = {
    "version": lambda made: setattr(made, "version", 4),
    "limit": lambda made: setattr(made.limit_rules.rules[0], "limit", 11),
    "name": lambda made: setattr(made.limit_rules.rules[1], "name", "other"),
    "one more": lambda made: made.limit_rules.rules.append(rule("more", "tokens", 60, 5)),
    "order": lambda made: made.limit_rules.rules.reverse(),
    "zone": lambda made: setattr(made.limit_rules, "time_zone", "UTC"),
    "anchor": lambda made: moved(made.limit_rules.cycle_anchor_time, 86_400),
    "feature": lambda made: setattr(made.features["other"], "enabled", True),
    "guard": lambda made: setattr(made.limit_rules.abuse_guard, "refusals_per_minute", 9),
    "weight": lambda made: setattr(made.limit_rules, "weight", 3),
    "no rules": lambda made: made.ClearField("limit_rules"),
}


def test_the_same_is_shared_whatever_else_the_configurations_say() -> None:
    """When in its day a tenant subscribed, and what limits do not depend on, parts nobody."""
    shared = SharedTerms()
    one, other = config(), config()
    moved(other.limit_rules.cycle_anchor_time, 60)
    other.features["search"].CopyFrom(FeatureTerms(enabled=True))
    other.features["off"].enabled = False
    assert shared.of(one) is shared.of(other)
    assert shared.of(TenantConfig(limits=PlanLimits(requests_per_minute=3))) is shared.of(
        TenantConfig(limits=PlanLimits(requests_per_minute=3))
    )


@pytest.mark.parametrize("change", CHANGES)
def test_any_difference_makes_others(change: str) -> None:
    """And they are what they would be by themselves."""
    shared, changed = SharedTerms(), config()
    CHANGES[change](changed)
    first, second, alone = shared.of(config()), shared.of(changed), terms_of(changed)
    assert second is not first
    assert (second.rules, second.version, second.weight, second.guard) == (alone.rules, alone.version, alone.weight, alone.guard)
    assert (second.families_digest, second.included_units) == (alone.families_digest, alone.included_units)
    assert second.plan(Subject("ada", "chat")) == alone.plan(Subject("ada", "chat"))


def test_rules_that_nobody_has_any_more_go() -> None:
    """Each change of a configuration leaves the rules before it to nobody, with all that was made of its users."""
    shared, made = SharedTerms(), config()
    made.limit_rules.rules[0].name = "only_here"
    for version in range(50):
        made.version = version
        shared.of(made).plan(Subject("ada", "chat"))
    gc.collect()
    assert len(shared._made) == 0
    forms = [thing for thing in gc.get_objects() if isinstance(thing, PlanForm)]
    assert not [form for form in forms if "only_here" in {rule.name for rule in form.rules}]
