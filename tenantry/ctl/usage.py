"""`tenantctl usage`: what was used, added up by any of its dimensions and by time."""

import argparse
from collections.abc import Sequence

from mesh.metering.v1 import usage_service_pb2 as pb
from mesh.metering.v1.usage_service_pb2_grpc import UsageServiceStub
from tenantry.ctl import exports
from tenantry.ctl.connection import Mesh
from tenantry.ctl.periods import add_period_options, period_of
from tenantry.ctl.printing import FORMATS, Row, print_rows, time_text
from tenantry.ctl.wrong_use import WrongUse

DIMENSIONS = {
    value.name.removeprefix("USAGE_DIMENSION_").lower(): value.number for value in pb.UsageDimension.DESCRIPTOR.values if value.number
}
BUCKETS = {value.name.removeprefix("USAGE_BUCKET_").lower(): value.number for value in pb.UsageBucket.DESCRIPTOR.values if value.number}
_NAMES = {"tenant": "tenant_id"}
_FIGURES = (
    "settled", "void", "unresolved", "reconciled", "retries", "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens",
    "quantity", "cost_nano_usd",
)  # fmt: skip
_PAGE = 1_000


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    command = commands.add_parser(
        "usage", help="add up what was used", description="Adds up what a tenant used; an operator's key: all of them."
    )
    add_period_options(command)
    command.add_argument("--group-by", default="", metavar="A,B", help=f"what rows are told apart by: {', '.join(DIMENSIONS)}")
    command.add_argument("--bucket", choices=BUCKETS, help="cut the period into hours, days or months")
    command.add_argument("--time-zone", default="", metavar="NAME", help="of buckets, such as Europe/Berlin (default: the tenant's own)")
    command.add_argument("--format", choices=FORMATS, default="table")
    command.set_defaults(run=show)
    exports.add_command(command.add_subparsers(dest="action", metavar="ACTION"))


async def show(mesh: Mesh, options: argparse.Namespace) -> int:
    """Prints the rows of a question."""
    names = _group_names(options.group_by)
    query = pb.UsageQuery(
        group_by=[pb.UsageDimension.ValueType(DIMENSIONS[name]) for name in names],
        bucket=pb.UsageBucket.ValueType(BUCKETS.get(options.bucket, 0)),
        time_zone=options.time_zone,
        page_size=_PAGE,
    )
    period = period_of(options)
    if period.start is not None:
        query.start_time.FromDatetime(period.start)
    if period.end is not None:
        query.end_time.FromDatetime(period.end)
    rows = [_row(row) for row in await _all_rows(mesh, query)]
    columns = (*(("bucket_start",) if options.bucket else ()), *(_NAMES.get(name, name) for name in names), *_FIGURES)
    print_rows(rows, columns, options.format)
    return 0


def _group_names(text: str) -> Sequence[str]:
    names = [name.strip().replace("-", "_") for name in text.split(",") if name.strip()]
    for name in names:
        if name not in DIMENSIONS:
            msg = f"--group-by {name}: choose among {', '.join(DIMENSIONS)}"
            raise WrongUse(msg)
    return names


async def _all_rows(mesh: Mesh, query: pb.UsageQuery) -> list[pb.UsageRow]:
    stub = UsageServiceStub(mesh.channel)
    rows: list[pb.UsageRow] = []
    of_all = mesh.is_operator and not mesh.tenant_id
    while True:
        if of_all:
            asked = pb.QueryUsageOfTenantsRequest(query=query)
            page = await stub.QueryUsageOfTenants(asked, metadata=mesh.metadata, timeout=mesh.timeout_seconds)
            rows += page.rows
            query.page_token = page.next_page_token
        else:
            own = await stub.QueryUsage(pb.QueryUsageRequest(query=query), metadata=mesh.metadata, timeout=mesh.timeout_seconds)
            rows += own.rows
            query.page_token = own.next_page_token
        if not query.page_token:
            return rows


def _row(row: pb.UsageRow) -> Row:
    tokens = row.tokens
    return {
        "bucket_start": time_text(row.bucket_start_time),
        "tenant_id": row.tenant_id,
        "user": row.user,
        "feature": row.feature,
        "model": row.model,
        "prompt_version": row.prompt_version,
        "provider": row.provider,
        "tier": row.tier,
        "product_unit": row.product_unit,
        "settled": row.settled_count,
        "void": row.void_count,
        "unresolved": row.unresolved_count,
        "reconciled": row.reconciled_count,
        "retries": row.retry_count,
        "input_tokens": tokens.input_tokens,
        "output_tokens": tokens.output_tokens,
        "cache_read_tokens": tokens.cache_read_tokens,
        "cache_write_tokens": tokens.cache_write_5m_tokens + tokens.cache_write_1h_tokens,
        "quantity": row.quantity,
        "cost_nano_usd": row.cost.nano_usd,
    }
