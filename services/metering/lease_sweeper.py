"""Turns open calls whose lease lapsed into unresolved ones. Never for leases that could not be renewed because the ledger was away."""

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

import structlog

from services.kernel.errors import MeshError
from services.metering.outbox import CallEnd, OutboxRelay

log = structlog.get_logger(__name__)

MOST_PER_SWEEP = 1_000
# Ends that lie closer together than this are swept together.
_SHORTEST_PAUSE_SECONDS = 0.05


class SweepStore(Protocol):
    """The leases, for all tenants."""

    async def sweep(self, most: int) -> Sequence[CallEnd]:
        """Leaves lapsed calls unresolved, each with its PIN in the outbox, and returns those."""
        ...

    async def next_lapse_seconds(self) -> float | None:
        """Returns in how many seconds the nearest lease ends, by the store's clock; negative when it has, None without any lease."""
        ...


class LeaseSweeper:
    """One loop for `BackgroundTasks`: `run`."""

    def __init__(self, store: SweepStore, relay: OutboxRelay, *, lease_seconds: float, sweep_seconds: float) -> None:
        self._store = store
        self._relay = relay
        self._lease_seconds = lease_seconds
        self._sweep_seconds = sweep_seconds

    async def run(self) -> None:
        """Sweeps for ever, whenever a lease ends.

        Not before one whole lease after a start, or after the store was away: holders could not renew meanwhile.
        """
        not_before = time.monotonic() + self._lease_seconds
        pause = self._sweep_seconds
        while True:
            await asyncio.sleep(pause)
            try:
                if time.monotonic() >= not_before:
                    await self.sweep()
                nearest = await self._store.next_lapse_seconds()
                pause = self._pause(self._sweep_seconds if nearest is None else nearest, not_before)
            except MeshError as error:
                # Asked on and on: the lease that holders are given begins when the store is back.
                not_before, pause = time.monotonic() + self._lease_seconds, self._sweep_seconds
                log.warning("lease_sweep_failed", reason=error.reason_name)

    async def sweep(self) -> int:
        """Sweeps until nothing lapsed is left; returns how many calls became unresolved."""
        total = 0
        while True:
            ends = await self._store.sweep(MOST_PER_SWEEP)
            self._relay.send(ends)
            total += len(ends)
            if len(ends) < MOST_PER_SWEEP:
                break
        if total:
            log.warning("leases_lapsed", calls=total)
        return total

    def _pause(self, nearest_seconds: float, not_before: float) -> float:
        return min(self._sweep_seconds, max(nearest_seconds, not_before - time.monotonic(), _SHORTEST_PAUSE_SECONDS))
