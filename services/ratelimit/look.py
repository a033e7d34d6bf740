"""The limits as they stand: asked for, never changed by it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.kernel.ids import TenantId
from services.kernel.tenant_context import TenantContext
from services.ratelimit.decision import Refusal, not_included, refusal, shadow_refusals
from services.ratelimit.limits import Demand, Subject
from services.ratelimit.ready_counters import ReadyCounters, tenant_of
from services.ratelimit.standing import Answer, LimitStatus, statuses
from services.ratelimit.terms import Plan, Terms

# Asks for nothing at all, so that no rule refuses.
_NO_DEMAND = Demand(attempt=2)


@dataclass(frozen=True, slots=True)
class Look:
    """The limits as they stand, what would keep the demand out, and what would if it were enforced."""

    limits: Sequence[LimitStatus]
    refusal: Refusal | None
    shadow_refusals: Sequence[Refusal]


class LookStore(Protocol):
    """Reads counters."""

    async def look(self, tenant_id: TenantId, terms: Terms, plan: Plan, demand: Demand) -> Answer:
        """Says what is used and whether the demand would be held. Writes nothing."""
        ...


class Looks:
    """Looks at a tenant's limits."""

    def __init__(self, store: LookStore, counters: ReadyCounters) -> None:
        self._store = store
        self._counters = counters

    async def check(self, context: TenantContext, subject: Subject, demand: Demand, product_unit: str = "") -> Look:
        """Tells whether a demand would be admitted now. Counts nothing. Raises: Forbidden FEATURE, as a use would.

        A tenant without counters gets them from the ledger first: its limits must be readable before its first call.
        """
        return await self._look(context, subject, demand, product_unit, as_use=bool(product_unit))

    async def every(self, context: TenantContext, subject: Subject) -> list[LimitStatus]:
        """Every rule of all together and of the subject, calls' rules first; also of units that only own rules mention."""
        terms = await self._counters.terms_of(context)
        found: list[LimitStatus] = []
        for product_unit in ("", *sorted(terms.product_units)):
            found += (await self._look(context, subject, _NO_DEMAND, product_unit, as_use=False)).limits
        return found

    async def _look(self, context: TenantContext, subject: Subject, demand: Demand, product_unit: str, *, as_use: bool) -> Look:
        tenant_id = tenant_of(context)

        async def question(terms: Terms) -> list[Answer]:
            if as_use and product_unit not in terms.included_units:
                raise not_included(product_unit)
            return [await self._store.look(tenant_id, terms, terms.plan(subject, product_unit), demand)]

        terms, (answer,) = await self._counters.ask(context, question)
        plan = terms.plan(subject, product_unit)
        return Look(statuses(plan, answer), refusal(plan, answer, demand), shadow_refusals(plan, answer, demand))
