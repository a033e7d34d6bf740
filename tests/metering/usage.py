"""What a tenant used, worked out a second time from the books alone; and short ways to ask the service for it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

import grpc

from mesh.metering.v1 import usage_service_pb2 as pb
from services.kernel.rpc import metadata as keys
from services.kernel.rpc.wire_status import decode_rpc_error
from services.metering.adapters.postgres_jobs import PostgresJobs
from services.metering.usage_folder import UsageFolder
from tests.metering.mesh import Mesh, Tenant
from tests.metering.peers import OPERATOR

USER, FEATURE, MODEL = pb.USAGE_DIMENSION_USER, pb.USAGE_DIMENSION_FEATURE, pb.USAGE_DIMENSION_MODEL
PROMPT, PROVIDER, TIER = pb.USAGE_DIMENSION_PROMPT_VERSION, pb.USAGE_DIMENSION_PROVIDER, pb.USAGE_DIMENSION_TIER
UNIT, TENANT = pb.USAGE_DIMENSION_PRODUCT_UNIT, pb.USAGE_DIMENSION_TENANT
EVENT_TYPE = pb.USAGE_DIMENSION_EVENT_TYPE
REASON, RULE = pb.USAGE_DIMENSION_REFUSAL_REASON, pb.USAGE_DIMENSION_REFUSAL_RULE
HOUR, DAY, MONTH = pb.USAGE_BUCKET_HOUR, pb.USAGE_BUCKET_DAY, pb.USAGE_BUCKET_MONTH
NAMES = ("user", "feature", "model", "prompt_version", "provider", "tier", "product_unit")
ALL_NAMES = (USER, FEATURE, MODEL, PROMPT, PROVIDER, TIER, UNIT)

# Amounts by (bucket, names…); amounts are named by (measure).
Sums = dict[tuple[object, ...], Counter[str]]

# Amounts come from the append-only entries, names and states from the calls: two books, as an auditor would read them.
BOOKS = """
SELECT k.reserve_time, k.state, k.attempt, k.end_cause, coalesce(k.provider, '') AS provider, coalesce(k.model, '') AS model, k.feature,
       k.user_name AS user, k.prompt_version, k.tier, coalesce(k.product_unit, '') AS product_unit, e.*, u.quantity AS units
FROM metering.calls k
LEFT JOIN LATERAL (
    SELECT sum(input_tokens)::bigint AS input_tokens, sum(output_tokens)::bigint AS output_tokens,
           sum(cache_read_tokens)::bigint AS cache_read_tokens, sum(cost_nano_usd)::bigint AS cost
    FROM metering.entries e WHERE e.tenant_id = k.tenant_id AND e.reservation_id = k.reservation_id) e ON true
LEFT JOIN metering.unit_entries u ON u.tenant_id = k.tenant_id AND u.reservation_id = k.reservation_id
WHERE k.tenant_id = $1 AND k.reserve_time IS NOT NULL AND k.state <> 1
"""
STATES = {2: "settled", 3: "void", 4: "unresolved", 5: "reconciled"}


async def books(mesh: Mesh, tenant: Tenant, names: Sequence[str] = NAMES, *, hours: bool = False) -> Sums:
    """Sums by names, and by the hour of UTC where wanted."""
    sums: Sums = {}
    for row in await mesh.admin.fetch(BOOKS, tenant.id):
        hour = row["reserve_time"].replace(minute=0, second=0, microsecond=0) if hours else None
        counts = sums.setdefault((hour, *(row[name] for name in names)), Counter())
        if row["product_unit"]:
            counts["quantity"] += row["units"]
            continue
        counts[STATES[row["state"]]] += 1
        counts["retries"] += row["attempt"] > 1
        for amount in ("input_tokens", "output_tokens", "cache_read_tokens", "cost"):
            counts[amount] += row[amount] or 0
    return {key: +counts for key, counts in sums.items()}


def told(rows: Iterable[pb.UsageRow], names: Sequence[str] = NAMES, *, hours: bool = False) -> Sums:
    """An answer in the shape of `books`; no group is told twice."""
    sums: Sums = {}
    for row in rows:
        start = row.bucket_start_time.ToDatetime(tzinfo=UTC) if hours else None
        key = (start, *(getattr(row, name) for name in names))
        assert key not in sums
        sums[key] = +Counter(
            settled=row.settled_count,
            void=row.void_count,
            unresolved=row.unresolved_count,
            reconciled=row.reconciled_count,
            retries=row.retry_count,
            input_tokens=row.tokens.input_tokens,
            output_tokens=row.tokens.output_tokens,
            cache_read_tokens=row.tokens.cache_read_tokens,
            cost=row.cost.nano_usd,
            quantity=row.quantity,
        )
    return sums


def asking(*group_by: int, start: datetime | None = None, end: datetime | None = None, **more: object) -> pb.UsageQuery:
    """A question, from a month ago unless told otherwise."""
    query = pb.UsageQuery(group_by=group_by, **more)  # type: ignore[arg-type] # the enum's numbers
    query.start_time.FromDatetime(start or datetime.now(UTC) - timedelta(days=30))
    if end is not None:
        query.end_time.FromDatetime(end)
    return query


async def query(mesh: Mesh, tenant: Tenant, asked: pb.UsageQuery) -> pb.QueryUsageResponse:
    """Asks as the tenant's own application does, before and after what was counted is folded: the answers are the same."""
    request, credential = pb.QueryUsageRequest(query=asked), f"key-{tenant.id}"
    before = await _answered(mesh.outside.usage.QueryUsage, request, credential)
    await fold(mesh)
    after = await _answered(mesh.outside.usage.QueryUsage, request, credential)
    assert list(before.rows) == list(after.rows)
    return after


async def fold(mesh: Mesh) -> None:
    """Folds everything that is committed, whoever else folds as well."""
    folder = UsageFolder(PostgresJobs(mesh.app.jobs), fold_seconds=1.0)
    while await mesh.admin.fetchval("SELECT count(*) FROM metering.usage_pending"):
        await folder.fold()


async def balance(mesh: Mesh, tenant: Tenant) -> pb.GetBalanceResponse:
    """Asks for the tenant's balance as its own application does."""
    return await _answered(mesh.outside.usage.GetBalance, pb.GetBalanceRequest(), f"key-{tenant.id}")


async def query_tenants(mesh: Mesh, asked: pb.UsageQuery, *tenants: Tenant, reason: str = "ticket 4711") -> pb.QueryUsageOfTenantsResponse:
    """Asks as an operator does."""
    request = pb.QueryUsageOfTenantsRequest(query=asked, tenant_ids=[str(tenant.id) for tenant in tenants])
    extra = ((keys.OPERATOR_REASON, reason),) if reason else ()
    return await _answered(mesh.outside.usage.QueryUsageOfTenants, request, OPERATOR, *extra)


async def every_row(mesh: Mesh, tenant: Tenant, asked: pb.UsageQuery) -> list[pb.UsageRow]:
    """Walks the pages."""
    rows: list[pb.UsageRow] = []
    while True:
        page = await query(mesh, tenant, asked)
        rows.extend(page.rows)
        asked.page_token = page.next_page_token
        if not page.next_page_token:
            return rows


async def _answered(call, request, credential: str, *extra: tuple[str, str]):
    try:
        return await call(request, metadata=((keys.AUTHORIZATION, f"Bearer {credential}"), *extra), timeout=15)
    except grpc.aio.AioRpcError as error:
        raise decode_rpc_error(error, "metering") from None
