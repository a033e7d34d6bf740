"""Folds changes of use into sums, so that questions read few rows. What is not folded yet is answered all the same, only slower."""

import asyncio
from typing import Protocol

import structlog

from services.kernel.errors import MeshError

log = structlog.get_logger(__name__)

MOST_PER_FOLD = 5_000


class FoldStore(Protocol):
    """The log of changes and the sums, for all tenants."""

    async def fold_usage(self, most: int) -> int:
        """Folds up to `most` changes, each once, and returns how many; 0 while another replica folds."""
        ...


class UsageFolder:
    """One loop for `BackgroundTasks`: `run`."""

    def __init__(self, store: FoldStore, *, fold_seconds: float) -> None:
        self._store = store
        self._fold_seconds = fold_seconds

    async def run(self) -> None:
        """Folds for ever."""
        while True:
            await asyncio.sleep(self._fold_seconds)
            try:
                await self.fold()
            except MeshError as error:
                log.warning("usage_fold_failed", reason=error.reason_name)

    async def fold(self) -> int:
        """Folds until nothing is left to fold; returns how many changes."""
        total = 0
        while (folded := await self._store.fold_usage(MOST_PER_FOLD)) > 0:
            total += folded
            if folded < MOST_PER_FOLD:
                break
        return total
