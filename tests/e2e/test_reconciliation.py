"""kill -9 in mid-stream, then the provider's own ledger: the call is closed with its tokens and nano-dollars, and its hold becomes use."""

import json
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg

from devstack.mesh_client import credentials, operator_credentials
from devstack.provider_stub.ledger import fold
from devstack.state import DemoTenant
from mesh.metering.v1 import ledger_service_pb2, reconciliation_service_pb2, usage_service_pb2
from tests.chaos.books import Prices, Tokens, cost_nano_usd, read_ledger
from tests.e2e.test_crash import SETTLES_WITHIN_SECONDS, begin_slow_stream, ledger_state, used_limits
from tests.support.mesh import Mesh, running_mesh
from tests.support.waiting import eventually

AGE = timedelta(minutes=10)
MAKE_OLD = """
UPDATE metering.calls SET reserve_time = reserve_time - $2::interval, open_time = open_time - $2::interval,
    dispatch_deadline = dispatch_deadline - $2::interval
WHERE tenant_id = $1
"""


def line_of(mesh: Mesh, call_id: uuid.UUID) -> dict[str, Any]:
    """The call's last line in the provider's ledger."""
    (line,) = [line for line in fold(_ledger(mesh)) if line["call_id"] == str(call_id)]
    return line


def _ledger(mesh: Mesh) -> Path:
    return mesh.stack.state.folder / "provider-ledger.jsonl"


async def make_old(mesh: Mesh, tenant: DemoTenant, call_id: uuid.UUID) -> None:
    """Lets the call be of ten minutes ago on both ledgers: it cannot be dispatched any more."""
    connection = await asyncpg.connect(mesh.stack.postgres.dsn("tenantry"))
    await connection.execute(MAKE_OLD, uuid.UUID(tenant.tenant_id), AGE)
    await connection.close()
    line = line_of(mesh, call_id)
    line["started_at"] = (datetime.fromisoformat(line["started_at"]) - AGE).isoformat()
    with _ledger(mesh).open("a") as lines:
        lines.write(json.dumps(line) + "\n")


async def reconcile(mesh: Mesh) -> reconciliation_service_pb2.ReconcileProviderResponse:
    """Asks for the last hour, as an operator."""
    request = reconciliation_service_pb2.ReconcileProviderRequest()
    request.start_time.FromDatetime(datetime.now(UTC) - timedelta(hours=1))
    metadata = operator_credentials(mesh.stack.state.secrets.operator_key, "a replica was killed")
    return await mesh.client.reconciliations.ReconcileProvider(request, metadata=metadata, timeout=30)


async def billed(mesh: Mesh, tenant: DemoTenant) -> tuple[Tokens, int, Prices, str]:
    """The one entry of the tenant: its tokens and cost, the prices, and which of them rate it."""
    ledger = await read_ledger(mesh.stack.postgres.dsn("tenantry"), tenant.tenant_id)
    (entry,) = ledger.entries
    return entry.tokens, entry.cost_nano_usd, ledger.prices, entry.price_version


async def test_a_killed_call_is_reconciled_with_the_providers_figures() -> None:
    """Exactly the provider's tokens, rated by the price of the open; what was held at the bound is used; asked again nothing changes."""
    async with running_mesh(trace_sample_ratio=0.0) as mesh:
        tenant, call_id = await mesh.tenant(), uuid.uuid4()
        stream = await begin_slow_stream(mesh, tenant, call_id)
        process = mesh.stack.processes["inference"]
        process.kill()
        await process.wait()
        stream.cancel()

        async def is_over() -> bool:
            unresolved = await ledger_state(mesh, tenant, call_id) == ledger_service_pb2.CALL_STATE_UNRESOLVED
            return unresolved and line_of(mesh, call_id)["outcome"] == "cancelled"

        await eventually(is_over, within_seconds=SETTLES_WITHIN_SECONDS * 2)
        held = await used_limits(mesh, tenant)
        # The call may still be dispatched: nothing is concluded, whatever the provider says.
        assert (await reconcile(mesh)).reconciled_count == 0
        await make_old(mesh, tenant, call_id)
        assert (await reconcile(mesh)).reconciled_count == 1

        line = line_of(mesh, call_id)
        tokens, cost, prices, version = await billed(mesh, tenant)
        assert tokens == Tokens(line["input_tokens"], line["output_tokens"], line["cache_read"])
        assert tokens.output > 0
        assert cost == cost_nano_usd(tokens, prices[version, line["model"]])
        record = await mesh.client.usage.GetCall(
            usage_service_pb2.GetCallRequest(call_id=str(call_id)), metadata=credentials(tenant.api_key), timeout=5
        )
        assert record.attempts[0].state == ledger_service_pb2.CALL_STATE_RECONCILED

        async def is_used() -> bool:
            used = await used_limits(mesh, tenant)
            return used["cost_nano_usd_per_month"] == cost and used["tokens_per_month"] == sum(tokens)

        assert held["cost_nano_usd_per_month"] > cost
        await eventually(is_used, within_seconds=SETTLES_WITHIN_SECONDS)
        again = await reconcile(mesh)
        assert (again.reconciled_count, again.drifting_count) == (0, 0)
        assert await billed(mesh, tenant) == (tokens, cost, prices, version)
