"""What is admitted while the store does not answer, where every rule in question may be open: little, and known to this process alone.

The tenants it admitted something of are remembered: their counters miss it, so they are dropped when the store is back, and the
ledger's snapshot counts it.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import structlog

from services.kernel.errors import MeshError, Unavailable
from services.kernel.ids import TenantId
from services.ratelimit.decision import needed
from services.ratelimit.limit_rule import MINUTE_US, SECOND_US, LimitRule, Unit, Window
from services.ratelimit.limits import Demand
from services.ratelimit.sliding_window import SlidingWindow
from services.ratelimit.terms import Plan

log = structlog.get_logger(__name__)

# Of a rule's limit, in one process, and at least 1.
_PART = 4
_CAPACITY = 50_000
_LOOK_SECONDS = 0.2
# Of tenants whose part of the store is away, as many as a look asks about: each may take as long as a decision has.
_MOST_AWAY = 16

_Key = tuple[TenantId, str, str, str]


class DroppableStore(Protocol):
    """Forgets counters."""

    async def drop(self, tenant_id: TenantId) -> None:
        """Takes a tenant's counters away, as a loss of data would. Raises: Unavailable."""
        ...


class OpenAllowance:
    """Admits from local windows, and sees to it that what it admitted is counted afterwards."""

    def __init__(self, store: DroppableStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._epochs: OrderedDict[TenantId, int] = OrderedDict()
        self._windows: OrderedDict[_Key, SlidingWindow] = OrderedDict()
        # In the order in which they are looked after.
        self._uncounted: dict[TenantId, None] = {}

    def learn(self, tenant_id: TenantId, epoch: int) -> None:
        """Remembers under which epoch the tenant's calls may be opened."""
        self._epochs[tenant_id] = epoch
        self._epochs.move_to_end(tenant_id)
        if len(self._epochs) > _CAPACITY:
            self._epochs.popitem(last=False)

    def admit(self, tenant_id: TenantId, plan: Plan, demand: Demand) -> int | None:
        """Returns the epoch to go on under; None where a rule is closed, the allowance is used up, or the tenant was never seen here."""
        rules = [rule for rule in plan.rules if not rule.shadow and _concerns(rule, demand)]
        epoch = self._epochs.get(tenant_id)
        if epoch is None or not rules or not all(rule.fails_open for rule in rules):
            return None
        now_us = int(self._clock() * SECOND_US)
        counted = [(rule, _key(tenant_id, plan, rule), needed(rule.unit, demand)) for rule in rules]
        for rule, key, need in counted:
            if need > (rule.limit if rule.window is Window.REQUEST else allowance(rule) - self._used(key, now_us)):
                return None
        for rule, key, need in counted:
            if rule.window is not Window.REQUEST:
                self._add(key, rule, now_us, need)
        self._uncounted[tenant_id] = None
        log.warning("admitted_from_local_allowance", tenant_id=str(tenant_id), rules=[rule.name for rule in rules])
        return epoch

    def owes(self, tenant_id: TenantId) -> bool:
        """Whether something of the tenant is not counted in its counters."""
        return tenant_id in self._uncounted

    async def settle(self, tenant_id: TenantId) -> None:
        """Drops the counters of a tenant of whom something is not counted in them. Raises: Unavailable while that cannot be done."""
        if self.owes(tenant_id):
            await self._store.drop(tenant_id)
            self._uncounted.pop(tenant_id, None)
            log.info("counters_dropped_after_local_allowance", tenant_id=str(tenant_id))

    async def run(self) -> None:
        """Looks after those tenants until cancelled, whether they call again or not."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            away = 0
            for tenant_id in list(self._uncounted):
                try:
                    await self.settle(tenant_id)
                except Unavailable:
                    # The others may be of another part of the store, and come first the next time.
                    if tenant_id in self._uncounted:
                        self._uncounted[tenant_id] = self._uncounted.pop(tenant_id)
                    away += 1
                    if away == _MOST_AWAY:
                        break
                except MeshError as error:
                    log.warning("counters_not_dropped", tenant_id=str(tenant_id), reason=error.reason_name)

    def _used(self, key: _Key, now_us: int) -> int:
        window = self._windows.get(key)
        return window.used(now_us) if window else 0

    def _add(self, key: _Key, rule: LimitRule, now_us: int, amount: int) -> None:
        # Only what was admitted makes a window, so that no number of refused users pushes others out.
        if key not in self._windows:
            # Calls that run are counted for a minute: nobody tells here when they end.
            self._windows[key] = SlidingWindow(rule.window_us or MINUTE_US)
        self._windows[key].add(now_us, amount)
        self._windows.move_to_end(key)
        if len(self._windows) > _CAPACITY:
            self._windows.popitem(last=False)


def _key(tenant_id: TenantId, plan: Plan, rule: LimitRule) -> _Key:
    part = rule.scope.of(plan.subject)
    return tenant_id, rule.name, part.user, part.feature


def allowance(rule: LimitRule) -> int:
    """How much of an open rule one process may admit by itself."""
    return max(1, rule.limit // _PART) if rule.limit else 0


def _concerns(rule: LimitRule, demand: Demand) -> bool:
    match rule.unit:
        case Unit.REQUESTS:
            return demand.attempt == 1
        case Unit.RETRIES:
            return demand.attempt > 1
        case _:
            return True
