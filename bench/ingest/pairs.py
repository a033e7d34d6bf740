"""Calls opened and settled in batches, as inference's coalescing makes them: the whole way to the ledger, its entries and its outbox."""

import asyncio
import secrets
from datetime import UTC, datetime, timedelta

import grpc

from bench.ingest.ways import Measured, measured
from bench.ingest.world import CALL_TIMEOUT_SECONDS, World
from mesh.metering.v1 import ledger_service_pb2 as pb
from mesh.metering.v1 import ledger_service_pb2_grpc, price_service_pb2, price_service_pb2_grpc
from services.kernel.ids import new_uuid7

BATCH = 256
BATCHES_AT_ONCE = 4


async def opened_and_settled(world: World, count: int) -> Measured:
    """Opens and settles so many calls of one tenant: each batch is opened, then settled, several batches at once."""
    async with grpc.aio.insecure_channel(world.ports.address("metering")) as channel:
        prices = price_service_pb2_grpc.PriceServiceStub(channel)
        book = await prices.GetPriceBook(price_service_pb2.GetPriceBookRequest(), metadata=world.as_inference, timeout=CALL_TIMEOUT_SECONDS)
        batches = [_batch(world, book.version, book.prices[0]) for _ in range(count // BATCH)]
        ledger = ledger_service_pb2_grpc.LedgerServiceStub(channel)

        async def send() -> None:
            while batches:
                opens, settles = batches.pop()
                opened = await ledger.OpenCalls(opens, metadata=world.as_inference, timeout=CALL_TIMEOUT_SECONDS)
                settled = await ledger.SettleCalls(settles, metadata=world.as_inference, timeout=CALL_TIMEOUT_SECONDS)
                _must_be({result.outcome for result in opened.results}, {pb.OPEN_OUTCOME_OPENED})
                _must_be({result.outcome for result in settled.results}, {pb.SETTLE_OUTCOME_SETTLED})

        async def work() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(BATCHES_AT_ONCE):
                    group.create_task(send())

        return await measured(world, len(batches) * BATCH, work)


def _must_be(found: set[int], wanted: set[int]) -> None:
    if found != wanted:
        msg = f"a call was answered {found - wanted}: what was measured is something else"
        raise RuntimeError(msg)


def _batch(world: World, version: str, price: price_service_pb2.ModelPrice) -> tuple[pb.OpenCallsRequest, pb.SettleCallsRequest]:
    opens, settles, now = pb.OpenCallsRequest(), pb.SettleCallsRequest(), datetime.now(UTC)
    for _ in range(BATCH):
        ref = pb.CallRef(tenant_id=world.tenant_id.bytes, reservation_id=new_uuid7().bytes)
        call = opens.calls.add(
            ref=ref,
            context_token=world.context_token,
            call_id=secrets.token_bytes(16),
            attempt=1,
            # Newer than any the tenant may be in: this bench reserves nothing.
            epoch=2**40,
            bound_tokens=2_000,
            bound_nano_usd=5_000_000,
            price_version=version,
            provider=price.provider,
            model=price.model,
            feature="chat",
            user="user-1",
        )
        call.reserve_time.FromDatetime(now)
        call.dispatch_deadline.FromDatetime(now + timedelta(seconds=60))
        settles.calls.add(ref=ref, usage=pb.TokenUsage(input_tokens=100, output_tokens=50), stop_reason="end_turn")
    return opens, settles
