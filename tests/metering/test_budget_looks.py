"""A tenant whose budgets take too long to look at is set aside: the others' thresholds do not wait for it again and again."""

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.kernel.ids import TenantId, new_uuid7
from services.metering.budgets import keeper
from services.metering.budgets.budget import Budget
from services.metering.budgets.keeper import BudgetKeeper
from services.metering.budgets.ports import Marked, TakenMarks


class Marks:
    """Some tenants, marked for ever."""

    def __init__(self, tenants: Sequence[TenantId]) -> None:
        self.tenants = tenants

    @asynccontextmanager
    async def take(self, most: int, passed_over: Collection[TenantId]) -> AsyncIterator[TakenMarks]:
        wanted = [Marked(tenant_id) for tenant_id in self.tenants if tenant_id not in passed_over]
        yield TakenMarks(len(wanted), wanted)


class Store:
    """Has no budget of anybody, and takes ever so long to say so of one tenant."""

    def __init__(self, slow: TenantId) -> None:
        self.slow = slow
        self.asked: list[TenantId] = []

    async def list_all(self, tenant_id: TenantId) -> Sequence[Budget]:
        self.asked.append(tenant_id)
        if tenant_id == self.slow:
            await asyncio.Event().wait()
        return []


async def test_who_takes_too_long_is_set_aside_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is begun once, the others in every look; when its time is over it is begun again."""
    monkeypatch.setattr(keeper, "_TENANT_SECONDS", 0.01)
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(keeper, "time", SimpleNamespace(monotonic=lambda: clock.now))
    slow, quick = TenantId(new_uuid7()), TenantId(new_uuid7())
    store = Store(slow)
    unused = cast("Any", None)
    looker = BudgetKeeper(Marks([slow, quick]), cast("Any", store), unused, unused, poll_seconds=1.0)
    for _ in range(3):
        await looker.look()
    assert store.asked == [slow, quick, quick, quick]
    clock.now += 61
    await looker.look()
    assert store.asked[4:] == [slow, quick]
