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


class SweepStore(Protocol):
    """The leases, for all tenants."""

    async def sweep(self, most: int) -> Sequence[CallEnd]:
        """Leaves lapsed calls unresolved, each with its PIN in the outbox, and returns those."""
        ...


class LeaseSweeper:
    """One loop for `BackgroundTasks`: `run`."""

    def __init__(self, store: SweepStore, relay: OutboxRelay, *, lease_seconds: float, sweep_seconds: float) -> None:
        self._store = store
        self._relay = relay
        self._lease_seconds = lease_seconds
        self._sweep_seconds = sweep_seconds

    async def run(self) -> None:
        """Sweeps for ever. Waits one whole lease first, and again after the store was away: holders could not renew meanwhile."""
        not_before = time.monotonic() + self._lease_seconds
        while True:
            await asyncio.sleep(max(self._sweep_seconds, not_before - time.monotonic()))
            try:
                await self.sweep()
            except MeshError as error:
                not_before = time.monotonic() + self._lease_seconds
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
