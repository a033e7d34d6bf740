"""Prices as the process knows them. Versions never change once stored, so what was read stays true; only new ones must be looked for."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol

from services.kernel.errors import Unavailable
from services.metering.call import PriceKey
from services.metering.price_book import PricesInForce, PriceVersion
from services.metering.rating import ClassPrices

_REFRESH_SECONDS = 30.0
_RETRY_SECONDS = 1.0


class PriceStore(Protocol):
    """Where price versions are kept."""

    async def versions(self) -> Sequence[PriceVersion]:
        """Returns every version, oldest first."""
        ...


class PriceCatalog:
    """Answers prices from memory, and looks for new versions every half minute or when one is asked for that is not known."""

    def __init__(self, store: PriceStore, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._clock = clock
        self._versions: Sequence[PriceVersion] = ()
        self._by_name: Mapping[str, PriceVersion] = {}
        self._fresh_until = 0.0
        self._retry_at = 0.0

    async def prices_of(self, key: PriceKey) -> ClassPrices | None:
        """Returns what a call is rated by; None when no such version or model was ever stored."""
        found = self._find(key)
        if found is None and time.monotonic() >= self._retry_at:
            await self.refresh()
            found = self._find(key)
        return found

    async def version(self, name: str) -> PriceVersion | None:
        """Returns a version by its name; None when it was never stored."""
        if name not in self._by_name:
            await self.refresh()
        return self._by_name.get(name)

    async def in_force(self) -> PricesInForce:
        """Returns the version in force now. Raises: Unavailable when none is, which ends when `migrate` has loaded a price book."""
        if time.monotonic() >= self._fresh_until:
            await self.refresh()
        now = self._clock()
        current = [version for version in self._versions if version.effective_time <= now]
        later = [version.effective_time for version in self._versions if version.effective_time > now]
        if not current:
            raise Unavailable("price book", "no price version is in force: load one with `python -m services.metering migrate`", 5.0)
        return PricesInForce(current[-1], later[0] if later else None)

    async def refresh(self) -> None:
        """Reads what is stored now."""
        self._versions = await self._store.versions()
        self._by_name = {version.version: version for version in self._versions}
        now = time.monotonic()
        # An empty answer is not trusted for long: the price book may be loaded at any moment.
        self._fresh_until = now + (_REFRESH_SECONDS if self._versions else _RETRY_SECONDS)
        self._retry_at = now + _RETRY_SECONDS

    def _find(self, key: PriceKey) -> ClassPrices | None:
        version = self._by_name.get(key.version)
        return None if version is None else version.prices.get((key.provider, key.model))
