"""The outbox: every end reaches the limits at least once, whoever dies or is away, and leaves the table only when it is done."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import asyncpg
import pytest

from services.kernel.errors import Unavailable
from services.metering.adapters.postgres_jobs import PostgresJobs
from services.metering.outbox import CallEnd, EndKind, OutboxRelay
from tests.metering.mesh import Mesh, Tenant, bill, migrated, not_billed, ref, running_mesh
from tests.metering.peers import DONE, RETRY, Peers
from tests.support.stores import PostgresStore


@pytest.fixture(scope="module")
async def own_dsn(postgres: PostgresStore, peers: Peers) -> str:
    """A database of these tests alone: no other relay takes its rows."""
    dsn = await postgres.fresh_database()
    await migrated(dsn, peers)
    return dsn


@pytest.fixture(scope="module")
async def own_admin(own_dsn: str) -> AsyncIterator[asyncpg.Pool]:
    """An administrator's connections to it."""
    async with asyncpg.create_pool(own_dsn, min_size=1, max_size=2) as pool:
        yield pool


@pytest.fixture
async def lonely(own_dsn: str, own_admin: asyncpg.Pool) -> AsyncIterator[Mesh]:
    """A service with a database and peers of its own, which a test may take away."""
    own = Peers()
    await own.start()
    running = await running_mesh(own_dsn, own, own_admin)
    yield running
    await running.close()
    await own.stop()


async def emptied(mesh: Mesh, tenant: Tenant) -> None:
    """Waits until the tenant's outbox is empty."""
    async with asyncio.timeout(10):
        while await mesh.outbox_kinds(tenant):  # noqa: ASYNC110 - a row's end in another process has no event
            await asyncio.sleep(0.02)


async def test_delivered_ends_leave_the_outbox(mesh: Mesh) -> None:
    """An end the limits took is sent once and its row is gone soon after."""
    tenant = mesh.new_tenant()
    await mesh.settle(bill((await mesh.opened(tenant)).ref))
    await mesh.limits.wait_for(tenant.id, 1)
    await emptied(mesh, tenant)
    assert len(mesh.limits.of(tenant.id)) == 1


async def test_the_limits_know_an_end_when_its_caller_does(mesh: Mesh) -> None:
    """A settlement or a void is answered after the limits took it, so that a caller's next call finds its slot free."""
    tenant = mesh.new_tenant()
    await mesh.settle(bill((await mesh.opened(tenant)).ref))
    assert len(mesh.limits.of(tenant.id)) == 1
    await mesh.void(not_billed((await mesh.opened(tenant)).ref))
    assert len(mesh.limits.of(tenant.id)) == 2


async def test_an_end_tells_how_much_was_output(mesh: Mesh) -> None:
    """A provider's account has limits for input and output by themselves: a settlement tells both, any other end nothing."""
    tenant = mesh.new_tenant()
    await mesh.settle(bill((await mesh.opened(tenant)).ref, input_tokens=70, output_tokens=30, cache_read_tokens=9))
    await mesh.void(not_billed((await mesh.opened(tenant)).ref))
    void, settled = sorted(await mesh.limits.wait_for(tenant.id, 2), key=lambda commit: commit.HasField("output_tokens"))
    assert (settled.actual.tokens, settled.output_tokens) == (109, 30)
    assert not void.HasField("output_tokens")


async def test_ends_survive_absent_limits(lonely: Mesh) -> None:
    """Calls are settled while the limits are away, and told when they are back."""
    tenant = lonely.new_tenant()
    calls = [await lonely.opened(tenant) for _ in range(3)]
    await lonely.peers.stop()
    for call in calls:
        await lonely.settle(bill(call.ref))
    assert await lonely.outbox_kinds(tenant) == [1, 1, 1]
    await lonely.peers.start()
    commits = await lonely.limits.wait_for(tenant.id, 3)
    assert {commit.reservation.reservation_id for commit in commits} == {call.ref.reservation_id for call in calls}
    await emptied(lonely, tenant)


async def test_ends_survive_the_death_of_their_process(own_dsn: str, peers: Peers, own_admin: asyncpg.Pool) -> None:
    """An end that was committed and never sent is sent by whoever polls the table next."""

    class DeafSink:
        def send(self, ends: object) -> None:
            """Dies between commit and send."""

        async def told(self, *, within_seconds: float) -> None:
            """Has nothing to wait for."""

    first = await running_mesh(own_dsn, peers, own_admin, relay_poll_seconds=60.0)
    first.app.ledger._ends = DeafSink()
    tenant = first.new_tenant()
    call = await first.opened(tenant)
    await first.settle(bill(call.ref))
    await first.close()
    assert await first.outbox_kinds(tenant) == [1]
    assert first.limits.of(tenant.id) == []
    second = await running_mesh(own_dsn, peers, own_admin)
    try:
        (commit, *_) = await second.limits.wait_for(tenant.id, 1)
        assert (commit.actual.tokens, commit.output_tokens) == (150, 50)
        await emptied(second, tenant)
    finally:
        await second.close()


