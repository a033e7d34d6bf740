"""Rows written as they come: CSV by the standard library, Parquet by pyarrow, which is loaded for it alone."""

import csv
import importlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, BinaryIO, Protocol

from tenantry.ctl.export_columns import Column, Kind, Value
from tenantry.ctl.wrong_use import WrongUse

# Rows of one group are compressed together and are in memory until there are so many.
GROUP_ROWS = 20_000


class RowFile(Protocol):
    """A file of rows under way."""

    def write(self, rows: Sequence[Sequence[Value]]) -> None:
        """Adds rows."""
        ...


class CsvFile:
    """RFC 4180 in UTF-8: a line of names, then one for each row; times as ISO 8601."""

    def __init__(self, stream: BinaryIO, columns: Sequence[Column]) -> None:
        self._stream = stream
        self._write([[column.name for column in columns]])

    def write(self, rows: Sequence[Sequence[Value]]) -> None:
        """Adds rows."""
        self._write([[_csv_text(value) for value in row] for row in rows])

    def _write(self, rows: Sequence[Sequence[str | int]]) -> None:
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        self._stream.write(text.getvalue().encode())


@contextmanager
def parquet_file(stream: BinaryIO, columns: Sequence[Column]) -> Iterator[RowFile]:
    """Begins a Parquet file and ends it with its footer. Raises: WrongUse where pyarrow is not installed."""
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        msg = "Parquet needs pyarrow: install the extra, `pip install 'tenantry[parquet]'`, or choose --format csv"
        raise WrongUse(msg) from None
    types = {Kind.TEXT: arrow.string(), Kind.INTEGER: arrow.int64(), Kind.TIME: arrow.timestamp("us", tz="UTC")}
    schema = arrow.schema([arrow.field(column.name, types[column.kind], nullable=False) for column in columns])
    with parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
        file = _ParquetFile(arrow, writer, schema)
        yield file
        file.flush()


class _ParquetFile:
    def __init__(self, arrow: Any, writer: Any, schema: Any) -> None:
        self._arrow, self._writer, self._schema = arrow, writer, schema
        self._rows: list[Sequence[Value]] = []

    def write(self, rows: Sequence[Sequence[Value]]) -> None:
        self._rows += rows
        if len(self._rows) >= GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            values = [list(column) for column in zip(*self._rows, strict=True)]
            self._writer.write_table(self._arrow.table(values, schema=self._schema))
            self._rows = []


def _csv_text(value: Value) -> str | int:
    return value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else value
