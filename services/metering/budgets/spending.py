"""What budgets add up: one question for all budgets of one period that are told apart alike."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

from services.kernel.errors import SumOutOfRange
from services.kernel.ids import TenantId
from services.metering.budgets.budget import MOST_USED, BudgetMeasure, BudgetTerms, Span
from services.metering.usage_query import Dimension, GroupUse, UsageFilter, UsageQueries, UsageQuery


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
        return {terms: min(MOST_USED, sum(_counted(terms, group) for group in groups if _is_of(terms, group))) for terms in asked}


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
