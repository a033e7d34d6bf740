"""The feed of changes on a real database: in order, without a gap, and silent as soon as it cannot vouch for itself."""

# grpc is generic in its stubs only.
from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import grpc

from mesh.tenant.v1 import api_key_service_pb2, authentication_service_pb2_grpc
from mesh.tenant.v1.authentication_service_pb2 import Change, WatchChangesRequest, WatchChangesResponse
from services.kernel.errors import MeshError
from services.kernel.ids import NO_TENANT
from services.kernel.rpc.wire_status import decode_rpc_error
from services.kernel.tenant_database import TenantDatabase
from services.tenant.adapters.plan_loader import load_plans, read_plan_file
from services.tenant.adapters.postgres_changes import PostgresChanges
from services.tenant.app import PLAN_FILE, build
from services.tenant.change_hub import ChangeHub, ChangeKind, Notice
from tests.support.steadiness import steadily
from tests.support.stores import PostgresStore
from tests.support.waiting import eventually
from tests.tenant.harness import Harness, as_service, call, running_service, taken_apart, wish, with_key

SECONDS = 20.0
ENTER = "SELECT set_config('app.tenant_id', $1, true)"
ANNOUNCE = "SELECT tenant.announce($1, $2)"
CUT_EVERYBODY = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"

Stream = grpc.aio.UnaryStreamCall


@asynccontextmanager
async def watching(channel: grpc.aio.Channel, after_change_id: int = 0) -> AsyncIterator[Stream]:
    """A stream as another service opens it."""
    stub = authentication_service_pb2_grpc.AuthenticationServiceStub(channel)
    request = WatchChangesRequest(after_change_id=after_change_id)
    stream = stub.WatchChanges(request, metadata=tuple(as_service("retrieval")), timeout=60.0)
    try:
        yield stream
    finally:
        stream.cancel()


async def heard(stream: Stream, count: int, tenant_id: str | None = None) -> list[Change]:
    """Reads until so many changes, of one tenant if it is named, have come."""
    found: list[Change] = []
    async with asyncio.timeout(SECONDS):
        while len(found) < count:
            message = await stream.read()
            assert isinstance(message, WatchChangesResponse), "the stream ended"
            found += [change for change in message.changes if tenant_id is None or change.tenant_id == UUID(tenant_id).bytes]
    return found


async def opened(stream: Stream) -> WatchChangesResponse:
    """Reads the first message."""
    async with asyncio.timeout(SECONDS):
        message = await stream.read()
    assert isinstance(message, WatchChangesResponse)
    return message


async def announced(connection: asyncpg.Connection, *, hold_seconds: float = 0.0) -> int:
    """Announces a change of a new tenant in a transaction that takes its time to commit; returns its id."""
    tenant_id = uuid4()
    async with connection.transaction():
        await connection.execute(ENTER, str(tenant_id))
        await connection.execute(ANNOUNCE, tenant_id, "KEY")
        # The transaction goes on for a while, as a real one may.
        await connection.execute("SELECT pg_sleep($1)", hold_seconds)
        return int(await connection.fetchval("SELECT max(change_id) FROM tenant.changes WHERE tenant_id = $1", tenant_id))


async def test_a_later_change_is_never_seen_before_an_earlier_one(harness: Harness) -> None:
    """While one change is not committed no later one commits: whoever saw a change has seen every earlier one."""
    async with harness.service_role() as first, harness.service_role() as second, watching(harness.channel) as stream:
        await opened(stream)
        transaction = first.transaction()
        await transaction.start()
        earlier, later = uuid4(), uuid4()
        await first.execute(ENTER, str(earlier))
        await first.execute(ANNOUNCE, earlier, "STATE")
        async with asyncio.TaskGroup() as group:

            async def overtake() -> None:
                async with second.transaction():
                    await second.execute(ENTER, str(later))
                    await second.execute(ANNOUNCE, later, "STATE")

            group.create_task(overtake())
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            await eventually(lambda: _is_one(harness, waiting), within_seconds=SECONDS)
            await transaction.commit()
        told = [change for change in await heard(stream, 2) if change.kind == "STATE"]
    assert [UUID(bytes=change.tenant_id) for change in told] == [earlier, later]


async def _is_one(harness: Harness, sql: str) -> bool:
    return bool(await harness.value(sql))


async def test_no_watcher_misses_a_change_that_many_make_at_once(harness: Harness) -> None:
    """Changes announced over many connections at once, each held open for a while, all reach every watcher, in order."""
    made: list[int] = []

    async def announce_some() -> None:
        async with harness.service_role() as connection:
            for _ in range(8):
                made.append(await announced(connection, hold_seconds=random.uniform(0.0, 0.01)))

    async with watching(harness.channel) as one, watching(harness.channel) as other:
        after = (await opened(one)).change_id
        assert (await opened(other)).change_id >= after
        async with asyncio.TaskGroup() as group:
            for _ in range(12):
                group.create_task(announce_some())
        for stream in (one, other):
            told = [change.change_id for change in await _until(stream, max(made))]
            assert told == sorted(set(told))
            assert set(made) <= set(told)