async def test_ends_the_limits_cannot_apply_yet_are_sent_again(lonely: Mesh) -> None:
    """RETRY keeps the row, and the others do not wait behind it."""
    patient, quick = lonely.new_tenant(), lonely.new_tenant()
    lonely.limits.answer = lambda commit: RETRY if commit.reservation.tenant_id == patient.id.bytes else DONE
    await lonely.void(not_billed(ref(patient)))
    await lonely.limits.wait_for(patient.id, 2)
    await lonely.settle(bill((await lonely.opened(quick)).ref))
    await emptied(lonely, quick)
    assert await lonely.outbox_kinds(patient) == [2]
    lonely.limits.answer = lambda commit: DONE
    await emptied(lonely, patient)


async def test_ends_that_waited_for_a_rebuild_are_told_soon_after_it(lonely: Mesh) -> None:
    """What was put off for a tenant while the limits had no counters of it is due when an epoch of it begins, and nobody else's is."""
    rebuilt, other = lonely.new_tenant(), lonely.new_tenant()
    lonely.limits.answer = lambda commit: RETRY
    for tenant in (rebuilt, other):
        await lonely.void(not_billed(ref(tenant)))
        await lonely.limits.wait_for(tenant.id, 1)
    # As late as nothing is put off by itself.
    await lonely.admin.execute("UPDATE metering.outbox SET due_time = now() + interval '1 hour'")
    lonely.limits.answer = lambda commit: DONE
    await lonely.begin_epoch(rebuilt)
    await emptied(lonely, rebuilt)
    assert await lonely.outbox_kinds(other) == [2]


async def test_unanswered_end_stays_in_the_table(lonely: Mesh) -> None:
    """A relay that sends and gets no answer deletes nothing and puts nothing off."""
    await lonely.app.background.close()
    tenant = lonely.new_tenant()
    await lonely.void(not_billed(ref(tenant)))
    await lonely.admin.execute("UPDATE metering.outbox SET due_time = '2000-01-01' WHERE tenant_id = $1", tenant.id)
    sent: list[CallEnd] = []

    async def unanswered(ends: Sequence[CallEnd]) -> list[bool]:
        sent.extend(ends)
        raise Unavailable("ratelimit")

    for _ in range(2):
        with pytest.raises(Unavailable):
            await PostgresJobs(lonely.app.jobs).relay_due(1_000, unanswered)
    assert [end.kind for end in sent if end.tenant_id == tenant.id.bytes] == [EndKind.VOID] * 2
    assert await lonely.outbox_kinds(tenant) == [2]


async def test_two_relays_never_send_the_same_row_at_once(lonely: Mesh) -> None:
    """Rows under way in one relay are skipped by another."""
    await lonely.app.background.close()
    tenant = lonely.new_tenant()
    await lonely.void(*[not_billed(ref(tenant)) for _ in range(20)])
    await lonely.admin.execute("UPDATE metering.outbox SET due_time = '2000-01-01' WHERE tenant_id = $1", tenant.id)
    jobs, sent = PostgresJobs(lonely.app.jobs), []
    both_hold = asyncio.Barrier(2)

    async def send(ends: list[CallEnd]) -> list[bool]:
        await both_hold.wait()
        sent.extend(end for end in ends if end.tenant_id == tenant.id.bytes)
        return [True] * len(ends)

    async def relay() -> None:
        await jobs.relay_due(10, send)

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(relay())
        group.create_task(relay())
    assert len(sent) == len(set(sent))


async def test_settlement_beyond_the_limits_contract_does_not_block_the_others(mesh: Mesh) -> None:
    """Usage larger than the limits' contract can say is told at its maximum; the ledger keeps the exact figures."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    await mesh.settle(bill(call.ref, input_tokens=90_000_000))
    (commit,) = await mesh.limits.wait_for(tenant.id, 1)
    assert commit.actual.tokens == 10_000_000
    row = await mesh.row(call.ref)
    assert row is not None
    assert row["input_tokens"] == 90_000_000


async def test_relay_gathers_ends_into_batches() -> None:
    """Ends that come while a batch is under way go together in the next one."""
    sizes: list[int] = []
    go_on = asyncio.Event()
    all_sent = asyncio.Event()

    class Limits:
        async def commit(self, ends: list[CallEnd]) -> list[bool]:
            sizes.append(len(ends))
            if len(sizes) == 2:
                all_sent.set()
            await go_on.wait()
            return [True] * len(ends)

    class Table:
        async def delete(self, ends: list[CallEnd]) -> None:
            """Takes them."""

    relay = OutboxRelay(Table(), Limits())
    sender = asyncio.ensure_future(relay.run_sender())
    ends = [CallEnd(bytes(16), index.to_bytes(16), EndKind.VOID, 0) for index in range(50)]
    relay.send(ends[:1])
    await asyncio.sleep(0)
    for end in ends[1:]:
        relay.send([end])
    go_on.set()
    await all_sent.wait()
    sender.cancel()
    assert sizes == [1, 49]
