"""Rows for people, and for other programs: a table, JSON or CSV. Amounts are integers of nano-USD everywhere but in tables."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import TextIO

from google.protobuf.timestamp_pb2 import Timestamp

FORMATS = ("table", "json", "csv")
_NANO = "_nano_usd"
Row = Mapping[str, object]


def time_text(stamp: Timestamp) -> str:
    """Writes a moment in UTC, to the microsecond where it has any: 2026-11-01T00:00:00Z."""
    return stamp.ToDatetime(tzinfo=UTC).isoformat().replace("+00:00", "Z")


def usd(nano_usd: int) -> str:
    """Writes an amount in dollars, exactly: at least two decimals, at most nine."""
    whole, rest = divmod(abs(nano_usd), 1_000_000_000)
    return f"{'-' if nano_usd < 0 else ''}{whole}.{f'{rest:09d}'.rstrip('0').ljust(2, '0')}"


def print_rows(rows: Sequence[Row], names: Sequence[str], form: str, out: TextIO | None = None) -> None:
    """Prints rows with these columns."""
    stream = out or sys.stdout
    if form == "json":
        json.dump([{name: row[name] for name in names} for row in rows], stream, indent=1, ensure_ascii=False)
        stream.write("\n")
    elif form == "csv":
        writer = csv.writer(stream)
        writer.writerow(names)
        writer.writerows([row[name] for name in names] for row in rows)
    else:
        _print_table(rows, names, stream)


def _print_table(rows: Sequence[Row], names: Sequence[str], stream: TextIO) -> None:
    heads = [f"{name.removesuffix(_NANO)}_usd" if name.endswith(_NANO) else name for name in names]
    cells = [[_cell(name, row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    is_number = [bool(rows) and all(isinstance(row[name], int | float) for row in rows) for name in names]
    for line in (heads, *cells):
        parts = [text.rjust(width) if right else text.ljust(width) for text, width, right in zip(line, widths, is_number, strict=True)]
        stream.write("  ".join(parts).rstrip() + "\n")


def _cell(name: str, value: object) -> str:
    if isinstance(value, int) and name.endswith(_NANO):
        return usd(value)
    text = "-" if value == "" else str(value)
    # A name is a tenant's own words: it moves no cursor and starts no line.
    return "".join(each if each.isprintable() else "?" for each in text)
