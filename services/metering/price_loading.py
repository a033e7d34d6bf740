"""What loading a price book would change, and the loading itself for operators. Refuses to change a version that was ever loaded."""

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import structlog

from services.kernel.errors import ContentConflict, InvalidRequest, PriceBookUnusable, WrongState
from services.metering.price_book import PriceBookRefused, PriceVersion, PriceVersionEdited, parse_price_book
from services.metering.price_catalog import PriceCatalog
from services.metering.rating import ClassPrices

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ModelChange:
    """A model whose prices are others than in the version before; None where it has none."""

    provider: str
    model: str
    before: ClassPrices | None
    after: ClassPrices | None


@dataclass(frozen=True, slots=True)
class VersionChange:
    """A version that is not stored yet. `is_retroactive`: calls since its time were rated by another one."""

    version: PriceVersion
    is_retroactive: bool
    models: Sequence[ModelChange]


class PriceBookStore(Protocol):
    """Where operators' loads go."""

    async def load(self, versions: Sequence[PriceVersion], *, validate_only: bool) -> Sequence[VersionChange]:
        """Stores versions that are not stored yet, all or nothing, unless only to be validated. Raises: PriceBookRefused."""
        ...


def changes_to_load(
    wanted: Sequence[PriceVersion], stored: Sequence[PriceVersion], digests: Mapping[str, bytes], now: datetime
) -> list[VersionChange]:
    """Returns the versions that are new, oldest first, each with what it changes of the one before it; `digests` are the stored ones'.

    Raises: PriceBookRefused when a stored version has other content or a new one the time of a stored one.
    """
    for version in wanted:
        if digests.get(version.version, version.digest) != version.digest:
            raise PriceVersionEdited(version.version, digests[version.version], version.digest)
    new = [version for version in wanted if version.version not in digests]
    taken = {version.effective_time for version in stored}
    for version in new:
        if version.effective_time in taken:
            raise PriceBookRefused(
                f"version {version.version}: another stored version takes effect at {version.effective_time}; choose another moment"
            )
    order = sorted([*stored, *new], key=lambda version: version.effective_time)
    return [_change(version, order, is_retroactive=bool(stored) and version.effective_time <= now) for version in new]


def _change(version: PriceVersion, order: Sequence[PriceVersion], *, is_retroactive: bool) -> VersionChange:
    place = order.index(version)
    before: Mapping[tuple[str, str], ClassPrices] = order[place - 1].prices if place else {}
    names = sorted({*before, *version.prices})
    models = [ModelChange(*name, before.get(name), version.prices.get(name)) for name in names]
    return VersionChange(version, is_retroactive, [model for model in models if model.before != model.after])


def describe(changes: Sequence[VersionChange]) -> str:
    """Says in a line each what loading would change."""
    if not changes:
        return "nothing would change: every version is loaded"
    lines = []
    for change in changes:
        late = "; calls since then were rated by another version, see RerateUsage" if change.is_retroactive else ""
        lines.append(f"{change.version.version}: in force from {change.version.effective_time.isoformat()}{late}")
        lines += [f"  {model.provider} {model.model}: {_prices(model.before)} -> {_prices(model.after)}" for model in change.models]
    return "\n".join(lines)


def _prices(prices: ClassPrices | None) -> str:
    if prices is None:
        return "no price"
    classes = (prices.input, prices.output, prices.cache_read, prices.cache_write_5m, prices.cache_write_1h)
    return "/".join(map(str, classes)) + (" with batch" if prices.batch is not None else "")


def book_digest(versions: Sequence[PriceVersion]) -> bytes:
    """SHA-256 over the digests of a book's versions, oldest first."""
    return hashlib.sha256(b"".join(version.digest for version in versions)).digest()


class PriceLoading:
    """Loads the price book file of this process for operators: first to see what would change, then what was seen."""

    def __init__(self, read: Callable[[], Awaitable[str]], store: PriceBookStore, catalog: PriceCatalog) -> None:
        """`read` returns the file's text. Raises: PriceBookRefused when it cannot."""
        self._read = read
        self._store = store
        self._catalog = catalog

    async def load(self, *, seen_digest: str, validate_only: bool) -> tuple[Sequence[VersionChange], str]:
        """Returns what is new and the book's digest in hexadecimal; stores it unless only to be validated.

        Raises: PriceBookUnusable; ContentConflict for an edited version; WrongState when the book is not the one that was seen.
        """
        if not validate_only and not seen_digest:
            raise InvalidRequest("digest", "must be what the same call with validate_only answered: see what would change first")
        try:
            versions = parse_price_book(await self._read())
            digest = book_digest(versions).hex()
            if not validate_only and digest != seen_digest:
                raise WrongState("price_book", "CHANGED", "this replica's price book is not the one that was seen: validate again")
            changes = await self._store.load(versions, validate_only=validate_only)
        except PriceVersionEdited as error:
            given, stored = error.given_digest.hex(), error.stored_digest.hex()
            raise ContentConflict("price_version", str(error), version=error.version, stored_digest=stored, request_digest=given) from None
        except PriceBookRefused as error:
            raise PriceBookUnusable(str(error)) from None
        if changes and not validate_only:
            log.info("price_versions_loaded", versions=[change.version.version for change in changes])
            await self._catalog.refresh()
        return changes, digest
