"""Reads billing_plans.yaml: versions of what each plan charges. Refuses in clear sentences whatever is doubtful."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation

import yaml

from services.metering.billing.exact import NANO_PER_USD, PER_MILLION
from services.metering.billing.invoice import CURRENCY
from services.metering.billing.terms import BillingTerms, Discount, Fee, PlanVersion, UsageCharge
from services.metering.billing.tiers import Graduated, Package, PerUnit, Pricing, Tier, Volume

# What calls are measured by. A product's own units have no dot in their names, so the two never meet.
CALL_METERS = frozenset(
    f"calls.{name}"
    for name in ("count", "cost_nano_usd", "tokens", "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")
)
_PLAN = re.compile(r"[a-z][a-z0-9-]{0,62}")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_VERSION = re.compile(r"[A-Za-z0-9._-]{1,100}")
_MAX_NANO_USD = 1_000_000 * NANO_PER_USD
_MAX_COUNT = 1_000_000_000_000_000
_PRICINGS = ("unit", "graduated", "volume", "package")


class BillingPlansRefused(Exception):
    """The file cannot be used, or changes what was loaded; the message says where and what to do."""


@dataclass(frozen=True, slots=True)
class PlanChange:
    """A version of the file that is not loaded yet."""

    version: PlanVersion
    is_first: bool


def parse_billing_plans(text: str) -> list[PlanVersion]:
    """Reads the versions, by plan and time. Raises: BillingPlansRefused."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BillingPlansRefused(f"the billing plans are not YAML: {error}") from None
    whole = _mapping(document, "the file", {"currency", "versions"})
    if whole["currency"] != CURRENCY:
        raise BillingPlansRefused(f"currency {whole['currency']!r}: everything is billed in {CURRENCY}")
    versions = [_version(item) for item in _list(whole["versions"], "versions", least=1)]
    for what in ("version", "effective_time"):
        _refuse_repeats([(item.plan, str(getattr(item, what))) for item in versions], what)
    return sorted(versions, key=lambda item: (item.plan, item.effective_time))


def changes_to_load(wanted: Sequence[PlanVersion], stored: Mapping[tuple[str, str], bytes], now: datetime) -> list[PlanChange]:
    """Returns the versions that are new; `stored` has the digests of those that were loaded.

    The first version of a plan may begin at any time: nothing was billed by the plan before. Any other begins after now.
    Raises: BillingPlansRefused when a stored version has other content, or a new one would change the past.
    """
    loaded = {plan for plan, _ in stored}
    found = []
    for item in wanted:
        known = stored.get((item.plan, item.version))
        where = f"plan {item.plan}, version {item.version}"
        if known is not None and known != item.digest:
            raise BillingPlansRefused(f"{where} has other content in the database, and invoices may name it: add a new version")
        if known is None:
            is_first = item.plan not in loaded
            if not is_first and item.effective_time <= now:
                raise BillingPlansRefused(f"{where} would change what was billed: give it an effective_time after {now.isoformat()}")
            found.append(PlanChange(item, is_first))
    return found


def describe(changes: Sequence[PlanChange]) -> str:
    """Says in a line each what loading would change."""
    if not changes:
        return "nothing would change: every version is loaded"
    return "\n".join(
        f"{change.version.plan} {change.version.version}: "
        + ("first version of the plan" if change.is_first else f"takes over at {change.version.effective_time.isoformat()}")
        for change in changes
    )


def _version(raw: object) -> PlanVersion:
    optional = {"fees", "charges", "discounts", "minimum"}
    item = _mapping(raw, "a version", {"plan", "version", "effective_time"}, optional)
    plan, version = item["plan"], item["version"]
    if not isinstance(plan, str) or not _PLAN.fullmatch(plan):
        raise BillingPlansRefused(f"plan {plan!r}: write a name of small letters, digits and hyphens, as in plans.yaml")
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise BillingPlansRefused(f'plan {plan}: version {version!r}: write text of letters, digits, dots and dashes, such as "2026-01"')
    where = f"plan {plan}, version {version}"
    fees = tuple(_fee(entry, where) for entry in _list(item.get("fees", []), f"{where}: fees"))
    charges = tuple(_charge(entry, where) for entry in _list(item.get("charges", []), f"{where}: charges"))
    discounts = tuple(_discount(entry, where) for entry in _list(item.get("discounts", []), f"{where}: discounts"))
    for names in ([fee.name for fee in fees], [charge.meter for charge in charges], [discount.name for discount in discounts]):
        _refuse_repeats([(where, name) for name in names], "name")
    terms = BillingTerms(fees, charges, discounts, _nano_usd(item.get("minimum", "0"), f"{where}: minimum"))
    return PlanVersion(plan, version, _moment(item["effective_time"], where), terms)


def _fee(raw: object, where: str) -> Fee:
    item = _mapping(raw, f"{where}: a fee", {"name", "price"})
    return Fee(_name(item["name"], where), _nano_usd(item["price"], f"{where}, fee {item['name']}"))


