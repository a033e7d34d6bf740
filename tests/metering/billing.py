"""Short ways to use, subscribe and bill a tenant, through the real service as its own application and as an operator."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

import grpc

from mesh.common.v1.money_pb2 import NanoUsd
from mesh.metering.v1 import invoice_service_pb2 as pb
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.rpc import metadata as keys
from services.kernel.rpc.wire_status import decode_rpc_error
from services.kernel.timestamps import to_timestamp
from services.metering.adapters.postgres_closings import PostgresClosings
from services.metering.billing.making import Mismatch, verify
from services.metering.billing.periods import BillingPeriod, period_of
from tests.metering.mesh import Mesh, Tenant, bill
from tests.metering.peers import OPERATOR

USD = 1_000_000_000


def ended(ago: int, anchor_day: int = 1) -> BillingPeriod:
    """The billing period that many before the one of now; 0 is the one of now."""
    found = period_of(datetime.now(UTC), anchor_day)
    for _ in range(ago):
        found = period_of(found.start_time - timedelta(seconds=1), anchor_day)
    return found


async def ask(mesh: Mesh, tenant: Tenant, method: str, request: object, *, operator: bool = False):
    """Calls InvoiceService from outside: with the tenant's key, or as an operator who names the tenant and a reason."""
    credential = OPERATOR if operator else f"key-{tenant.id}"
    metadata = [(keys.AUTHORIZATION, f"Bearer {credential}")]
    if operator:
        metadata += [(keys.TENANT_ID, str(tenant.id)), (keys.OPERATOR_REASON, "billing")]
    try:
        return await getattr(mesh.outside.invoices, method)(request, metadata=metadata, timeout=30)
    except grpc.aio.AioRpcError as error:
        raise decode_rpc_error(error, "metering") from None


async def subscribe(mesh: Mesh, tenant: Tenant, plan: str, time: datetime | None = None, anchor_day: int = 0, subscription_id: str = ""):
    """Puts a tenant on a plan."""
    request = pb.SetSubscriptionRequest(
        subscription_id=subscription_id or str(new_uuid7()), plan=plan, effective_time=to_timestamp(time), anchor_day=anchor_day
    )
    return await ask(mesh, tenant, "SetSubscription", request, operator=True)


async def close(mesh: Mesh, tenant: Tenant, period: BillingPeriod) -> pb.Invoice:
    """Closes a period."""
    request = pb.CloseInvoiceRequest(period_start=to_timestamp(period.start_time))
    return (await ask(mesh, tenant, "CloseInvoice", request, operator=True)).invoice


async def grant(mesh: Mesh, tenant: Tenant, amount: int, **terms: object) -> pb.Credit:
    """Grants a credit."""
    values = {"credit_id": str(new_uuid7()), "amount": NanoUsd(nano_usd=amount)} | terms
    return (await ask(mesh, tenant, "GrantCredit", pb.GrantCreditRequest(**values), operator=True)).credit


async def use_units(mesh: Mesh, tenant: Tenant, time: datetime, quantity: int = 1, unit: str = "ai_interviews") -> None:
    """Records a use of units at a time."""
    await mesh.record(mesh.use(tenant, reserve_time=time, quantity=quantity, product_unit=unit))


async def use_tokens(mesh: Mesh, tenant: Tenant, time: datetime, tokens: Sequence[int]) -> None:
    """Settles calls that were reserved at a time, one for each count of output tokens."""
    calls = [mesh.opening(tenant, reserve_time=time) for _ in tokens]
    await mesh.open(*calls)
    await mesh.settle(*[bill(call.ref, input_tokens=0, output_tokens=count) for call, count in zip(calls, tokens, strict=True)])


async def recomputed(mesh: Mesh, tenant: Tenant) -> Sequence[Mismatch]:
    """What of the tenant's stored invoices is not what the books say."""
    async with PostgresClosings(mesh.app.jobs).reading(TenantId(tenant.id)) as reader:
        return await verify(reader)


def lines_of(invoice: pb.Invoice) -> list[tuple[str, int, int, int]]:
    """Name, tier, quantity and amount of each line."""
    return [(line.name, line.tier, line.quantity, line.amount.nano_usd) for line in invoice.content.lines]


async def rows_of(mesh: Mesh, tenant: Tenant) -> list[int]:
    """How many rows of each billing table the tenant has."""
    tables = ("subscriptions", "credits", "invoice_closings", "invoices", "invoice_lines", "credit_uses", "credit_notes")
    return [
        await mesh.admin.fetchval(f"SELECT count(*) FROM metering.{table} WHERE tenant_id = $1", UUID(int=tenant.id.int))
        for table in tables
    ]


async def noted(mesh: Mesh, tenant: Tenant, invoice_id: str, amount: int, note_id: str = "", reason: str = "wrong") -> pb.Invoice:
    """Issues a credit note."""
    request = pb.IssueCreditNoteRequest(
        credit_note_id=note_id or str(new_uuid7()), invoice_id=invoice_id, amount=NanoUsd(nano_usd=amount), reason=reason
    )
    return (await ask(mesh, tenant, "IssueCreditNote", request, operator=True)).invoice


async def used_starter(mesh: Mesh) -> Tenant:
    """A tenant of the starter plan for three periods, with 23 interviews and 1,000,600 tokens in the second one before this."""
    tenant = mesh.new_tenant()
    await subscribe(mesh, tenant, "starter", ended(3).start_time)
    await use_units(mesh, tenant, ended(2).start_time, quantity=20)
    await use_units(mesh, tenant, ended(2).end_time - timedelta(microseconds=1), quantity=3)
    await use_tokens(mesh, tenant, ended(2).start_time + timedelta(hours=1), [1_000_000, 600])
    return tenant
