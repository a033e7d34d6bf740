"""The feed of changes as its subscribers meet it: in order, and fresh only on a word it just got."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import grpc

from mesh.common.v1 import error_reason_pb2
from services.kernel.background import BackgroundTasks
from services.kernel.change_feed import EVERYTHING, ChangeFeed, FeedState
from services.kernel.errors import MeshError, Unavailable
from services.kernel.ids import TenantId, new_uuid7
from tests.kernel.mesh import Authentication, Mesh, running_mesh
from tests.support.waiting import eventually

SECONDS = 20.0
NO_TENANT = TenantId(UUID(int=0))
UNIMPLEMENTED = MeshError(grpc.StatusCode.UNIMPLEMENTED, error_reason_pb2.ERROR_REASON_INTERNAL, "no such method")


class FeedBench:
    """A running feed on a scripted tenant service, with time in the test's hand."""

    def __init__(self, mesh: Mesh, silent_seconds: float) -> None:
        self.mesh = mesh
        self.seconds = 100.0
        self.feed = ChangeFeed(mesh.as_inference, monotonic=lambda: self.seconds, silent_seconds=silent_seconds, unserved_seconds=0.02)
        self.told: list[tuple[TenantId | None, str]] = []
        self.feed.subscribe(lambda tenant_id, kind: self.told.append((tenant_id, kind)))

    @property
    def service(self) -> Authentication:
        return self.mesh.authentication

    async def is_watched(self, times: int = 1) -> None:
        """Waits for so many streams."""

        async def are_there() -> bool:
            return len(self.service.watchers) >= times

        await eventually(are_there, within_seconds=SECONDS)

    async def has_heard(self, change_id: int) -> None:
        """Waits until the feed has come so far."""

        async def is_there() -> bool:
            return self.feed.position == change_id

        await eventually(is_there, within_seconds=SECONDS)

    async def is_in(self, state: FeedState) -> None:
        """Waits for a state."""

        async def is_there() -> bool:
            return self.feed.state is state

        await eventually(is_there, within_seconds=SECONDS)


@asynccontextmanager
async def feed_bench(*, silent_seconds: float = SECONDS, failure: MeshError | None = None) -> AsyncIterator[FeedBench]:
    """A feed that runs until the end of the test."""
    background = BackgroundTasks()
    async with running_mesh() as mesh:
        bench = FeedBench(mesh, silent_seconds)
        bench.service.watch_failure = failure
        background.start("feed", bench.feed.run)
        try:
            yield bench
        finally:
            await background.close()


async def test_a_feed_is_fresh_for_750_ms_after_the_read_it_was_told_of() -> None:
    """Not before a first message, not by the time a message arrived but by the time the table was read, and not a moment longer."""
    async with feed_bench() as b:
        await b.is_watched()
        assert not b.feed.is_fresh
        b.service.tell(7, read_age_seconds=0.5)
        await b.has_heard(7)
        assert b.feed.state is FeedState.FRESH
        b.seconds += 0.25
        assert b.feed.is_fresh
        b.seconds += 0.01
        assert not b.feed.is_fresh
        assert b.feed.state is FeedState.STALE
        assert b.told == []


async def test_a_late_message_takes_no_freshness_away() -> None:
    """What an earlier message vouched for stays true when a later one tells of an earlier read."""
    async with feed_bench() as b:
        await b.is_watched()
        b.service.tell(7)
        await b.has_heard(7)
        b.service.tell(8, read_age_seconds=30.0)
        await b.has_heard(8)
        assert b.feed.is_fresh


async def test_subscribers_hear_each_change_in_order_before_the_feed_vouches_for_it() -> None:
    """A tenant's change names the tenant, everybody's names none, and a gap in what can be told is a change of everything."""
    one, other = TenantId(new_uuid7()), TenantId(new_uuid7())
    async with feed_bench() as b:
        fresh_when_told: list[bool] = []
        b.feed.subscribe(lambda tenant_id, kind: fresh_when_told.append(b.feed.is_fresh))
        await b.is_watched()
        b.service.tell(3, one, other, NO_TENANT)
        await b.has_heard(3)
        assert b.told == [(one, "KEY"), (other, "KEY"), (None, "KEY")]
        assert fresh_when_told == [False] * 3
        b.service.tell(9, forget_everything=True)
        await b.has_heard(9)
        assert b.told[3:] == [(None, EVERYTHING)]


async def test_a_feed_that_was_cut_goes_on_where_it_was() -> None:
    """However the stream ends, the next one begins after the last change that was heard."""
    async with feed_bench() as b:
        await b.is_watched()
        b.service.tell(5)
        await b.has_heard(5)
        b.service.end_watch()
        await b.is_watched(2)
        b.service.tell(6, TenantId(new_uuid7()))
        await b.has_heard(6)
        b.service.watch_failure = Unavailable("postgres")
        b.service.end_watch()

        async def was_refused() -> bool:
            return len(b.service.watched_after) >= 4

        await eventually(was_refused, within_seconds=SECONDS)
        b.service.watch_failure = None
        await b.is_watched(3)
        assert b.service.watched_after[:3] == [0, 5, 6]
        assert set(b.service.watched_after[3:]) == {6}
        assert len(b.told) == 1


async def test_a_stream_that_fell_silent_is_given_up() -> None:
    """A connection that died without a word does not keep the feed from a new one."""
    async with feed_bench(silent_seconds=0.05) as b:
        await b.is_watched(3)

        async def is_told_and_heard() -> bool:
            # Told to a stream that is just being given up, a word is lost.
            b.service.tell(5)
            return b.feed.position == 5 and b.feed.is_fresh

        await eventually(is_told_and_heard, within_seconds=SECONDS)


async def test_a_service_without_a_feed_is_told_from_one_that_is_silent() -> None:
    """An older tenant service leaves the feed UNSERVED; one that begins to serve it is found by itself."""
    async with feed_bench(failure=UNIMPLEMENTED) as b:
        await b.is_in(FeedState.UNSERVED)
        assert not b.feed.is_fresh
        b.service.watch_failure = None
        await b.is_watched()
        b.service.tell(1)
        await b.is_in(FeedState.FRESH)
        b.seconds += 1.0
        assert b.feed.state is FeedState.STALE


async def test_a_refused_feed_is_no_feed() -> None:
    """Any other refusal leaves the feed stale: nothing is trusted on it."""
    refusal = MeshError(grpc.StatusCode.PERMISSION_DENIED, error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED, "not for you")
    async with feed_bench(failure=refusal) as b:

        async def was_refused() -> bool:
            return len(b.service.watched_after) >= 2

        await eventually(was_refused, within_seconds=SECONDS)
        assert b.feed.state is FeedState.STALE
