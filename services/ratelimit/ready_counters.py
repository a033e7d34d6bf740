"""Decisions on counters that are there and are the right ones.

Rebuilt first where they are gone, by the newest rules where these are behind.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from services.kernel.ids import TenantId
from services.kernel.request_context import remaining_seconds
from services.kernel.tenant_context import TenantContext
from services.ratelimit.fencing import Fencing
from services.ratelimit.open_allowance import OpenAllowance
from services.ratelimit.rebuild import Rebuilder, rebuilding
from services.ratelimit.standing import Answer, Verdict
from services.ratelimit.terms import Terms

_MOST_TURNS = 4
_DEFAULT_DEADLINE_SECONDS = 5.0

A = TypeVar("A", bound=Sequence[Answer])


class TermsOf(Protocol):
    """Knows the rules of tenants."""

    async def __call__(self, context: TenantContext, at_least: int = 0) -> Terms:
        """Returns the rules of the context's tenant, of its configuration's version, of `at_least`, or newer. Raises: MeshError."""
        ...


class ReadyCounters:
    """Asks the store by the tenant's rules, again after what keeps it from answering has been seen to."""

    def __init__(self, terms_of: TermsOf, rebuilder: Rebuilder, fencing: Fencing, allowance: OpenAllowance) -> None:
        self.terms_of = terms_of
        self.allowance = allowance
        self._rebuilder = rebuilder
        self._fencing = fencing

    async def ask(self, context: TenantContext, question: Callable[[Terms], Awaitable[A]]) -> tuple[Terms, A]:
        """Returns answers and the rules they were given by. `question` answers for all of its demands alike when it cannot be decided.

        Raises: Unavailable LIMITS_REBUILDING, NotFound for an erased tenant.
        """
        tenant_id = tenant_of(context)
        terms = await self.terms_of(context)
        await self.allowance.settle(tenant_id)
        for _ in range(_MOST_TURNS):
            answers = await question(terms)
            first = answers[0]
            if first.verdict is Verdict.REBUILD:
                await self._rebuild(context, terms)
            elif first.verdict is Verdict.BEHIND:
                terms = await self.terms_of(context, first.version)
            else:
                if first.epoch:
                    self.allowance.learn(tenant_id, first.epoch)
                return terms, answers
        raise rebuilding("the rules are changing")

    async def _rebuild(self, context: TenantContext, terms: Terms) -> None:
        try:
            async with asyncio.timeout(remaining_seconds(_DEFAULT_DEADLINE_SECONDS) * 0.9):
                await self._rebuilder.ensure(context, terms)
        except TimeoutError:
            raise rebuilding("the caller's deadline is near") from None
        self._fencing.watch(tenant_of(context))


def tenant_of(context: TenantContext) -> TenantId:
    """The tenant of a context that must have one."""
    if context.tenant_id is None:
        msg = "a reservation needs a tenant: the method's policy requires one"
        raise RuntimeError(msg)
    return context.tenant_id
