"""`tenantctl invoice`: drafts and closed invoices, as tables and as documents; an operator closes a period."""

import argparse
import sys
from pathlib import Path

from mesh.metering.v1 import invoice_service_pb2 as pb
from mesh.metering.v1.invoice_service_pb2_grpc import InvoiceServiceStub
from tenantry.ctl.connection import Mesh
from tenantry.ctl.periods import moment
from tenantry.ctl.printing import FORMATS, Row, print_rows, time_text, usd
from tenantry.ctl.whole_file import whole_file
from tenantry.ctl.wrong_use import WrongUse

_FORMS = {"json": pb.INVOICE_FORMAT_JSON, "csv": pb.INVOICE_FORMAT_CSV, "html": pb.INVOICE_FORMAT_HTML}
_INVOICE = (
    "number",
    "invoice_id",
    "period_start",
    "period_end",
    "charges_nano_usd",
    "credits_nano_usd",
    "due_nano_usd",
    "payable_nano_usd",
)
_LINE = ("line", "description", "quantity", "nano_usd_per_million", "amount_nano_usd")


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the commands."""
    room = commands.add_parser("invoice", help="drafts and closed invoices", description="Drafts and closed invoices of one tenant.")
    actions = room.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the closed invoices, first first")
    listing.add_argument("--format", choices=FORMATS, default="table")
    listing.set_defaults(run=list_all)
    draft = actions.add_parser("draft", help="what the invoice of an open period would say now")
    draft.add_argument("--at", metavar="TIME", help="a moment in the period (default: now)")
    draft.add_argument("--format", choices=FORMATS, default="table")
    draft.set_defaults(run=show_draft)
    closed = actions.add_parser("show", help="the lines of a closed invoice")
    closed.add_argument("invoice", help="its number or its id")
    closed.add_argument("--format", choices=FORMATS, default="table")
    closed.set_defaults(run=show)
    export = actions.add_parser("export", help="a closed invoice as a document")
    export.add_argument("invoice", help="its number or its id")
    export.add_argument("--format", choices=_FORMS, required=True)
    export.add_argument("--output", type=Path, metavar="FILE", help="where to (default: standard output)")
    export.set_defaults(run=write)
    close = actions.add_parser(
        "close", help="operators: close a period", description="Closes a period; closed again it is the same invoice."
    )
    close.add_argument("--period-start", required=True, metavar="TIME", help="when it begins, such as 2026-11-01")
    close.set_defaults(run=close_period)


async def list_all(mesh: Mesh, options: argparse.Namespace) -> int:
    """Prints the closed invoices."""
    print_rows([_row(invoice) for invoice in await _invoices(mesh)], _INVOICE, options.format)
    return 0


async def show_draft(mesh: Mesh, options: argparse.Namespace) -> int:
    """Prints the lines of a draft."""
    mesh.require_tenant()
    request = pb.GetDraftInvoiceRequest()
    if options.at is not None:
        request.at_time.FromDatetime(moment(options.at))
    stub = InvoiceServiceStub(mesh.channel)
    answer = await stub.GetDraftInvoice(request, metadata=mesh.metadata, timeout=mesh.timeout_seconds)
    _print_content(answer.content, options.format)
    return 0


async def show(mesh: Mesh, options: argparse.Namespace) -> int:
    """Prints the lines of a closed invoice."""
    _print_content((await _named(mesh, options.invoice)).content, options.format)
    return 0


async def write(mesh: Mesh, options: argparse.Namespace) -> int:
    """Writes an invoice as a document: the whole of it, or nothing."""
    invoice = await _named(mesh, options.invoice)
    request = pb.RenderInvoiceRequest(invoice_id=invoice.invoice_id, format=_FORMS[options.format])
    answer = await InvoiceServiceStub(mesh.channel).RenderInvoice(request, metadata=mesh.metadata, timeout=mesh.timeout_seconds)
    if options.output is None:
        sys.stdout.buffer.write(answer.document)
        return 0
    with whole_file(options.output) as stream:
        stream.write(answer.document)
    return 0


async def close_period(mesh: Mesh, options: argparse.Namespace) -> int:
    """Closes a period and prints its invoice."""
    mesh.require_operator()
    mesh.require_tenant()
    request = pb.CloseInvoiceRequest()
    request.period_start.FromDatetime(moment(options.period_start))
    answer = await InvoiceServiceStub(mesh.channel).CloseInvoice(request, metadata=mesh.metadata, timeout=mesh.timeout_seconds)
    print_rows([_row(answer.invoice)], _INVOICE, "table")
    return 0


async def _invoices(mesh: Mesh) -> list[pb.Invoice]:
    mesh.require_tenant()
    stub, request = InvoiceServiceStub(mesh.channel), pb.ListInvoicesRequest()
    found: list[pb.Invoice] = []
    while True:
        page = await stub.ListInvoices(request, metadata=mesh.metadata, timeout=mesh.timeout_seconds)
        found += page.invoices
        request.page_token = page.next_page_token
        if not request.page_token:
            return found


async def _named(mesh: Mesh, name: str) -> pb.Invoice:
    mesh.require_tenant()
    if not name.isdigit():
        request = pb.GetInvoiceRequest(invoice_id=name)
        return (await InvoiceServiceStub(mesh.channel).GetInvoice(request, metadata=mesh.metadata, timeout=mesh.timeout_seconds)).invoice
    for invoice in await _invoices(mesh):
        if invoice.number == int(name):
            return invoice
    msg = f"the tenant has no invoice {name}: see `tenantctl invoice list`"
    raise WrongUse(msg)


def _row(invoice: pb.Invoice) -> Row:
    content = invoice.content
    return {
        "number": invoice.number,
        "invoice_id": invoice.invoice_id,
        "period_start": time_text(content.period_start),
        "period_end": time_text(content.period_end),
        "charges_nano_usd": content.charges.nano_usd,
        "credits_nano_usd": sum(use.amount.nano_usd for use in content.credit_uses),
        "due_nano_usd": content.due.nano_usd,
        "payable_nano_usd": content.due.nano_usd - sum(note.amount.nano_usd for note in invoice.credit_notes),
    }


def _print_content(content: pb.InvoiceContent, form: str) -> None:
    rows = [
        {
            "line": line.line_number,
            "description": line.description,
            "quantity": line.quantity,
            "nano_usd_per_million": line.nano_usd_per_million,
            "amount_nano_usd": line.amount.nano_usd,
        }
        for line in content.lines
    ]
    print_rows(rows, _LINE, form)
    if form == "table":
        paid = sum(use.amount.nano_usd for use in content.credit_uses)
        totals = {
            "charges": content.charges.nano_usd,
            "carried in": content.carried_in.nano_usd,
            "credits": -paid,
            "due": content.due.nano_usd,
            "carried out": content.carried_out.nano_usd,
        }
        print(f"\n{time_text(content.period_start)} to before {time_text(content.period_end)}, USD")
        for name, amount in totals.items():
            print(f"{name:<12} {usd(amount)}")
