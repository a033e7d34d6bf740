"""Short ways to load price versions and to rate a tenant's calls anew, through the real service as an operator."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

import grpc

from mesh.metering.v1 import price_service_pb2 as pb
from services.kernel.ids import new_uuid7
from services.kernel.rpc import metadata as keys
from services.kernel.rpc.wire_status import decode_rpc_error
from services.kernel.tenant_database import JobsDatabase
from services.kernel.timestamps import to_timestamp
from services.metering.adapters.postgres_prices import load_price_book
from services.metering.price_book import parse_price_book
from tests.metering.mesh import MODEL, VERSION, Mesh, Tenant, bill
from tests.metering.peers import OPERATOR

# Long before the packaged version: the one in force stays in force. Versions of other tests share the database.
BOOK = """
versions:
  - {version: right, effective_time: "2020-01-01T00:00:00Z", source: a test, retrieved: "2020-01-01", prices: [
      {provider: anthropic, model: MODEL, input: "0.7000001", output: "7.5", cache_read: "0.0333333", cache_write_5m: "1.1",
       cache_write_1h: "3"},
      {provider: anthropic, model: claude-opus-4-6, input: "4", output: "30", cache_read: "0", cache_write_5m: "1", cache_write_1h: "1"}]}
  - {version: other, effective_time: "2020-01-02T00:00:00Z", source: a test, retrieved: "2020-01-01", prices: [
      {provider: anthropic, model: MODEL, input: "2", output: "2", cache_read: "2", cache_write_5m: "2", cache_write_1h: "2"}]}
""".replace("MODEL", MODEL)
RIGHT, OTHER, OPUS = "right", "other", "claude-opus-4-6"
DAY = timedelta(days=1)
# What the entries say of each call, and what its row says.
AGREEMENT = """
SELECT k.cost_nano_usd = sum(n.cost_nano_usd) FROM metering.calls k
JOIN metering.entries n ON n.tenant_id = k.tenant_id AND n.reservation_id = k.reservation_id
WHERE k.tenant_id = $1 GROUP BY k.reservation_id, k.cost_nano_usd
"""
ADJUSTMENTS = "SELECT * FROM metering.entries WHERE tenant_id = $1 AND kind = 3 ORDER BY record_time, number"


async def load_versions(mesh: Mesh) -> None:
    """Loads the versions of these tests, unless they are there."""
    owner = await JobsDatabase.open(mesh.settings.postgres_admin_dsn.get_secret_value(), max_size=1)
    try:
        await load_price_book(owner, parse_price_book(BOOK))
    finally:
        await owner.close()


async def as_operator(
    mesh: Mesh, tenant: Tenant | None, method: str, request: object, *, reason: str = "a wrong price", credential: str = OPERATOR
):
    """Calls PriceService from outside as an operator, who names the tenant where there is one."""
    metadata = [(keys.AUTHORIZATION, f"Bearer {credential}"), (keys.OPERATOR_REASON, reason)]
    if tenant is not None:
        metadata.append((keys.TENANT_ID, str(tenant.id)))
    try:
        return await getattr(mesh.outside.prices, method)(request, metadata=metadata, timeout=30)
    except grpc.aio.AioRpcError as error:
        raise decode_rpc_error(error, "metering") from None


def order(
    versions: Sequence[str] = (VERSION,), right: str = RIGHT, start: datetime | None = None, end: datetime | None = None, **more: object
) -> pb.RerateUsageRequest:
    """What to rate anew: the last 400 days and the next one, unless told otherwise."""
    now = datetime.now(UTC)
    return pb.RerateUsageRequest(
        start_time=to_timestamp(start or now - 400 * DAY),
        end_time=to_timestamp(end or now + DAY),
        price_versions=versions,
        right_version=right,
        **more,  # type: ignore[arg-type] # fields of the message
    )


async def previewed(mesh: Mesh, tenant: Tenant, wanted: pb.RerateUsageRequest) -> pb.RerateUsageResponse:
    """What it would change."""
    asked = pb.RerateUsageRequest()
    asked.CopyFrom(wanted)
    asked.validate_only = True
    return await as_operator(mesh, tenant, "RerateUsage", asked)


async def seen(mesh: Mesh, tenant: Tenant, wanted: pb.RerateUsageRequest) -> pb.RerateUsageRequest:
    """The same with an id and the cutoff that a look at it answered: ready to be done."""
    wanted.cutoff_time.CopyFrom((await previewed(mesh, tenant, wanted)).cutoff_time)
    wanted.rerating_id = wanted.rerating_id or str(new_uuid7())
    return wanted


async def rerated(mesh: Mesh, tenant: Tenant, wanted: pb.RerateUsageRequest) -> pb.RerateUsageResponse:
    """Looks, then does it to the end."""
    ready = await seen(mesh, tenant, wanted)
    while True:
        answer = await as_operator(mesh, tenant, "RerateUsage", ready)
        if answer.is_done:
            return answer


async def used(mesh: Mesh, tenant: Tenant, usages: Sequence[dict[str, int]], **opening: object) -> list[UUID]:
    """Settles a call for each usage and returns their reservations."""
    calls = [mesh.opening(tenant, **opening) for _ in usages]
    for first in range(0, len(calls), 500):
        await mesh.open(*calls[first : first + 500])
        chosen = zip(calls[first : first + 500], usages[first : first + 500], strict=True)
        await mesh.settle(*[bill(call.ref, **usage) for call, usage in chosen])
    return [UUID(bytes=call.ref.reservation_id) for call in calls]


async def total(mesh: Mesh, tenant: Tenant) -> int:
    """What the tenant's entries cost in all."""
    return int(await mesh.admin.fetchval("SELECT coalesce(sum(cost_nano_usd), 0) FROM metering.entries WHERE tenant_id = $1", tenant.id))


async def agrees(mesh: Mesh, tenant: Tenant) -> bool:
    """Whether every call costs what its entries add up to."""
    return all(row[0] for row in await mesh.admin.fetch(AGREEMENT, tenant.id))


async def adjustments(mesh: Mesh, tenant: Tenant) -> list[tuple[int, str, int]]:
    """Number, version and amount of each adjustment, in the order they were written."""
    rows = await mesh.admin.fetch(ADJUSTMENTS, tenant.id)
    return [(row["number"], row["price_version"], row["cost_nano_usd"]) for row in rows]
