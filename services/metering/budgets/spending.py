"""What budgets add up: one question for all budgets of one period that are told apart alike."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from services.kernel.ids import TenantId
from services.metering.budgets.budget import MOST_USED, BudgetMeasure, BudgetTerms, Span
from services.metering.usage_query import Dimension, GroupUse, UsageFilter, UsageQueries, UsageQuery


class EventUnits(Protocol):
    """Units that events count."""

    async def event_units(self, tenant_id: TenantId, terms: BudgetTerms, span: Span) -> int:
        """Returns what the tenant's events add to the unit of the terms, at most MOST_USED."""
        ...


class _Question(NamedTuple):
    """Budgets with one of these are answered together."""

    span: Span
    product_unit: str
    by_user: bool
    by_feature: bool


Asked = tuple[BudgetTerms, Span]


class UsageSpending:
    """Adds up sums of use, and events beside them for units of the product."""

    def __init__(self, queries: UsageQueries, events: EventUnits) -> None:
        self._queries = queries
        self._events = events

    async def of(self, tenant_id: TenantId, wanted: Collection[Asked]) -> dict[Asked, int]:
        """Returns what each pair's terms count in its span, with all that is committed."""
        questions: defaultdict[_Question, list[BudgetTerms]] = defaultdict(list)
        for terms, span in wanted:
            questions[_Question(span, terms.product_unit, bool(terms.user), bool(terms.feature))].append(terms)
        found: dict[Asked, int] = {}
        for question, asked in questions.items():
            groups = await self._queries.of_tenant(tenant_id, _query(question, asked), None, len(asked) ** 2)
            for terms in asked:
                found[terms, question.span] = sum(_counted(terms, group) for group in groups if _is_of(terms, group))
                if terms.measure is BudgetMeasure.PRODUCT_UNIT:
                    of_events = await self._events.event_units(tenant_id, terms, question.span)
                    found[terms, question.span] = min(MOST_USED, found[terms, question.span] + of_events)
        return found


def _query(question: _Question, asked: Sequence[BudgetTerms]) -> UsageQuery:
    users = sorted({terms.user for terms in asked}) if question.by_user else []
    features = sorted({terms.feature for terms in asked}) if question.by_feature else []
    told_apart = {Dimension.USER} if users else set()
    if features:
        told_apart.add(Dimension.FEATURE)
    units = [question.product_unit] if question.product_unit else []
    return UsageQuery(
        question.span.start,
        question.span.end,
        group_by=frozenset(told_apart),
        # What the limits recorded is of no type of event; what events add is asked for apart, without the levels that the sums have.
        filter=UsageFilter(users=users, features=features, product_units=units, event_types=[""] if units else []),
    )


def _is_of(terms: BudgetTerms, group: GroupUse) -> bool:
    user, feature = group.key.names[0], group.key.names[Dimension.FEATURE - Dimension.USER]
    return (user, feature) == (terms.user, terms.feature)


def _counted(terms: BudgetTerms, group: GroupUse) -> int:
    match terms.measure:
        case BudgetMeasure.COST:
            return group.cost_nano_usd
        case BudgetMeasure.TOKENS:
            return group.usage.total
        case BudgetMeasure.PRODUCT_UNIT:
            return group.quantity
