"""`tenantctl rerating list`: which re-ratings were begun, of all tenants or of one, and which are not done."""

import argparse

from mesh.metering.v1 import price_service_pb2 as pb
from mesh.metering.v1.price_service_pb2_grpc import PriceServiceStub
from tenantry.ctl.connection import Mesh
from tenantry.ctl.printing import FORMATS, Row, print_rows, time_text

_COLUMNS = (
    *("tenant_id", "rerating_id", "start_time", "end_time", "price_versions", "right_version"),
    *("cutoff_time", "begin_time", "finish_time"),
)


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    room = commands.add_parser("rerating", help="operators: calls that are rated anew", description="Calls that are rated anew.")
    actions = room.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser(
        "list",
        help="what was begun, by tenant",
        description="Lists re-ratings, of all tenants or of the one that --tenant names; without a finish time it is not done.",
    )
    listing.add_argument("--undone", action="store_true", help="only those that are not done")
    listing.add_argument("--format", choices=FORMATS, default="table")
    listing.set_defaults(run=list_all)


async def list_all(mesh: Mesh, options: argparse.Namespace) -> int:
    """Prints the re-ratings, page by page."""
    mesh.require_operator()
    stub, request = PriceServiceStub(mesh.channel), pb.ListReratingsRequest(undone_only=options.undone)
    rows: list[Row] = []
    while True:
        page = await stub.ListReratings(request, metadata=mesh.metadata, timeout=mesh.timeout_seconds)
        rows += [_row(run) for run in page.reratings]
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    print_rows(rows, _COLUMNS, options.format)
    return 0


def _row(run: pb.RerateRun) -> Row:
    return {
        "tenant_id": run.tenant_id,
        "rerating_id": run.rerating_id,
        "start_time": time_text(run.start_time),
        "end_time": time_text(run.end_time),
        "price_versions": ",".join(run.price_versions),
        "right_version": run.right_version,
        "cutoff_time": time_text(run.cutoff_time),
        "begin_time": time_text(run.begin_time),
        "finish_time": time_text(run.finish_time) if run.HasField("finish_time") else "",
    }
