"""A log of events sent again and again, in other orders, with other times, weeks later: what was counted is the same to the last unit."""

import asyncio
import random
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from mesh.metering.v1 import event_service_pb2 as pb
from services.metering.app import build
from tests.metering.events import DUPLICATE, PRODUCT, RECORDED, TIME_IN_FUTURE, event, listed, outcomes, register, reverse, totals
from tests.metering.mesh import Mesh, Tenant, settings_for
from tests.metering.peers import Peers

SEED, EVENTS, REVERSED = 20_261_128, 600, 30
TYPES = ("replay.sum", "replay.count", "replay.max")


def log_of(chance: random.Random) -> list[pb.Event]:
    """Events of three types, four users and two features over sixty days, some of them twice."""
    start = datetime(2026, 5, 1, tzinfo=UTC)
    made = [
        event(
            f"{index}",
            type=chance.choice(TYPES),
            quantity=chance.randint(1, 10**12),
            subject=f"user-{chance.randrange(4)}",
            feature=chance.choice(("", "hiring")),
            time=start + timedelta(seconds=chance.randrange(60 * 86_400)),
            metadata={"n": str(index)} if index % 3 else {},
        )
        for index in range(EVENTS)
    ]
    return made + chance.sample(made, 40)


def moved(log: list[pb.Event], chance: random.Random, by: timedelta) -> list[pb.Event]:
    """The same events with other times: each its own."""
    changed = []
    for item in log:
        other = pb.Event()
        other.CopyFrom(item)
        other.time.FromDatetime(item.time.ToDatetime(UTC) + by + timedelta(microseconds=chance.randrange(10**9)))
        changed.append(other)
    return changed


async def send(mesh: Mesh, tenant: Tenant, log: list[pb.Event], chance: random.Random) -> list[int]:
    """Sends a log in batches of any size at once; what came of each event."""
    answers: list[list[int]] = []

    async def batch(events: list[pb.Event]) -> None:
        answers.append(await outcomes(mesh, tenant, *events))

    async with asyncio.TaskGroup() as group:
        while log:
            size = chance.choice((1, 7, 100, 300))
            batch_of, log = log[:size], log[size:]
            group.create_task(batch(batch_of))
    return [outcome for some in answers for outcome in some]


@pytest.fixture
async def later(ledger_dsn: str, peers: Peers, admin: asyncpg.Pool) -> Mesh:
    """The same ledger behind a service whose clock is forty days ahead."""
    settings = settings_for(ledger_dsn, peers)
    app = await build(settings, clock=lambda: datetime.now(UTC) + timedelta(days=40))
    await app.server.start()
    running = Mesh(app, peers, admin, settings)
    yield running
    await running.close()


async def test_a_replayed_log_counts_once(mesh: Mesh, later: Mesh) -> None:
    """Three replays, shuffled, with every time changed, the last forty days on: rows, totals and first times stay as they were."""
    chance, tenant = random.Random(SEED), mesh.new_tenant()
    for name in TYPES:
        await register(mesh, name)
    log = log_of(chance)
    first = await send(mesh, tenant, chance.sample(log, len(log)), chance)
    assert (first.count(RECORDED), first.count(DUPLICATE)) == (EVENTS, 40)
    undone = chance.sample(log[:EVENTS], REVERSED)
    reversals = await reverse(mesh, tenant, *undone)
    before, rows = await totals(mesh, tenant), await listed(mesh, tenant)
    replays = ((mesh, timedelta(0)), (mesh, timedelta(days=-3)), (later, timedelta(days=40)))
    for replica, by in replays:
        again = await send(replica, tenant, moved(chance.sample(log, len(log)), chance, by), chance)
        assert again == [DUPLICATE] * len(log)
        assert await reverse(replica, tenant, *undone, reason="once more") == reversals
        assert await totals(mesh, tenant) == before
    assert await listed(mesh, tenant) == rows
    kept = {item.event.id: item.event for item in rows if not item.reverses}
    assert kept == {item.id: item for item in log}
    quantities = [item.data.quantity for item in log[:EVENTS]], [item.data.quantity for item in undone]
    assert sum(row[5] for row in before) == sum(quantities[0]) - sum(quantities[1])  # type: ignore[misc] # a row's columns


async def test_the_future_is_judged_by_the_clock_of_the_service(mesh: Mesh, later: Mesh) -> None:
    """What is too early now is taken forty days on; what was refused has left its id free."""
    await register(mesh)
    tenant, ahead = mesh.new_tenant(), event("one", time=datetime.now(UTC) + timedelta(days=40))
    assert await outcomes(mesh, tenant, ahead) == [TIME_IN_FUTURE]
    assert await outcomes(later, tenant, ahead) == [RECORDED]
    assert await totals(mesh, tenant) == [(PRODUCT, "interview.completed", "user-1", "hiring", 1, 1)]
