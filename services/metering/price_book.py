"""The price book: versions of prices, read from YAML text and refused in clear sentences when anything in it is doubtful."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation

import yaml

from services.metering.rating import BatchPrices, ClassPrices

_VERSION = re.compile(r"^[A-Za-z0-9._-]{1,100}$")
_NANO_PER_USD = 1_000_000_000
_MAX_NANO_USD = 1_000_000_000_000_000
_CLASSES = tuple(field.name for field in fields(BatchPrices))
CURRENCY = "USD"


class PriceBookRefused(Exception):
    """The price book cannot be used; the message names the version, model and field, and what to write instead."""


class PriceVersionEdited(PriceBookRefused):
    """The book says something else of a version that was loaded: entries name it, so it cannot change."""

    def __init__(self, version: str, stored_digest: bytes, given_digest: bytes) -> None:
        super().__init__(f"version {version} has other content in the database, and calls may be billed by it: add a new one")
        self.version = version
        self.stored_digest = stored_digest
        self.given_digest = given_digest


@dataclass(frozen=True, slots=True)
class PriceVersion:
    """One version: in force from `effective_time` until the next one's. Prices by (provider, model), aliases spelled out."""

    version: str
    effective_time: datetime
    source: str
    retrieved: date
    prices: Mapping[tuple[str, str], ClassPrices]

    @property
    def digest(self) -> bytes:
        """SHA-256 of the version's content, the same for the same prices however the file is written."""
        lines = [[provider, model, _content(prices)] for (provider, model), prices in sorted(self.prices.items())]
        content = [self.version, self.effective_time.isoformat(), self.source, self.retrieved.isoformat(), lines]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


@dataclass(frozen=True, slots=True)
class PricesInForce:
    """The version in force at a moment, and when the next one takes over, if one is known."""

    version: PriceVersion
    next_effective_time: datetime | None


