"""Short ways to verify books as an operator does, and to spoil them as nobody can but a superuser."""

import grpc

from mesh.metering.v1 import verification_service_pb2 as pb
from mesh.metering.v1 import verification_service_pb2_grpc
from services.kernel.rpc import metadata as keys
from services.kernel.rpc.wire_status import decode_rpc_error
from tests.metering.billing import close, ended, subscribe, use_tokens, use_units
from tests.metering.events import event, record, register
from tests.metering.mesh import Mesh, Tenant
from tests.metering.peers import OPERATOR
from tests.metering.usage import fold

# Everything the log of use and its sums may hold of a tenant.
Told = tuple[int, str, str, str, str]


async def verified(mesh: Mesh, tenant: Tenant | None, credential: str = OPERATOR, token: str = "") -> list[pb.VerifyLedgerResponse]:
    """Walks all pages of one tenant's books, or of all; from a token on where one is given."""
    stub = verification_service_pb2_grpc.VerificationServiceStub(mesh.outside.channel)
    metadata = [(keys.AUTHORIZATION, f"Bearer {credential}"), (keys.OPERATOR_REASON, "audit")]
    if tenant is not None:
        metadata.append((keys.TENANT_ID, str(tenant.id)))
    pages = []
    while True:
        try:
            pages.append(await stub.VerifyLedger(pb.VerifyLedgerRequest(page_token=token), metadata=metadata, timeout=60))
        except grpc.aio.AioRpcError as error:
            raise decode_rpc_error(error, "metering") from None
        token = pages[-1].next_page_token
        if not token:
            return pages


async def differences(mesh: Mesh, tenant: Tenant) -> list[Told]:
    """What of the tenant's books differs."""
    found = [item for page in await verified(mesh, tenant) for item in page.differences]
    return [(item.check, item.subject, item.figure, item.stored, item.recomputed) for item in found]


async def spoil(mesh: Mesh, sql: str, *args: object) -> None:
    """Changes rows past policies and triggers; asserts that it changed some."""
    async with mesh.admin.acquire() as connection, connection.transaction():
        await connection.execute("SET LOCAL session_replication_role = replica")
        assert (await connection.execute(sql, *args)).split()[-1] != "0"


async def busy_tenant(mesh: Mesh) -> Tenant:
    """A tenant with calls, units, events and a closed invoice; its log is folded."""
    tenant = mesh.new_tenant()
    await subscribe(mesh, tenant, "starter", ended(3).start_time)
    await use_tokens(mesh, tenant, ended(2).start_time, [1_000, 500])
    await use_units(mesh, tenant, ended(2).start_time, quantity=23)
    await register(mesh)
    await record(mesh, tenant, [event(time=ended(2).start_time, quantity=4)])
    await close(mesh, tenant, ended(2))
    await fold(mesh)
    return tenant
