"""A metering process that is killed between a closing and its invoice: nothing is lost, nothing is billed twice."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import grpc

from devstack.ports import LOOPBACK, free_port
from mesh.metering.v1 import invoice_service_pb2 as pb
from mesh.metering.v1.invoice_service_pb2_grpc import InvoiceServiceStub
from services.kernel.rpc import metadata as keys
from services.kernel.timestamps import to_timestamp
from tests.metering.billing import USD, close, ended, lines_of, recomputed, rows_of, subscribe, use_units
from tests.metering.mesh import Mesh
from tests.metering.peers import OPERATOR
from tests.support.waiting import eventually

START_SECONDS = 60.0
SETTINGS = (
    "service_token", "peer_token_hashes", "tenant_address", "ratelimit_address", "postgres_dsn", "postgres_jobs_dsn", "invoice_grace_hours",
)  # fmt: skip


@asynccontextmanager
async def another_process(mesh: Mesh) -> AsyncIterator[tuple[asyncio.subprocess.Process, grpc.aio.Channel]]:
    """A second replica, in a process of its own, and a channel to it."""
    address = f"{LOOPBACK}:{free_port()}"
    environment = os.environ | {"TENANTRY_LISTEN_ADDRESS": address}
    for name in SETTINGS:
        value = getattr(mesh.settings, name)
        environment[f"TENANTRY_{name.upper()}"] = value.get_secret_value() if hasattr(value, "get_secret_value") else str(value)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.metering", "serve", env=environment, stderr=asyncio.subprocess.DEVNULL
    )
    channel = grpc.aio.insecure_channel(address)
    try:
        async with asyncio.timeout(START_SECONDS):
            await channel.channel_ready()
        yield process, channel
    finally:
        await channel.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_kill_between_a_closing_and_its_invoice_loses_nothing(mesh: Mesh) -> None:
    """What the killed process had closed stays closed; another one writes the invoice that it would have written, and only once."""
    tenant = mesh.new_tenant()
    await subscribe(mesh, tenant, "starter", ended(3).start_time)
    await use_units(mesh, tenant, ended(2).start_time, quantity=25)
    metadata = ((keys.AUTHORIZATION, f"Bearer {OPERATOR}"), (keys.TENANT_ID, str(tenant.id)), (keys.OPERATOR_REASON, "billing"))
    request = pb.CloseInvoiceRequest(period_start=to_timestamp(ended(2).start_time))

    async def is_held_up() -> bool:
        waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'metering.invoices'::regclass AND NOT granted"
        return await mesh.admin.fetchval(waiting) > 0

    async with another_process(mesh) as (process, channel):
        async with mesh.admin.acquire() as holder, holder.transaction():
            await holder.execute("LOCK TABLE metering.invoices IN SHARE ROW EXCLUSIVE MODE")
            asked = InvoiceServiceStub(channel).CloseInvoice(request, metadata=metadata, timeout=60)
            await eventually(is_held_up, within_seconds=30.0)
            process.kill()
            await process.wait()
        asked.cancel()
        assert (await rows_of(mesh, tenant))[2:4] == [1, 0]
        await use_units(mesh, tenant, ended(2).start_time + timedelta(hours=1), quantity=100)
        first = await close(mesh, tenant, ended(2))
        second = await close(mesh, tenant, ended(1))
    assert lines_of(first)[1:] == [("ai_interviews", 0, 20, 0), ("ai_interviews", 1, 5, 10 * USD)]
    assert lines_of(second)[1:] == [("ai_interviews", 1, 100, 200 * USD)]
    assert (await rows_of(mesh, tenant))[2:4] == [2, 2]
    assert await recomputed(mesh, tenant) == []
