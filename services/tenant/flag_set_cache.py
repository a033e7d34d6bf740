"""The flags of this process: in memory, looked at anew five times a second. Refuses to answer from a set that nobody looked at of late."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from services.kernel.errors import MeshError
from services.kernel.ids import TenantId
from services.tenant.feature_flag import FlagSet

log = structlog.get_logger(__name__)

LOOK_SECONDS = 0.2
RETRY_SECONDS = 1.0
# Later than this after the last look that succeeded, a question looks for itself, and fails when it cannot.
FRESH_SECONDS = 0.8


class FlagSource(Protocol):
    """Where the flag set is kept. Each method is one round trip."""

    async def read_version(self) -> int:
        """Returns the set's version, 0 before the first flag."""
        ...

    async def read_set(self) -> FlagSet:
        """Returns every flag, at the set's version or a newer one."""
        ...


class FlagSetCache:
    """Answers which flags are on for a tenant. `run` keeps it fresh until cancelled."""

    def __init__(self, source: FlagSource, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._monotonic = monotonic
        self._set = FlagSet(-1, ())
        self._looked_at = float("-inf")
        self._looking = asyncio.Lock()

    async def enabled(self, tenant_id: TenantId, tier: str) -> frozenset[str]:
        """Returns the names of the flags that are on. Raises: Unavailable when the set is old and cannot be read."""
        return (await self.current()).enabled(tenant_id, tier)

    async def current(self) -> FlagSet:
        """Returns the set as it was at most a second ago. Raises: Unavailable."""
        if not self._is_fresh():
            async with self._looking:
                # Another question may have looked while this one waited.
                if not self._is_fresh():
                    await self._look()
        return self._set

    def forget(self) -> None:
        """Makes the next question look again."""
        self._looked_at = float("-inf")

    async def run(self) -> None:
        """Looks again and again, until cancelled; a store that is away is asked again."""
        while True:
            pause = LOOK_SECONDS
            try:
                async with self._looking:
                    await self._look()
            except MeshError as error:
                log.warning("flags_not_read", reason=error.reason_name)
                # Questions look for themselves meanwhile, and fail on their own.
                pause = RETRY_SECONDS
            await asyncio.sleep(pause)

    def _is_fresh(self) -> bool:
        return self._monotonic() - self._looked_at < FRESH_SECONDS

    async def _look(self) -> None:
        # Stamped before asking: what changes while the answer is under way counts as not seen.
        asked_at = self._monotonic()
        if await self._source.read_version() != self._set.version:
            self._set = await self._source.read_set()
        self._looked_at = asked_at
