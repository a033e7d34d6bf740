"""What comes of comparing one account over one bucket, and when it raises the alarm. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from datetime import datetime
from enum import IntEnum

from services.metering.call import PriceKey, TokenUsage
from services.metering.rating import ClassPrices
from services.metering.reconciliation.bucket import Bucket

# "claude-haiku-4-5-20251001" is what the alias "claude-haiku-4-5" stands for: the ledger keeps what was asked for, reports may say either.
_DATE = re.compile(r"-\d{8}$")
_MILLION = 1_000_000


class ReportKind(IntEnum):
    """How it was compared; the numbers are the contract's."""

    SUMS = 1
    REQUESTS = 2


@dataclass(frozen=True, slots=True)
class ReportLine:
    """A model's tokens by the ledger and by the feed."""

    model: str
    settled: TokenUsage
    feed: TokenUsage


@dataclass(frozen=True, slots=True)
class Counts:
    """Calls and requests, told apart by what is wrong with them."""

    reconciled: int = 0
    unresolved: int = 0
    unfinished: int = 0
    ambiguous: int = 0
    unknown: int = 0
    missing: int = 0
    differing: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """One account over one bucket. Amounts are nano-USD; `drift` is what neither settled nor unresolved calls explain.

    `set_aside_count`: rows of the feed, of whatever account, that cannot be read.
    """

    provider: str
    account: str
    bucket: Bucket
    kind: ReportKind
    is_complete: bool
    run_time: datetime
    settled_nano_usd: int
    unresolved_nano_usd: int
    feed_nano_usd: int
    drift_nano_usd: int
    is_drifting: bool
    counts: Counts
    lines: Sequence[ReportLine]
    set_aside_count: int = 0


@dataclass(frozen=True, slots=True)
class Thresholds:
    """A drift raises the alarm when it is over both: an amount, and a share of what the larger side says, in millionths."""

    nano_usd: int
    per_million: int

    def exceeded_by(self, drift_nano_usd: int, of_nano_usd: int) -> bool:
        """Tells whether the drift raises the alarm."""
        return drift_nano_usd > self.nano_usd and drift_nano_usd * _MILLION > self.per_million * of_nano_usd


@dataclass(frozen=True, slots=True)
class Rates:
    """The prices that a comparison needs: of the ledger's calls, by what they are rated by, and those in force, by model."""

    of_calls: Mapping[PriceKey, ClassPrices]
    in_force: Mapping[str, ClassPrices]

    def now(self, model: str) -> ClassPrices | None:
        """Returns what a model costs now; None when the price book does not know it."""
        return self.in_force.get(undated(model))


@dataclass(slots=True)
class ModelTokens:
    """Tokens by model, added up on both sides."""

    settled: dict[str, TokenUsage] = field(default_factory=dict)
    feed: dict[str, TokenUsage] = field(default_factory=dict)

    def lines(self) -> tuple[ReportLine, ...]:
        """Returns a line a model, by name."""
        nothing = TokenUsage()
        models = sorted(self.settled.keys() | self.feed.keys())
        return tuple(ReportLine(model, self.settled.get(model, nothing), self.feed.get(model, nothing)) for model in models)


def add(tokens: dict[str, TokenUsage], model: str, usage: TokenUsage) -> None:
    """Adds a model's tokens to those under its name without a date."""
    name = undated(model)
    before = tokens.get(name, TokenUsage())
    tokens[name] = TokenUsage(*(a + b for a, b in zip(astuple(before), astuple(usage), strict=True)))


def undated(model: str) -> str:
    """Returns the model's name without the date at its end."""
    return _DATE.sub("", model)
