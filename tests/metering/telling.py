"""Short ways to set what is told to whom, and to tell it now: pauses are passed over, nobody waits for a clock."""

from collections.abc import Mapping
from typing import Any

import grpc

from mesh.metering.v1 import export_sink_service_pb2 as pb
from mesh.metering.v1.export_sink_service_pb2_grpc import ExportSinkServiceStub
from services.kernel.rpc import metadata as keys
from services.kernel.rpc.wire_status import decode_rpc_error
from services.metering.adapters.postgres_export_outbox import PostgresExportOutbox
from services.metering.exports.outgoing import Sink, Teller
from services.metering.exports.relay import ExportRelay
from tests.metering.mesh import Mesh, Tenant
from tests.metering.peers import OPERATOR

STRIPE, ENDPOINT = pb.EXPORT_SINK_STRIPE, pb.EXPORT_SINK_ENDPOINT
METERS = {
    "calls.tokens": "tokens_of_calls",
    "calls.count": "number_of_calls",
    "ai_interviews": "interviews",
    "told_counted": "counted",
    "told_level": "level",
}


async def ask(mesh: Mesh, tenant: Tenant | None, method: str, request: Any, credential: str = OPERATOR) -> Any:
    """Calls ExportSinkService as an operator, for one tenant or for none."""
    metadata = [(keys.AUTHORIZATION, f"Bearer {credential}"), (keys.OPERATOR_REASON, "billing")]
    if tenant is not None:
        metadata.append((keys.TENANT_ID, str(tenant.id)))
    try:
        return await getattr(ExportSinkServiceStub(mesh.outside.channel), method)(request, metadata=metadata, timeout=30)
    except grpc.aio.AioRpcError as error:
        raise decode_rpc_error(error, "metering") from None


async def customer(mesh: Mesh) -> tuple[Tenant, str]:
    """A tenant whom Stripe bills, and its customer's id."""
    tenant = mesh.new_tenant()
    name = f"cus_{tenant.id.hex}"
    await ask(mesh, tenant, "SetStripeCustomer", pb.SetStripeCustomerRequest(customer_id=name))
    return tenant, name


async def tell(mesh: Mesh, tellers: Mapping[Sink, Teller], *, rounds: int = 6, max_attempts: int = 24) -> None:
    """Tells what is due, again and again, until nothing is left that waits, or so often."""
    relay = ExportRelay(PostgresExportOutbox(mesh.app.jobs), tellers, poll_seconds=1.0, max_attempts=max_attempts)
    for _ in range(rounds):
        await mesh.admin.execute("UPDATE metering.export_outbox SET due_time = now() - interval '1 s' WHERE NOT is_dead")
        while await relay.tell_due():
            continue
        if not await mesh.admin.fetchval("SELECT count(*) FROM metering.export_outbox WHERE NOT is_dead"):
            return


async def waiting(mesh: Mesh, tenant: Tenant | None, sink: int = 0, **wanted: Any) -> list[pb.PendingExport]:
    """What is not delivered, over all pages."""
    request, found = pb.ListPendingExportsRequest(sink=sink, **wanted), []  # type: ignore[arg-type] # the enum's number
    while True:
        page = await ask(mesh, tenant, "ListPendingExports", request)
        found += page.exports
        request.page_token = page.next_page_token
        if not request.page_token:
            return found