def parse_price_book(text: str) -> list[PriceVersion]:
    """Reads the versions, oldest first. Raises: PriceBookRefused."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PriceBookRefused(f"the price book is not YAML: {error}") from None
    raw = document.get("versions") if isinstance(document, dict) else None
    currency = document.get("currency", CURRENCY) if isinstance(document, dict) else CURRENCY
    if currency != CURRENCY:
        raise PriceBookRefused(f"currency {currency!r}: everything is rated in {CURRENCY}, and no amount is converted")
    if not isinstance(raw, list) or not raw:
        raise PriceBookRefused("the price book needs a list `versions` with at least one version")
    versions = sorted((_version(item) for item in raw), key=lambda version: version.effective_time)
    _refuse_repeats([version.version for version in versions], "version")
    _refuse_repeats([version.effective_time.isoformat() for version in versions], "effective_time")
    return versions


def _version(raw: object) -> PriceVersion:
    item = _mapping(raw, "a version", {"version", "effective_time", "source", "retrieved", "prices"})
    name = item["version"]
    if not isinstance(name, str) or not _VERSION.match(name):
        raise PriceBookRefused(f'version {name!r}: write it as text of letters, digits, dots, dashes and underscores, such as "2026-01"')
    where = f"version {name}"
    source, prices = item["source"], item["prices"]
    if not isinstance(source, str) or not 1 <= len(source) <= 500:
        raise PriceBookRefused(f"{where}: source must say where the prices were read, in 1-500 characters")
    if not isinstance(prices, list) or not prices:
        raise PriceBookRefused(f"{where}: prices must list at least one model")
    priced: dict[tuple[str, str], ClassPrices] = {}
    for entry in prices:
        _add_model(priced, entry, where)
    return PriceVersion(name, _moment(item["effective_time"], where), source, _day(item["retrieved"], where), priced)


def _add_model(priced: dict[tuple[str, str], ClassPrices], raw: object, where: str) -> None:
    item = _mapping(raw, f"{where}, a price", {"provider", "model", *_CLASSES}, optional={"aliases", "batch"})
    provider, model, aliases = item["provider"], item["model"], item.get("aliases", [])
    if not isinstance(aliases, list):
        raise PriceBookRefused(f"{where}, {model}: aliases must be a list of model names")
    if not isinstance(provider, str) or not 1 <= len(provider) <= 63:
        raise PriceBookRefused(f"{where}, {model}: provider must be a name of 1-63 characters")
    inside = f"{where}, {model}"
    prices = ClassPrices(**{name: _nano_usd(item[name], f"{inside}, {name}") for name in _CLASSES}, batch=_batch(item, inside))
    for name in (model, *aliases):
        if not isinstance(name, str) or not 1 <= len(name) <= 200:
            raise PriceBookRefused(f"{where}: model {name!r} must be a name of 1-200 characters")
        if (provider, name) in priced:
            raise PriceBookRefused(f"{where}: {provider} {name} has two prices; keep one")
        priced[provider, name] = prices


def _batch(item: Mapping[str, object], where: str) -> BatchPrices | None:
    if "batch" not in item:
        return None
    given = _mapping(item["batch"], f"{where}, batch", set(), optional=set(_CLASSES))
    if not given:
        raise PriceBookRefused(f"{where}, batch: give at least one class a price, or leave it out")
    return BatchPrices(**{name: _nano_usd(value, f"{where}, batch, {name}") for name, value in given.items()})


def _content(prices: ClassPrices) -> dict[str, object]:
    # What a release without batch prices loaded keeps its digest.
    return {name: value for name, value in asdict(prices).items() if name != "batch" or value is not None}


def _nano_usd(raw: object, where: str) -> int:
    # A YAML number is a binary float by the time it gets here: 0.1 would no longer be a tenth.
    if not isinstance(raw, str):
        raise PriceBookRefused(f'{where}: write the price as text in quotes, such as "1.25", not {raw!r}')
    try:
        amount = Decimal(raw)
    except InvalidOperation:
        raise PriceBookRefused(f"{where}: {raw!r} is no decimal number") from None
    if not amount.is_finite() or amount < 0:
        raise PriceBookRefused(f"{where}: {raw!r} must be 0 or more")
    if amount > _MAX_NANO_USD // _NANO_PER_USD:
        raise PriceBookRefused(f"{where}: {raw!r} is over a million dollars; is it per million tokens?")
    nano = amount.scaleb(9)
    if nano != nano.to_integral_value():
        raise PriceBookRefused(f"{where}: {raw!r} has more than nine decimals; nano-dollars are the smallest unit")
    return int(nano)


def _moment(raw: object, where: str) -> datetime:
    try:
        moment = datetime.fromisoformat(raw) if isinstance(raw, str) else raw
    except ValueError:
        moment = None
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise PriceBookRefused(f'{where}: effective_time {raw!r} must be a moment with its zone, such as "2026-01-01T00:00:00Z"')
    return moment.astimezone(UTC)


def _day(raw: object, where: str) -> date:
    try:
        day = date.fromisoformat(raw) if isinstance(raw, str) else raw
    except ValueError:
        day = None
    if not isinstance(day, date) or isinstance(day, datetime):
        raise PriceBookRefused(f'{where}: retrieved {raw!r} must be a day, such as "2026-01-31"')
    return day


def _mapping(raw: object, what: str, required: set[str], optional: frozenset[str] | set[str] = frozenset()) -> dict[str, object]:
    if not isinstance(raw, dict):
        raise PriceBookRefused(f"{what} must be a mapping with {', '.join(sorted(required))}")
    missing, unknown = required - raw.keys(), raw.keys() - required - optional
    if missing or unknown:
        named = raw.get("version") or raw.get("model") or what
        problem = f"lacks {', '.join(sorted(missing))}" if missing else f"has unknown fields {', '.join(sorted(map(str, unknown)))}"
        raise PriceBookRefused(f"{what} ({named}) {problem}")
    return raw


def _refuse_repeats(values: list[str], what: str) -> None:
    repeated = {value for value in values if values.count(value) > 1}
    if repeated:
        raise PriceBookRefused(f"two versions have the {what} {', '.join(sorted(repeated))}")
