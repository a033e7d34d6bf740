"""What budgets add up: one question for all budgets of one period that are told apart alike."""

from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Sequence
from typing import NamedTuple

from services.kernel.errors import SumOutOfRange
from services.kernel.ids import TenantId
from services.metering.budgets.budget import MOST_USED, BudgetMeasure, BudgetTerms, Span
from services.metering.usage_query import Dimension, GroupUse, Measure, RowPosition, UsageFilter, UsageQueries, UsageQuery

_PART = 1_000
_ORDERS = {BudgetMeasure.COST: Measure.COST, BudgetMeasure.TOKENS: Measure.TOKENS, BudgetMeasure.PRODUCT_UNIT: Measure.QUANTITY}


class _Question(NamedTuple):
    """Budgets with one of these are answered together."""

    span: Span
    product_unit: str
    by_user: bool
    by_feature: bool


Asked = tuple[BudgetTerms, Span]


class UsageSpending:
    """Adds up sums of use."""

    def __init__(self, queries: UsageQueries) -> None:
        self._queries = queries

    async def of(self, tenant_id: TenantId, wanted: Collection[Asked]) -> dict[Asked, int]:
        """Returns what each pair's terms count in its span, with all that is committed."""
        questions: defaultdict[_Question, list[BudgetTerms]] = defaultdict(list)
        for terms, span in wanted:
            questions[_Question(span, terms.product_unit, bool(terms.user), bool(terms.feature))].append(terms)
        found: dict[Asked, int] = {}
        for question, asked in questions.items():
            for terms, used in (await self._used(tenant_id, question, asked)).items():
                found[terms, question.span] = used
        return found

    async def _used(self, tenant_id: TenantId, question: _Question, asked: Sequence[BudgetTerms]) -> dict[BudgetTerms, int]:
        # Cost and tokens are those of calls, which use no unit: what units add up to is not asked for with them.
        units = [question.product_unit]
        try:
            groups = await self._queries.of_tenant(tenant_id, _query(question, asked, units), None, len(asked) ** 2)
        except SumOutOfRange:
            # Quantities are what tenants say they are. Whose sum it is, is found by asking for each alone.
            if len(asked) == 1:
                return {asked[0]: MOST_USED}
            apart = [await self._used(tenant_id, question, [terms]) for terms in asked]
            return {terms: used for answer in apart for terms, used in answer.items()}
        by_names: defaultdict[tuple[str, str], list[GroupUse]] = defaultdict(list)
        for group in groups:
            by_names[_names(group)].append(group)
        return {terms: min(MOST_USED, sum(_counted(terms, group) for group in by_names[terms.user, terms.feature])) for terms in asked}

    async def of_each(
        self, tenant_id: TenantId, terms: BudgetTerms, span: Span, least: int
    ) -> AsyncIterator[Sequence[tuple[BudgetTerms, int]]]:
        """Yields, in parts, whoever used at least so much of what the terms count for each, the most first."""
        query, after = _query_of_each(terms, span), None
        while groups := await self._queries.of_tenant(tenant_id, query, after, _PART):
            found = [(terms.of(*_names(group)), _counted(terms, group)) for group in groups]
            yield [(own, used) for own, used in found if used >= least and _is_named(terms, own)]
            if len(groups) < _PART or found[-1][1] < least:
                return
            after = RowPosition(groups[-1].rank, groups[-1].key)


def _query(question: _Question, asked: Sequence[BudgetTerms], units: Sequence[str]) -> UsageQuery:
    users = sorted({terms.user for terms in asked}) if question.by_user else []
    features = sorted({terms.feature for terms in asked}) if question.by_feature else []
    told_apart = {Dimension.USER} if users else set()
    if features:
        told_apart.add(Dimension.FEATURE)
    return UsageQuery(
        question.span.start,
        question.span.end,
        group_by=frozenset(told_apart),
        filter=UsageFilter(users=users, features=features, product_units=units),
    )


def _query_of_each(terms: BudgetTerms, span: Span) -> UsageQuery:
    each = [dimension for dimension, wanted in ((Dimension.USER, terms.each_user), (Dimension.FEATURE, terms.each_feature)) if wanted]
    one = UsageFilter(
        users=[terms.user] if terms.user else [], features=[terms.feature] if terms.feature else [], product_units=[terms.product_unit]
    )
    return UsageQuery(span.start, span.end, group_by=frozenset(each), filter=one, order_by=_ORDERS[terms.measure])


def _names(group: GroupUse) -> tuple[str, str]:
    return group.key.names[0], group.key.names[Dimension.FEATURE - Dimension.USER]


def _is_named(terms: BudgetTerms, own: BudgetTerms) -> bool:
    return bool((own.user or not terms.each_user) and (own.feature or not terms.each_feature))


def _counted(terms: BudgetTerms, group: GroupUse) -> int:
    match terms.measure:
        case BudgetMeasure.COST:
            return group.cost_nano_usd
        case BudgetMeasure.TOKENS:
            return group.usage.total
        case BudgetMeasure.PRODUCT_UNIT:
            return group.quantity