async def _until(stream: Stream, change_id: int) -> Sequence[Change]:
    found: list[Change] = []
    async with asyncio.timeout(SECONDS):
        while not found or found[-1].change_id < change_id:
            found += (await opened(stream)).changes
    return found


async def test_each_change_of_a_tenant_is_told(harness: Harness) -> None:
    """A revoked key, a replaced first key and an erasure each reach a watcher; making a key does not, since nobody remembers it yet."""
    request = wish()
    made = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    tenant_id = made.tenant.tenant_id
    async with watching(harness.channel) as stream:
        await opened(stream)
        again = await call(harness.tenants.CreateTenant, request, harness.as_operator())
        assert [change.kind for change in await heard(stream, 1, tenant_id)] == ["KEY"]
        key = api_key_service_pb2.CreateApiKeyRequest(display_name="ci", scopes=["usage:read"])
        other = await call(harness.keys.CreateApiKey, key, with_key(again.api_key))
        revoke = api_key_service_pb2.RevokeApiKeyRequest(key_id=other.key.key_id)
        await call(harness.keys.RevokeApiKey, revoke, with_key(again.api_key))
        assert [change.kind for change in await heard(stream, 1, tenant_id)] == ["KEY"]
        token = (await harness.authenticate(again.api_key)).context_token
        await call(harness.lifecycle.EraseTenant, _erase(), as_service("tenant", token, tenant_id))
        assert [change.kind for change in await heard(stream, 3, tenant_id)] == ["KEY", "STATE", "DOMAIN"]


def _erase() -> object:
    from mesh.common.v1 import lifecycle_service_pb2

    return lifecycle_service_pb2.EraseTenantRequest()


async def test_new_plans_are_a_change_of_everybody(postgres: PostgresStore) -> None:
    """Loading a catalogue is announced once for all tenants, in the transaction that loads it; loading it again announces nothing."""
    async with running_service(postgres) as harness:
        assert await harness.value("SELECT count(*) FROM tenant.changes") == 1
        await load_plans(harness.admin_dsn, read_plan_file(PLAN_FILE))
        async with watching(harness.channel) as stream:
            message = await opened(stream)
        assert [(change.tenant_id, change.kind) for change in message.changes] == [(NO_TENANT.bytes, ChangeKind.PLANS)]


async def test_a_watcher_that_comes_back_is_told_what_it_missed(harness: Harness) -> None:
    """From its last id a watcher gets each missed change once, from the same process and from one that began after them."""
    async with harness.service_role() as connection:
        known = await announced(connection)
        missed = [await announced(connection) for _ in range(3)]
    async with watching(harness.channel, known) as stream:
        assert [change.change_id for change in await heard(stream, 3)][:3] == missed
    app = await build(harness.settings)
    await app.server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.server.bound_port}") as channel, watching(channel, known) as stream:
            first = await opened(stream)
            assert [change.change_id for change in first.changes][:3] == missed
            assert first.change_id == first.changes[-1].change_id
            assert not first.forget_everything
    finally:
        await app.server.stop()
        await app.close()


async def test_who_missed_what_is_kept_no_more_forgets_everything(postgres: PostgresStore) -> None:
    """An id older than what is kept, and one that this database has not come to, cannot be gone on from."""
    async with running_service(postgres) as harness:
        async with harness.service_role() as connection:
            ids = [await announced(connection) for _ in range(4)]
        await harness.execute("DELETE FROM tenant.changes WHERE change_id <= $1", ids[1])
        app = await build(harness.settings)
        await app.server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{app.server.bound_port}") as channel:
                for after, forgets in ((ids[0], True), (ids[1], False), (ids[3], False), (ids[3] + 1, True)):
                    async with watching(channel, after) as stream:
                        message = await opened(stream)
                    assert (message.forget_everything, message.change_id) == (forgets, ids[3]), after
        finally:
            await app.server.stop()
            await app.close()


@steadily
async def test_a_message_vouches_for_a_read_it_really_made(harness: Harness) -> None:
    """Messages come without any change, each of a read at most 500 ms old; while the table cannot be read none vouches for then."""
    async with harness.superuser() as connection, watching(harness.channel) as stream:
        for _ in range(5):
            assert (await opened(stream)).read_age.ToMicroseconds() <= 500_000
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("LOCK TABLE tenant.changes IN ACCESS EXCLUSIVE MODE")
        locked_at, vouched_at = time.monotonic(), 0.0
        try:
            async with asyncio.timeout(1.5):
                while True:
                    message = await stream.read()
                    vouched_at = time.monotonic() - message.read_age.ToMicroseconds() / 1e6
        except TimeoutError:
            assert vouched_at <= locked_at + 0.05
        finally:
            await transaction.rollback()


