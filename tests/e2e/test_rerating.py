"""A wrong price corrected in a running mesh: the limits in Redis, the balance and the ledger come to the same new figure."""

from datetime import UTC, datetime, timedelta

import grpc

from devstack.asking import ask
from devstack.environment import DATABASE
from devstack.mesh_client import credentials, open_channel, operator_credentials
from mesh.metering.v1 import price_service_pb2, usage_service_pb2
from mesh.metering.v1.price_service_pb2_grpc import PriceServiceStub
from mesh.ratelimit.v1 import rate_limit_service_pb2
from services.kernel.ids import new_uuid7
from services.kernel.tenant_database import JobsDatabase
from services.kernel.timestamps import to_timestamp
from services.metering.adapters.postgres_prices import load_price_book
from services.metering.price_book import parse_price_book
from services.metering.settings import PACKAGED_PRICE_BOOK
from tests.support.mesh import Mesh
from tests.support.waiting import eventually

# Twice the input, five times the output, long before the packaged version: nobody else's calls are rated by it.
DEAR = PACKAGED_PRICE_BOOK.read_text().replace('version: "2026-01"', 'version: "dear"').replace('"2026-01-01T', '"2019-01-01T')
DEAR = DEAR.replace('input: "1.00"', 'input: "2.00"').replace('output: "5.00"', 'output: "25.00"')


async def test_limits_in_redis_count_what_a_call_costs_by_the_right_price(mesh: Mesh) -> None:
    """After a re-rating day and month at the limits have the new cost, tokens stay, and the next call adds to it."""
    tenant = await mesh.tenant("free")
    owner = await JobsDatabase.open(mesh.stack.postgres.dsn(DATABASE), max_size=1)
    try:
        await load_price_book(owner, parse_price_book(DEAR))
    finally:
        await owner.close()
    first = await ask(mesh.client, tenant, "What do you know?")
    usage = first.summary.usage
    right = usage.input_tokens * 2_000 + usage.output_tokens * 25_000
    assert right > first.cost_nano_usd

    async def used() -> dict[str, int]:
        request, metadata = rate_limit_service_pb2.ListLimitsRequest(), credentials(tenant.api_key)
        listed = await mesh.client.limits.ListLimits(request, metadata=metadata, timeout=5)
        return {limit.rule: limit.used for limit in listed.limits}

    async def counts(cost: int) -> bool:
        try:
            now = await used()
        except grpc.aio.AioRpcError as error:
            # They are being rebuilt from the ledger.
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            return False
        return now["concurrent_calls"] == 0 and now["cost_nano_usd_per_day"] == now["cost_nano_usd_per_month"] == cost

    await eventually(lambda: counts(first.cost_nano_usd), within_seconds=30.0)
    before = await used()
    assert await rerated(mesh, str(tenant.tenant_id)) == right - first.cost_nano_usd
    await eventually(lambda: counts(right), within_seconds=30.0)
    after = await used()
    assert (after["tokens_per_day"], after["tokens_per_month"]) == (before["tokens_per_day"], before["tokens_per_month"])
    second = await ask(mesh.client, tenant, "What do you know?")
    await eventually(lambda: counts(right + second.cost_nano_usd), within_seconds=30.0)
    balance = await mesh.client.usage.GetBalance(usage_service_pb2.GetBalanceRequest(), metadata=credentials(tenant.api_key), timeout=5)
    assert balance.cost.nano_usd == right + second.cost_nano_usd


async def rerated(mesh: Mesh, tenant_id: str) -> int:
    """Rates the tenant's calls of now anew, as an operator; returns how much more they cost."""
    metadata = (*operator_credentials(mesh.stack.state.secrets.operator_key, "a wrong price"), ("x-tenant-id", tenant_id))
    now = datetime.now(UTC)
    order = price_service_pb2.RerateUsageRequest(
        start_time=to_timestamp(now - timedelta(hours=1)),
        end_time=to_timestamp(now + timedelta(hours=1)),
        price_versions=["2026-01"],
        right_version="dear",
        validate_only=True,
    )
    async with open_channel(mesh.stack.ports.address("metering"), None) as channel:
        prices = PriceServiceStub(channel)
        order.cutoff_time.CopyFrom((await prices.RerateUsage(order, metadata=metadata, timeout=10)).cutoff_time)
        order.rerating_id, order.validate_only = str(new_uuid7()), False
        answer = await prices.RerateUsage(order, metadata=metadata, timeout=10)
    assert answer.is_done
    return answer.difference.nano_usd
