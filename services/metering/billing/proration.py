"""Which terms were in force when: cuts a billing period into spans of one plan version each. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from services.metering.billing.exact import share
from services.metering.billing.periods import BillingPeriod
from services.metering.billing.terms import PlanVersion

_SECOND = timedelta(seconds=1)
Plans = Mapping[str, Sequence[PlanVersion]]


class UnknownBillingPlan(Exception):
    """No version of the plan was ever loaded; the argument is its name."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """A plan from `effective_time`, a whole second, until the next one's. Of two with one time the one with the higher number holds."""

    number: int
    plan: str
    effective_time: datetime
    anchor_day: int


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a period under one version of one plan."""

    period: BillingPeriod
    start_time: datetime
    end_time: datetime
    version: PlanVersion

    def part_of(self, whole: int) -> int:
        """Returns the span's part of what is due for the whole period, by seconds; the parts of all spans add up to it."""
        origin = self.period.start_time
        return share(whole, (self.start_time - origin) // _SECOND, (self.end_time - origin) // _SECOND, self.period.seconds)

    def usage_alone(self) -> "Span":
        """Returns the span of a period that had no invoice: only its usage is charged."""
        return replace(self, version=replace(self.version, terms=self.version.terms.usage_alone()))


def spans_of(period: BillingPeriod, subscriptions: Sequence[Subscription], tier_plan: str, plans: Plans) -> list[Span]:
    """Cuts a period; without any subscription, the tier's plan holds for all of it. Subscription 1 also holds before its time.

    Raises: UnknownBillingPlan.
    """
    ordered = sorted(subscriptions, key=lambda item: (item.effective_time, item.number))
    bounds = {period.start_time, *(item.effective_time for item in ordered)}
    bounds |= {version.effective_time for versions in plans.values() for version in versions}
    starts = sorted(bound for bound in bounds if period.start_time <= bound < period.end_time)
    spans: list[Span] = []
    for start, end in zip(starts, [*starts[1:], period.end_time], strict=True):
        version = _version_at(start, _plan_at(start, ordered, tier_plan), plans)
        if spans and spans[-1].version == version:
            start = spans.pop().start_time
        spans.append(Span(period, start, end, version))
    return spans


def _plan_at(moment: datetime, ordered: Sequence[Subscription], tier_plan: str) -> str:
    if not ordered:
        return tier_plan
    begun = [item for item in ordered if item.effective_time <= moment]
    # Not the earliest: a later one may still be put before it, and what was billed by this one must stay.
    return (begun[-1] if begun else min(ordered, key=lambda item: item.number)).plan


def _version_at(moment: datetime, plan: str, plans: Plans) -> PlanVersion:
    versions = sorted(plans.get(plan, ()), key=lambda version: version.effective_time)
    if not versions:
        raise UnknownBillingPlan(plan)
    begun = [version for version in versions if version.effective_time <= moment]
    return begun[-1] if begun else versions[0]