async def test_without_postgres_the_stream_ends_and_comes_back_with_it(postgres: PostgresStore) -> None:
    """A watcher is told UNAVAILABLE when the store goes away, and can watch again from where it was when it is back."""
    async with running_service(postgres) as harness, harness.superuser() as connection:
        name = urlsplit(harness.admin_dsn).path.lstrip("/")
        async with watching(harness.channel) as stream:
            known = (await opened(stream)).change_id
            await connection.execute(f'ALTER DATABASE "{name}" CONNECTION LIMIT 0')
            await connection.fetch(CUT_EVERYBODY)
            failure = await _ended(stream)
            assert (failure.code, failure.metadata["dependency"]) == (grpc.StatusCode.UNAVAILABLE, "postgres")
        await connection.execute(f'ALTER DATABASE "{name}" CONNECTION LIMIT -1')
        missed = await announced(connection)

        async def is_told() -> bool:
            try:
                async with watching(harness.channel, known) as stream:
                    return [change.change_id for change in (await opened(stream)).changes] == [missed]
            except grpc.aio.AioRpcError:
                return False

        await eventually(is_told, within_seconds=SECONDS)


async def _ended(stream: Stream) -> MeshError:
    try:
        async with asyncio.timeout(SECONDS):
            while await stream.read() is not grpc.aio.EOF:
                continue
    except grpc.aio.AioRpcError as error:
        return decode_rpc_error(error, "tenant")
    raise AssertionError("the stream ended without a word")


async def test_a_watcher_that_does_not_read_is_cut_and_slows_nobody(harness: Harness) -> None:
    """However slow one reader is, memory stays bounded: its stream ends, and others go on."""
    database = await TenantDatabase.open(harness.settings.postgres_dsn.get_secret_value(), max_size=1)
    hub = ChangeHub(PostgresChanges(database), poll_seconds=0.001)
    try:
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            reading = group.create_task(hub.run())
            async with aclosing(hub.watch(0)) as slow, aclosing(hub.watch(0)) as brisk:
                assert isinstance(await anext(slow), Notice)
                for _ in range(200):
                    await anext(brisk)
                assert await anext(slow, None) is None
                assert isinstance(await anext(brisk), Notice)
            reading.cancel()
    finally:
        await database.close()


async def test_a_service_that_stops_does_not_wait_for_its_watchers(harness: Harness) -> None:
    """Streams without an end of their own are ended, in good order, as soon as the service stops listening."""
    from services.tenant.settings import TenantSettings

    app = await build(TenantSettings(**{**harness.settings.model_dump(), "drain_seconds": 600.0}))
    await app.server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.server.bound_port}") as channel, watching(channel) as stream:
        await opened(stream)
        async with asyncio.timeout(SECONDS):
            await app.server.stop()
            while await stream.read() is not grpc.aio.EOF:
                continue
        assert await stream.code() is grpc.StatusCode.OK
    await app.close()


async def test_a_listener_that_hears_nothing_costs_time_and_no_change(harness: Harness) -> None:
    """With every notification lost, as through a pooler, changes are told all the same: the table is the truth."""
    database = await TenantDatabase.open(harness.settings.postgres_dsn.get_secret_value(), max_size=1)
    hub = ChangeHub(PostgresChanges(database))
    try:
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            reading = group.create_task(hub.run())
            async with aclosing(hub.watch(0)) as notices, harness.service_role() as connection:
                await anext(notices)
                made, told = await announced(connection), 0
                while told < made:
                    told = (await anext(notices)).change_id
                assert told >= made
            reading.cancel()
    finally:
        await database.close()


async def test_a_key_that_is_revoked_twice_is_announced_once(harness: Harness) -> None:
    """Repeating a revocation changes nothing and makes nobody forget anything."""
    made = await harness.create()
    tenant_id, key_id = UUID(made.tenant.tenant_id), taken_apart(made.api_key).key_id
    revoke = api_key_service_pb2.RevokeApiKeyRequest(key_id=key_id)
    metadata = harness.as_operator(made.tenant.tenant_id)
    for _ in range(2):
        await call(harness.keys.RevokeApiKey, revoke, metadata)
    assert await harness.value("SELECT count(*) FROM tenant.changes WHERE tenant_id = $1 AND kind = 'KEY'", tenant_id) == 1


async def test_old_changes_are_removed_and_the_newest_stays(harness: Harness) -> None:
    """What is older than an hour is nobody's any more, except the newest: without it nobody could tell how far the feed has come."""
    database = await TenantDatabase.open(harness.settings.postgres_dsn.get_secret_value(), max_size=1)
    try:
        async with harness.service_role() as connection, harness.superuser() as superuser:
            old = [await announced(connection) for _ in range(2)]
            await superuser.execute("UPDATE tenant.changes SET change_time = now() - interval '2 hours'")
            await PostgresChanges(database).trim()
            left = [row[0] for row in await superuser.fetch("SELECT change_id FROM tenant.changes WHERE change_id = ANY($1)", old)]
            assert left == old[-1:]
    finally:
        await database.close()
