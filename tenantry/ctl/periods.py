"""Periods as people type them: a month, two dates, the last so many days. All of UTC."""

import argparse
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tenantry.ctl.wrong_use import WrongUse

_MONTH = re.compile(r"(\d{4})-(\d{2})")
_LAST = re.compile(r"(\d{1,4})([hd])")
_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1)}


@dataclass(frozen=True, slots=True)
class Period:
    """From `start`, inclusive, to `end`, exclusive; None where it was left open."""

    start: datetime | None
    end: datetime | None


def add_period_options(parser: argparse.ArgumentParser) -> None:
    """Adds the ways to name a period."""
    group = parser.add_argument_group("period (UTC; default: the current month)")
    group.add_argument("--period", metavar="YYYY-MM", help="a calendar month")
    group.add_argument("--from", dest="start", metavar="TIME", help="such as 2026-11-01 or 2026-11-01T08:00:00Z, inclusive")
    group.add_argument("--to", dest="end", metavar="TIME", help="exclusive")
    group.add_argument("--last", metavar="30d", help="the last so many days or hours")


def period_of(options: argparse.Namespace, now: datetime | None = None) -> Period:
    """Reads the period. Raises: WrongUse."""
    if sum(map(bool, (options.period, options.start or options.end, options.last))) > 1:
        msg = "name the period once: --period, or --from and --to, or --last"
        raise WrongUse(msg)
    if options.period:
        return _month(options.period)
    if options.last:
        return _last(options.last, now or datetime.now(UTC))
    start, end = (None if text is None else moment(text) for text in (options.start, options.end))
    if start is not None and end is not None and start >= end:
        msg = "--from must be before --to"
        raise WrongUse(msg)
    return Period(start, end)


def moment(text: str) -> datetime:
    """Reads a date or a time, of UTC where it says no zone. Raises: WrongUse."""
    try:
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        msg = f"{text!r} is no time: write 2026-11-01 or 2026-11-01T08:00:00Z"
        raise WrongUse(msg) from None


def _month(text: str) -> Period:
    match = _MONTH.fullmatch(text)
    if match is None or not 1 <= int(match[2]) <= 12 or not 1970 <= int(match[1]) <= 9998:
        msg = f"{text!r} is no month: write 2026-11"
        raise WrongUse(msg)
    year, month = int(match[1]), int(match[2])
    return Period(datetime(year, month, 1, tzinfo=UTC), datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC))


def _last(text: str, now: datetime) -> Period:
    match = _LAST.fullmatch(text)
    if match is None or int(match[1]) == 0:
        msg = f"{text!r} is no span: write 30d or 12h"
        raise WrongUse(msg)
    return Period(now - int(match[1]) * _UNITS[match[2]], now)