def _charge(raw: object, where: str) -> UsageCharge:
    item = _mapping(raw, f"{where}: a charge", {"meter"}, {"included", *_PRICINGS})
    meter = item["meter"]
    if meter not in CALL_METERS:
        meter = _name(meter, where)
    inside = f"{where}, {meter}"
    given = [name for name in _PRICINGS if name in item]
    if len(given) != 1:
        raise BillingPlansRefused(f"{inside}: give exactly one of {', '.join(_PRICINGS)}")
    return UsageCharge(meter, _count(item.get("included", 0), f"{inside}: included", least=0), _pricing(given[0], item[given[0]], inside))


def _pricing(kind: str, raw: object, where: str) -> Pricing:
    if kind == "unit":
        return PerUnit(_per_million(_mapping(raw, f"{where}: unit", {"price"}, {"per"}), where))
    if kind == "package":
        item = _mapping(raw, f"{where}: package", {"size", "price"})
        return Package(_count(item["size"], f"{where}: size", least=1), _nano_usd(item["price"], where))
    entries = _list(raw, f"{where}: {kind}", least=1)
    tiers = [_tier(entry, where, is_last=index == len(entries) - 1) for index, entry in enumerate(entries)]
    bounds = [tier.up_to for tier in tiers if tier.up_to is not None]
    if bounds != sorted(set(bounds)):
        raise BillingPlansRefused(f"{where}: the bounds of tiers must rise")
    return Graduated(tuple(tiers)) if kind == "graduated" else Volume(tuple(tiers))


def _tier(raw: object, where: str, *, is_last: bool) -> Tier:
    item = _mapping(raw, f"{where}: a tier", {"price"} if is_last else {"price", "up_to"}, {"per"})
    return Tier(None if is_last else _count(item["up_to"], f"{where}: up_to", least=1), _per_million(item, where))


def _per_million(item: Mapping[str, object], where: str) -> int:
    per = _count(item.get("per", 1), f"{where}: per", least=1)
    price, rest = divmod(_nano_usd(item["price"], where) * PER_MILLION, per)
    if rest:
        raise BillingPlansRefused(f"{where}: {item['price']} per {per} is no whole number of nano-dollars per million units")
    return price


def _discount(raw: object, where: str) -> Discount:
    item = _mapping(raw, f"{where}: a discount", {"name"}, {"basis_points", "amount"})
    if ("basis_points" in item) == ("amount" in item):
        raise BillingPlansRefused(f"{where}, discount {item['name']}: give either basis_points or amount")
    points = _count(item.get("basis_points", 0), f"{where}: basis_points", least=0)
    if points > 10_000:
        raise BillingPlansRefused(f"{where}, discount {item['name']}: basis_points are at most 10000, which is all of it")
    return Discount(_name(item["name"], where), points, _nano_usd(item.get("amount", "0"), where))


def _name(raw: object, where: str) -> str:
    if not isinstance(raw, str) or not _NAME.fullmatch(raw):
        raise BillingPlansRefused(f"{where}: {raw!r} must be named like ai_interviews, or be one of {', '.join(sorted(CALL_METERS))}")
    return raw


def _count(raw: object, where: str, *, least: int) -> int:
    if type(raw) is not int or not least <= raw <= _MAX_COUNT:
        raise BillingPlansRefused(f"{where} must be a whole number from {least} to {_MAX_COUNT}, not {raw!r}")
    return raw


def _nano_usd(raw: object, where: str) -> int:
    # A YAML number is a binary float by the time it gets here: 0.1 would no longer be a tenth.
    try:
        amount = Decimal(raw).scaleb(9) if isinstance(raw, str) else None
    except InvalidOperation:
        amount = None
    if amount is None or not amount.is_finite() or amount != amount.to_integral_value() or not 0 <= amount <= _MAX_NANO_USD:
        raise BillingPlansRefused(
            f'{where}: write dollars as text, such as "1.25", from 0 to a million, with at most nine decimals; not {raw!r}'
        )
    return int(amount)


def _moment(raw: object, where: str) -> datetime:
    try:
        moment = datetime.fromisoformat(raw) if isinstance(raw, str) else raw
    except ValueError:
        moment = None
    if not isinstance(moment, datetime) or moment.tzinfo is None or moment.microsecond:
        raise BillingPlansRefused(f'{where}: effective_time {raw!r} must be a whole second with its zone, such as "2026-01-01T00:00:00Z"')
    return moment.astimezone(UTC)


def _list(raw: object, what: str, least: int = 0) -> list[object]:
    if not isinstance(raw, list) or len(raw) < least:
        raise BillingPlansRefused(f"{what} must be a list" + (f" of at least {least}" if least else ""))
    return raw


def _mapping(raw: object, what: str, required: set[str], optional: set[str] | frozenset[str] = frozenset()) -> dict[str, object]:
    if not isinstance(raw, dict) or not required <= raw.keys() <= required | optional:
        given = sorted(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__
        may = f", and may hold {', '.join(sorted(optional))}" if optional else ""
        raise BillingPlansRefused(f"{what} holds {', '.join(sorted(required))}{may}; given: {given}")
    return raw


def _refuse_repeats(values: Sequence[tuple[str, str]], what: str) -> None:
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise BillingPlansRefused(f"{repeated[0][0]}: the {what} {repeated[0][1]} occurs twice")
