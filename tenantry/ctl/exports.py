"""`tenantctl usage export`: the books of a period as a file. What was cut off goes on after the last page that came."""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc

from mesh.metering.v1 import export_service_pb2 as pb
from mesh.metering.v1.export_service_pb2_grpc import ExportServiceStub
from tenantry.ctl.connection import Mesh
from tenantry.ctl.export_columns import COLUMNS, Column, Message
from tenantry.ctl.periods import add_period_options, period_of
from tenantry.ctl.row_files import CsvFile, RowFile, parquet_file
from tenantry.ctl.whole_file import whole_file
from tenantry.ctl.wrong_use import WrongUse

KINDS = {"entries": pb.EXPORT_KIND_ENTRIES, "events": pb.EXPORT_KIND_EVENTS, "usage": pb.EXPORT_KIND_USAGE}
_PAGE = 1_000
_MOST_FAILURES, _PAUSE_SECONDS = 8, 0.5
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


def add_command(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    command = actions.add_parser(
        "export",
        help="write entries, events or daily sums to a file",
        description="Writes the rows of a period to a file, whole or not at all. Entries and events are those recorded before the export "
        "began. What is cut off goes on after the last page that came.",
    )
    add_period_options(command)
    command.add_argument("--kind", choices=KINDS, default="entries")
    command.add_argument("--format", choices=("csv", "parquet"), default="csv")
    command.add_argument("--output", type=Path, metavar="FILE", help="where to (default: standard output, of CSV alone)")
    command.set_defaults(run=export)


async def export(mesh: Mesh, options: argparse.Namespace) -> int:
    """Writes the file and says how many rows it has."""
    mesh.require_tenant()
    period = period_of(options)
    request = pb.ExportUsageRequest(kind=KINDS[options.kind], page_size=_PAGE)
    if period.start is not None:
        request.start_time.FromDatetime(period.start)
    if period.end is not None:
        request.end_time.FromDatetime(period.end)
    columns, count = COLUMNS[options.kind], 0
    with _row_file(options, columns) as file:
        async for page in _pages(mesh, request):
            rows: Sequence[Message] = (*page.entries, *page.events, *page.uses)
            file.write([[column.read(row) for column in columns] for row in rows])
            count += len(rows)
    if options.output is not None:
        print(f"{count} rows in {options.output}", file=sys.stderr)
    return 0


@contextmanager
def _row_file(options: argparse.Namespace, columns: Sequence[Column]) -> Iterator[RowFile]:
    if options.output is None:
        if options.format != "csv":
            msg = "Parquet is no text: say where to with --output FILE"
            raise WrongUse(msg)
        yield CsvFile(sys.stdout.buffer, columns)
        return
    with whole_file(options.output) as stream:
        if options.format == "csv":
            yield CsvFile(stream, columns)
        else:
            with parquet_file(stream, columns) as file:
                yield file


async def _pages(mesh: Mesh, request: pb.ExportUsageRequest) -> AsyncIterator[pb.ExportUsageResponse]:
    stub, failures = ExportServiceStub(mesh.channel), 0
    while True:
        try:
            # The whole stream is given the time of a call anew with each page that it goes on after.
            async for page in stub.ExportUsage(request, metadata=mesh.metadata, timeout=mesh.timeout_seconds):
                yield page
                if not page.cursor:
                    return
                request.cursor, failures = page.cursor, 0
        except grpc.aio.AioRpcError as error:
            failures += 1
            if error.code() not in _PASSING or failures > _MOST_FAILURES or not request.cursor:
                raise
            await asyncio.sleep(_PAUSE_SECONDS * failures)
