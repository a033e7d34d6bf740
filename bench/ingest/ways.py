"""The ways to put events into the ledger's table: through the service in batches or one by one, and past it, by asyncpg alone."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

import asyncpg
import grpc

from bench.ingest.world import CALL_TIMEOUT_SECONDS, PRODUCT, TYPE, Spent, World
from bench.latency import closed_loop
from mesh.metering.v1 import event_service_pb2 as pb
from mesh.metering.v1 import event_service_pb2_grpc
from services.kernel.ids import new_uuid7

RECORD_EVENTS = "/mesh.metering.v1.EventService/RecordEvents"
SOURCE = "/interviews"
RAW_UNNEST = """
INSERT INTO metering.events (tenant_id, event_id, product, source, id, event_type, quantity, occurred_at, record_time, user_name, feature)
SELECT $1, e.event_id, e.product, e.source, e.id, e.event_type, e.quantity, metering.micros(e.occurred_us), clock_timestamp(), e.user_name,
       e.feature
FROM unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::bigint[], $8::bigint[], $9::text[], $10::text[])
     AS e (event_id, product, source, id, event_type, quantity, occurred_us, user_name, feature)
"""
COLUMNS = (
    "tenant_id",
    "event_id",
    "product",
    "source",
    "id",
    "event_type",
    "quantity",
    "occurred_at",
    "record_time",
    "user_name",
    "feature",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one way did: events, the wall seconds until all were answered, and the CPU seconds, here, in the service and in Postgres."""

    events: int
    seconds: float
    own: float
    spent: Spent

    @property
    def per_second(self) -> float:
        """Events a second, by the clock."""
        return self.events / self.seconds

    @property
    def cpu_us(self) -> float:
        """CPU microseconds an event of everything that took part: the client, the service, Postgres."""
        return (self.own + self.spent.metering + self.spent.postgres) / self.events * 1e6

    @property
    def ingest_us(self) -> float:
        """CPU microseconds an event of the service and Postgres."""
        return (self.spent.metering + self.spent.postgres) / self.events * 1e6


async def measured(world: World, events: int, work: Callable[[], Awaitable[None]]) -> Measured:
    """Runs the work that records so many events; the CPU time is with that of folding them into sums."""
    await world.fold()
    cpu, own, began = world.cpu(), time.process_time(), time.monotonic()
    await work()
    seconds, own = time.monotonic() - began, time.process_time() - own
    await world.fold()
    return Measured(events, seconds, own, Spent.since(world, cpu))


def requests(count: int, batch: int) -> list[bytes]:
    """Requests as they lie on the wire, made before the clock starts: a product makes an event where it happens."""
    made = []
    for _ in range(count // batch):
        request = pb.RecordEventsRequest()
        for index in range(batch):
            event = request.events.add(id=str(new_uuid7()), source=SOURCE, product=PRODUCT, type=TYPE, subject=f"user-{index % 100}")
            event.time.GetCurrentTime()
            event.data.quantity = 1
        made.append(request.SerializeToString())
    return made


async def in_batches(world: World, count: int, batch: int, callers: int) -> Measured:
    """Through gRPC, by so many callers at once that wait for a batch each: the service writes some while it reads the next."""
    waiting = requests(count, batch)

    async with grpc.aio.insecure_channel(world.ports.address("metering")) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, pb.RecordEventsResponse] = channel.unary_unary(
            RECORD_EVENTS, response_deserializer=pb.RecordEventsResponse.FromString
        )

        async def send() -> None:
            while waiting:
                response = await call(waiting.pop(), metadata=world.metadata, timeout=CALL_TIMEOUT_SECONDS)
                if any(result.outcome != pb.RECORD_EVENT_OUTCOME_RECORDED for result in response.results):
                    msg = "an event was not recorded: what was measured is something else"
                    raise RuntimeError(msg)

        async def work() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(callers):
                    group.create_task(send())

        return await measured(world, count, work)


async def one_by_one(world: World, seconds: float, concurrency: int) -> tuple[Measured, float, float]:
    """Through gRPC, an event a call; also p50 and p99 in milliseconds."""
    async with grpc.aio.insecure_channel(world.ports.address("metering")) as channel:
        stub = event_service_pb2_grpc.EventServiceStub(channel)

        async def record(_: int) -> None:
            event = pb.Event(id=str(new_uuid7()), source=SOURCE, product=PRODUCT, type=TYPE, data=pb.EventData(quantity=1))
            event.time.GetCurrentTime()
            await stub.RecordEvents(pb.RecordEventsRequest(events=[event]), metadata=world.metadata, timeout=CALL_TIMEOUT_SECONDS)

        cpu, own = world.cpu(), time.process_time()
        loop = await closed_loop(record, concurrency=concurrency, seconds=seconds)
        done = Measured(len(loop.milliseconds), loop.duration_seconds, time.process_time() - own, Spent.since(world, cpu))
    return done, loop.percentile(0.5), loop.percentile(0.99)


async def by_unnest(world: World, count: int, batch: int, callers: int) -> Measured:
    """Asyncpg alone, by so many connections at once: the same columns into the same table, without claims, types, a digest or an answer."""
    waiting = [_columns(batch) for _ in range(count // batch)]

    async def send(connection: asyncpg.Connection) -> None:
        while waiting:
            await connection.execute(RAW_UNNEST, world.tenant_id, *waiting.pop())

    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(world.connection()) for _ in range(callers)]
        # What a connection does once in its life, such as planning, is not of the rate.
        for connection in connections:
            await connection.execute(RAW_UNNEST, world.tenant_id, *_columns(batch))

        async def work() -> None:
            async with asyncio.TaskGroup() as group:
                for connection in connections:
                    group.create_task(send(connection))

        return await measured(world, count, work)


async def by_copy(world: World, count: int, batch: int) -> Measured:
    """COPY alone, of the same rows."""
    rows = [_rows(world, _columns(batch)) for _ in range(count // batch)]

    async def work() -> None:
        for some in rows:
            await world.admin.copy_records_to_table("events", schema_name="metering", columns=COLUMNS, records=some)

    return await measured(world, count, work)


def _columns(batch: int) -> tuple[list[object], ...]:
    now = int(datetime.now(UTC).timestamp() * 1_000_000)
    ids = [new_uuid7() for _ in range(batch)]
    return (
        [asyncpg.pgproto.pgproto.UUID(event_id.bytes) for event_id in ids],
        [PRODUCT] * batch,
        [SOURCE] * batch,
        [str(event_id) for event_id in ids],
        [TYPE] * batch,
        [1] * batch,
        [now] * batch,
        [f"user-{index % 100}" for index in range(batch)],
        [""] * batch,
    )


def _rows(world: World, columns: Sequence[Sequence[object]]) -> list[tuple[object, ...]]:
    now = datetime.now(UTC)
    ids, products, sources, names, types, quantities, _, users, features = columns
    return [
        (world.tenant_id, event_id, product, source, name, kind, quantity, now, now, user, feature)
        for event_id, product, source, name, kind, quantity, user, feature in zip(
            ids, products, sources, names, types, quantities, users, features, strict=True
        )
    ]
