"""Keeps the holds of running calls alive: one batch a second, at the limits and the ledger at the same time. Marks those that were lost."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import structlog

from services.inference.call import CallRef, Lease
from services.inference.ports import Ledger, Limits
from services.kernel.errors import MeshError

log = structlog.get_logger(__name__)

RENEW_SECONDS = 1.0


class LeaseKeeper:
    """The leases of one process. Its loop runs as a background task of the app."""

    def __init__(self, limits: Limits, ledger: Ledger, renew_seconds: float = RENEW_SECONDS) -> None:
        self._limits = limits
        self._ledger = ledger
        self._renew_seconds = renew_seconds
        self._leases: dict[CallRef, Lease] = {}

    def begin(self, ref: CallRef) -> Lease:
        """Starts to keep a hold that the limits have just confirmed."""
        lease = self._leases[ref] = Lease(ref)
        return lease

    def end(self, lease: Lease) -> None:
        """Stops to keep it. Idempotent."""
        self._leases.pop(lease.ref, None)

    async def run(self) -> None:
        """Renews for ever, at a fixed pace whatever a renewal takes."""
        due = time.monotonic()
        while True:
            due = max(due + self._renew_seconds, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            await self.renew()

    async def renew(self) -> None:
        """Prolongs every lease once. A store that does not answer is tried again next time."""
        held = list(self._leases)
        opened = [ref for ref, lease in self._leases.items() if lease.opened]
        async with asyncio.TaskGroup() as both:
            if held:
                both.create_task(self._renew_at(self._limits.renew, held, "ratelimit"))
            if opened:
                both.create_task(self._renew_at(self._ledger.renew, opened, "metering"))

    async def _renew_at(self, renew: Callable[[Sequence[CallRef]], Awaitable[Sequence[CallRef]]], refs: list[CallRef], store: str) -> None:
        try:
            lost = await renew(refs)
        except MeshError as error:
            log.warning("leases_not_renewed", store=store, count=len(refs), error=str(error))
            return
        for ref in lost:
            lease = self._leases.get(ref)
            if lease is not None and not lease.lost:
                lease.lost = True
                log.warning("lease_lost", store=store, reservation_id=str(ref.reservation_id))
