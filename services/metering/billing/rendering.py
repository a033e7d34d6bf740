"""A closed invoice as a document: JSON, CSV, or a page to print. Pure; every text is escaped, nothing is loaded from elsewhere."""

import csv
import io
import json
from collections.abc import Sequence
from datetime import datetime
from html import escape

from services.metering.billing.books import CreditNote, StoredInvoice
from services.metering.billing.charges import LineKind
from services.metering.billing.exact import NANO_PER_USD
from services.metering.billing.invoice import CURRENCY, InvoiceLine

_STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0 0 1.5rem; }
dt { color: #555; } dd { margin: 0; }
table { width: 100%; border-collapse: collapse; margin: 0 0 1.5rem; }
caption { text-align: left; font-weight: 600; padding: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem .5rem; border-bottom: 1px solid #ddd; }
thead th { border-bottom: 2px solid #1a1a1a; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tfoot tr:last-child { font-weight: 700; }
footer { color: #555; font-size: .85em; overflow-wrap: anywhere; }
@page { size: A4; margin: 18mm; }
@media print {
  body { margin: 0; max-width: none; padding: 0; font-size: 10pt; }
  thead { display: table-header-group; }
  tr { break-inside: avoid; }
}
"""
_CSV_NAMES = (
    "line_number", "kind", "description", "name", "is_late", "period_start", "plan", "plan_version", "span_start", "span_end", "tier",
    "quantity", "nano_usd_per_million", "amount_nano_usd", "amount_usd",
)  # fmt: skip


def usd(nano_usd: int) -> str:
    """Returns an amount in dollars, exactly: at least two decimals, at most nine. Example: -1.50."""
    whole, rest = divmod(abs(nano_usd), NANO_PER_USD)
    decimals = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nano_usd < 0 else ''}{whole}.{decimals}"


def description(line: InvoiceLine) -> str:
    """Says in a line's words what it is for."""
    key = line.line.key
    match key.kind:
        case LineKind.FEE:
            text = f"Fee: {key.name}"
        case LineKind.USAGE:
            text = f"{key.name}, included" if key.tier == 0 else f"{key.name}, tier {key.tier}"
        case LineKind.DISCOUNT:
            text = f"Discount: {key.name}"
        case LineKind.MINIMUM:
            text = "Minimum"
    late = f", late usage of {_day(line.period.start_time)} to {_day(line.period.end_time)}"
    return f"{text} ({line.line.plan} {line.line.plan_version}){late if line.is_late else ''}"


def render_json(stored: StoredInvoice) -> bytes:
    """Returns one JSON object; amounts are integers of nano-USD, times are ISO 8601. Payable is what is due less the credit notes."""
    closing, content = stored.invoice.closing, stored.invoice.content
    document = {
        "invoice_id": str(closing.invoice_id),
        "number": closing.number,
        "currency": CURRENCY,
        "period_start": closing.period.start_time.isoformat(),
        "period_end": closing.period.end_time.isoformat(),
        "close_time": closing.close_time.isoformat(),
        "lines": [dict(zip(_CSV_NAMES, _line_values(number, line), strict=True)) for number, line in enumerate(content.lines, start=1)],
        "charges_nano_usd": content.charges_nano_usd,
        "carried_in_nano_usd": content.carried_in_nano_usd,
        "credits": [{"credit_id": str(use.credit_id), "amount_nano_usd": use.amount_nano_usd} for use in content.credit_uses],
        "due_nano_usd": content.due_nano_usd,
        "carried_out_nano_usd": content.carried_out_nano_usd,
        "credit_notes": [_note(note) for note in stored.notes],
        "payable_nano_usd": content.due_nano_usd - _noted(stored),
        "digest": stored.digest.hex(),
    }
    return json.dumps(document, ensure_ascii=False, indent=1).encode()


def render_csv(stored: StoredInvoice) -> bytes:
    """Returns a line of names and a row for each line, then rows of totals, whose first field is empty."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_CSV_NAMES)
    for number, line in enumerate(stored.invoice.content.lines, start=1):
        writer.writerow(_line_values(number, line))
    for name, amount in _totals(stored):
        writer.writerow(["", "total", name, *[""] * (len(_CSV_NAMES) - 5), amount, usd(amount)])
    return text.getvalue().encode()


def render_html(stored: StoredInvoice) -> bytes:
    """Returns a whole page with its style in it."""
    closing = stored.invoice.closing
    title = f"Invoice {closing.number}"
    facts = [
        ("Invoice", str(closing.invoice_id)),
        ("Period", f"{_day(closing.period.start_time)} to before {_day(closing.period.end_time)} (UTC)"),
        ("Closed", closing.close_time.isoformat(timespec="seconds")),
        ("Currency", CURRENCY),
    ]
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    rows = "".join(_html_row(number, line) for number, line in enumerate(stored.invoice.content.lines, start=1))
    totals = "".join(f'<tr><td colspan="4">{escape(name)}</td><td class="n">{usd(amount)}</td></tr>' for name, amount in _totals(stored))
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1><dl>{listed}</dl>"
        '<table><thead><tr><th scope="col">#</th><th scope="col">Description</th><th scope="col" class="n">Quantity</th>'
        '<th scope="col" class="n">USD per million</th><th scope="col" class="n">USD</th></tr></thead>'
        f"<tbody>{rows}</tbody><tfoot>{totals}</tfoot></table>{_html_notes(stored.notes)}"
        f"<footer>SHA-256 of its content: {stored.digest.hex()}</footer></body></html>\n"
    )
    return page.encode()


def _html_row(number: int, line: InvoiceLine) -> str:
    rated = line.line
    is_usage = rated.key.kind is LineKind.USAGE
    price = usd(rated.nano_usd_per_million) if is_usage else ""
    return (
        f'<tr><td>{number}</td><td>{escape(description(line))}</td><td class="n">{rated.quantity if is_usage else ""}</td>'
        f'<td class="n">{price}</td><td class="n">{usd(rated.amount_nano_usd)}</td></tr>'
    )


def _html_notes(notes: Sequence[CreditNote]) -> str:
    if not notes:
        return ""
    rows = "".join(
        f'<tr><td>{escape(_day(note.issue_time))}</td><td>{escape(note.reason)}</td><td class="n">{usd(-note.amount_nano_usd)}</td></tr>'
        for note in notes
    )
    return f"<table><caption>Credit notes</caption><tbody>{rows}</tbody></table>"


def _totals(stored: StoredInvoice) -> list[tuple[str, int]]:
    content = stored.invoice.content
    noted = _noted(stored)
    totals = [("Charges", content.charges_nano_usd)]
    totals += [("Carried from the invoice before", content.carried_in_nano_usd)] if content.carried_in_nano_usd else []
    totals += [("Prepaid credits", -content.credits_nano_usd)] if content.credits_nano_usd else []
    totals += [("Credit notes", -noted)] if noted else []
    totals += [("Carried to the next invoice", content.carried_out_nano_usd)] if content.carried_out_nano_usd else []
    return [*totals, ("Due", content.due_nano_usd - noted)]


def _noted(stored: StoredInvoice) -> int:
    return sum(note.amount_nano_usd for note in stored.notes)


def _line_values(number: int, line: InvoiceLine) -> tuple[object, ...]:
    rated, key = line.line, line.line.key
    return (
        number,
        key.kind.name.lower(),
        description(line),
        key.name,
        "true" if line.is_late else "false",
        line.period.start_time.isoformat(),
        rated.plan,
        rated.plan_version,
        key.start_time.isoformat(),
        key.end_time.isoformat(),
        key.tier,
        rated.quantity,
        rated.nano_usd_per_million,
        rated.amount_nano_usd,
        usd(rated.amount_nano_usd),
    )


def _note(note: CreditNote) -> dict[str, object]:
    return {
        "credit_note_id": str(note.credit_note_id),
        "amount_nano_usd": note.amount_nano_usd,
        "reason": note.reason,
        "issue_time": note.issue_time.isoformat(),
    }


def _day(moment: datetime) -> str:
    return moment.date().isoformat()
