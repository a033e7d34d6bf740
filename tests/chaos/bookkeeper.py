"""Who bills the tenants of a storm: puts them on a plan, closes months while everything dies, and reads the invoices afterwards."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import grpc

from devstack.mesh_client import MeshClient, Metadata, credentials, operator_credentials
from devstack.stack import Stack
from devstack.state import DemoTenant
from mesh.metering.v1 import event_service_pb2, invoice_service_pb2
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.tenant_database import JobsDatabase
from services.kernel.timestamps import to_timestamp
from services.metering.adapters.postgres_closings import PostgresClosings
from services.metering.billing.making import verify
from tests.chaos.callers import EVENT_TYPE, PRODUCT, UNIT
from tests.chaos.faults import Faults
from tests.metering.billing import ended

PLAN = "professional"
# Of the months that a storm bills, those that are closed in it; the last is the one that runs.
CLOSED = 2
_SETUP_SECONDS = 20.0
_TRY_SECONDS = 3.0
_REPEAT_SECONDS = 0.5
# After the storm: what nobody kills any more is closed within this.
_LATEST_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Bills:
    """What a tenant is billed, in nano-USD: by each month that was closed in the storm, and by the draft of the one that runs.

    `remade`: a sentence for each stored invoice that says something else when it is made again from the ledger.
    """

    charges: Sequence[int]
    draft: int
    remade: Sequence[str]


class Bookkeeper:
    """The operator of one mesh who bills."""

    def __init__(self, stack: Stack, client: MeshClient, faults: Faults) -> None:
        self._stack, self._client, self._faults = stack, client, faults
        self._operator = operator_credentials(stack.state.secrets.operator_key, "chaos")
        # As they are when the storm begins: it may last into another month.
        self.months = tuple(ended(ago) for ago in reversed(range(CLOSED + 1)))

    async def register(self) -> None:
        """Makes the callers' type of events known."""
        kind = event_service_pb2.EventType(product=PRODUCT, type=EVENT_TYPE, unit=UNIT, aggregation=event_service_pb2.AGGREGATION_SUM)
        request = event_service_pb2.RegisterEventTypeRequest(event_type=kind)
        await self._client.events.RegisterEventType(request, metadata=self._operator, timeout=_SETUP_SECONDS)

    async def subscribe(self, tenant: DemoTenant) -> None:
        """Bills a tenant from the beginning of the first month that is closed."""
        request = invoice_service_pb2.SetSubscriptionRequest(
            subscription_id=str(new_uuid7()), plan=PLAN, effective_time=to_timestamp(self.months[0].start_time)
        )
        await self._client.invoices.SetSubscription(request, metadata=self._as_operator(tenant), timeout=_SETUP_SECONDS)

    async def close(self, tenant: DemoTenant, at: Sequence[float]) -> None:
        """Closes the months before this one, each at its time on time.monotonic(), and asks again until it is told the invoice."""
        for month, begins in zip(self.months[:CLOSED], at, strict=True):
            await asyncio.sleep(max(0.0, begins - time.monotonic()))
            request = invoice_service_pb2.CloseInvoiceRequest(period_start=to_timestamp(month.start_time))
            last = at[-1] + _LATEST_SECONDS
            while True:
                try:
                    await self._client.invoices.CloseInvoice(request, metadata=self._as_operator(tenant), timeout=_TRY_SECONDS)
                    break
                except grpc.aio.AioRpcError as error:
                    self._faults.read("CloseInvoice", tenant.tenant_id, error)
                    if time.monotonic() > last:
                        break
                    await asyncio.sleep(_REPEAT_SECONDS)

    async def bills(self, tenant: DemoTenant, seconds: float) -> Bills:
        """Reads what a tenant is billed, and makes it again. Raises: grpc.aio.AioRpcError."""
        key = credentials(tenant.api_key)
        listed = await self._client.invoices.ListInvoices(invoice_service_pb2.ListInvoicesRequest(), metadata=key, timeout=seconds)
        running = invoice_service_pb2.GetDraftInvoiceRequest(at_time=to_timestamp(self.months[-1].start_time))
        drafted = await self._client.invoices.GetDraftInvoice(running, metadata=key, timeout=seconds)
        charges = [invoice.content.charges.nano_usd for invoice in listed.invoices]
        return Bills(charges, drafted.content.charges.nano_usd, await self._remade(tenant))

    async def _remade(self, tenant: DemoTenant) -> list[str]:
        async with contextlib.AsyncExitStack() as stack:
            jobs = await JobsDatabase.open(self._stack.postgres.dsn("tenantry"), max_size=1, application_name="chaos")
            stack.push_async_callback(jobs.close)
            reader = await stack.enter_async_context(PostgresClosings(jobs).reading(TenantId(UUID(tenant.tenant_id))))
            return [
                f"invoice {found.closing.number} is {found.stored_digest.hex()} and would be made as {found.recomputed}"
                for found in await verify(reader)
            ]

    def _as_operator(self, tenant: DemoTenant) -> Metadata:
        return (*self._operator, ("x-tenant-id", tenant.tenant_id))
