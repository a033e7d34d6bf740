"""The flags of this process: in memory, and never older than the question. Refuses to answer when nobody can tell whether they changed.

Callers remember an answer until they hear of a change, and may ask another replica than the one they heard of it from: so every question
looks whether the set changed. Questions that come together share a look.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from services.kernel.ids import TenantId
from services.tenant.feature_flag import FlagSet


class FlagSource(Protocol):
    """Where the flag set is kept. Each method is one round trip."""

    async def read_version(self) -> int:
        """Returns the set's version, 0 before the first flag."""
        ...

    async def read_set(self) -> FlagSet:
        """Returns every flag, at the set's version or a newer one."""
        ...


class FlagSetCache:
    """Answers which flags are on for a tenant."""

    def __init__(self, source: FlagSource, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._monotonic = monotonic
        self._set = FlagSet(-1, ())
        self._looked_at = float("-inf")
        self._looking = asyncio.Lock()

    async def enabled(self, tenant_id: TenantId, tier: str) -> frozenset[str]:
        """Returns the names of the flags that are on. Raises: Unavailable when the set cannot be looked at."""
        return (await self.current()).enabled(tenant_id, tier)

    async def current(self) -> FlagSet:
        """Returns the set as it is now. Raises: Unavailable."""
        asked_at = self._monotonic()
        async with self._looking:
            # A look that began after this question came answers it as well.
            if self._looked_at <= asked_at:
                await self._look()
        return self._set

    async def _look(self) -> None:
        # Stamped before asking: what changes while the answer is under way counts as not seen.
        began_at = self._monotonic()
        if await self._source.read_version() != self._set.version:
            self._set = await self._source.read_set()
        self._looked_at = began_at
