"""Ends re-ratings that were begun and left: whoever asked for one need not come back for it to be whole."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import structlog

from services.kernel.errors import MeshError
from services.kernel.ids import TenantId
from services.metering.rerating import RerateDesk, Rerating

log = structlog.get_logger(__name__)

_PAGE = 100


@dataclass(frozen=True, slots=True)
class RerateRun:
    """A re-rating of a tenant, numbered in the order they were begun; `finish_time` is None while it is not done."""

    tenant_id: TenantId
    number: int
    rerating: Rerating
    begin_time: datetime
    finish_time: datetime | None


@dataclass(frozen=True, slots=True)
class RunPosition:
    """The last re-rating of the page before."""

    tenant_id: TenantId
    number: int


class RerateRuns(Protocol):
    """The re-ratings of all tenants."""

    async def page(self, only: TenantId | None, after: RunPosition | None, size: int, *, undone_only: bool) -> Sequence[RerateRun]:
        """Returns up to `size` re-ratings after a position, by tenant and number."""
        ...

    async def left(self, after: RunPosition | None, size: int, idle_seconds: float) -> Sequence[RerateRun]:
        """Returns up to `size` that are not done and that nobody went on with for so long."""
        ...


class RerateJob:
    """One loop for `BackgroundTasks`: `run`. Any number of replicas may run it: a call is rated anew once."""

    def __init__(self, runs: RerateRuns, desk: RerateDesk, *, resume_seconds: float) -> None:
        self._runs = runs
        self._desk = desk
        self._resume_seconds = resume_seconds

    async def run(self) -> None:
        """Looks for ever."""
        while True:
            await asyncio.sleep(self._resume_seconds * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
            try:
                await self.round()
            except MeshError as error:
                log.warning("rerate_round_failed", reason=error.reason_name)

    async def round(self) -> int:
        """Ends what was left; returns how many. One tenant's failure stops no other."""
        after: RunPosition | None = None
        ended = 0
        while True:
            page = await self._runs.left(after, _PAGE, self._resume_seconds)
            for run in page:
                ended += await self._ended(run)
            if len(page) < _PAGE:
                return ended
            after = RunPosition(page[-1].tenant_id, page[-1].number)

    async def _ended(self, run: RerateRun) -> int:
        log.info("rerating_resumed", tenant_id=str(run.tenant_id), rerating_id=str(run.rerating.rerating_id))
        try:
            while not (await self._desk.rerate(run.tenant_id, run.rerating)).is_done:
                continue
        except MeshError as error:
            log.warning("rerating_not_ended", tenant_id=str(run.tenant_id), reason=error.reason_name, why=error.message)
            return 0
        return 1
