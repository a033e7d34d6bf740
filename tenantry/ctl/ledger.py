"""`tenantctl ledger verify`: asks for every figure to be worked out again, and prints those that are not what is stored."""

import argparse

from mesh.metering.v1 import verification_service_pb2 as pb
from mesh.metering.v1.verification_service_pb2_grpc import VerificationServiceStub
from tenantry.ctl.connection import Mesh
from tenantry.ctl.printing import FORMATS, Row, print_rows

_COLUMNS = ("tenant_id", "check", "subject", "figure", "stored", "recomputed")


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    room = commands.add_parser("ledger", help="operators: whether the books agree", description="Whether the books agree.")
    actions = room.add_subparsers(dest="action", required=True, metavar="ACTION")
    verifying = actions.add_parser(
        "verify",
        help="work out every figure again and compare",
        description="Works out sums of use, balances and invoices again, of all tenants or of the one that --tenant names. "
        "Prints each difference with both figures, and exits 1 when there is any.",
    )
    verifying.add_argument("--format", choices=FORMATS, default="table")
    verifying.set_defaults(run=verify)


async def verify(mesh: Mesh, options: argparse.Namespace) -> int:
    """Walks the books to their end; returns 1 when anything differs."""
    mesh.require_operator()
    stub, request = VerificationServiceStub(mesh.channel), pb.VerifyLedgerRequest()
    rows: list[Row] = []
    tenants, months, compared, untold = set[str](), set[str](), 0, 0
    while True:
        page = await stub.VerifyLedger(request, metadata=mesh.metadata, timeout=mesh.timeout_seconds)
        rows += [_row(page.tenant_id, item) for item in page.differences]
        tenants |= {page.tenant_id} - {""}
        months |= set(page.summed_months)
        compared, untold = compared + page.compared_count, untold + page.untold_count
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    if rows or options.format != "table":
        print_rows(rows, _COLUMNS, options.format)
    if options.format == "table":
        more = f", of which {untold} are not shown" if untold else ""
        print(
            f"{len(tenants)} {'tenant' if len(tenants) == 1 else 'tenants'}, {compared} figures compared, {len(rows) + untold} differ{more}"
        )
        if months:
            print(f"worked out from sums by the hour, for what was kept one by one is dropped: {', '.join(sorted(months))}")
    return 1 if rows else 0


def _row(tenant_id: str, item: pb.LedgerDifference) -> Row:
    return {
        "tenant_id": tenant_id,
        "check": pb.LedgerCheck.Name(item.check).removeprefix("LEDGER_CHECK_").lower(),
        "subject": item.subject,
        "figure": item.figure,
        "stored": item.stored,
        "recomputed": item.recomputed,
    }
