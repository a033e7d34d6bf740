"""Credentials beside a feed of changes: trusted while it speaks, forgotten when it says so, asked about when it is silent."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest

from mesh.common.v1 import error_reason_pb2
from mesh.tenant.v1 import authentication_service_pb2 as auth_pb
from mesh.tenant.v1 import authentication_service_pb2_grpc as auth_grpc
from services.kernel.background import BackgroundTasks
from services.kernel.change_feed import FeedState
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.credential_resolver import RemoteContextKeySource, RemoteCredentialResolver
from services.kernel.errors import MeshError, Unauthenticated, Unavailable
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.request_context import Binding, RequestScope, enter_scope
from tests.kernel.mesh import Mesh, running_mesh
from tests.kernel.test_change_feed import NO_TENANT, UNIMPLEMENTED, FeedBench

SECONDS = 20.0


class Bench(FeedBench):
    """A resolver beside a feed; the credential `a` is of tenant a, `op` an operator's, everything else of tenant b."""

    def __init__(self, mesh: Mesh, outage_seconds: float) -> None:
        super().__init__(mesh, SECONDS)
        self.start = datetime.now(UTC)
        self.begun = self.seconds
        stub = auth_grpc.AuthenticationServiceStub(mesh.as_inference.channel)
        verifier = ContextTokenVerifier(
            RemoteContextKeySource(stub, channel=mesh.as_inference), clock=self.now, monotonic=lambda: self.seconds
        )
        self.resolver = RemoteCredentialResolver(
            stub,
            verifier,
            channel=mesh.as_inference,
            monotonic=lambda: self.seconds,
            clock=self.now,
            cache_size=3,
            feed=self.feed,
            outage_seconds=outage_seconds,
        )
        self.a, self.b = TenantId(new_uuid7()), TenantId(new_uuid7())
        self.lifetime = 300.0
        mesh.authentication.answer = self.valid
        self._told_up_to = 0

    def now(self) -> datetime:
        return self.start + timedelta(seconds=self.seconds - self.begun)

    @property
    def asked(self) -> int:
        return len(self.service.requests)

    async def valid(self, request: auth_pb.AuthenticateRequest) -> str:
        if request.credential == "op":
            return self.service.keys.token(self.a, now=self.now(), lifetime=self.lifetime, operator=True)
        tenant = self.a if request.credential == "a" else self.b
        return self.service.keys.token(tenant, now=self.now(), lifetime=self.lifetime)

    async def hear(self, *changed: TenantId, kind: str = "KEY") -> None:
        """Lets the feed hear a message and waits until it has."""
        self._told_up_to += 1
        self.service.tell(self._told_up_to, *changed, kind=kind)
        await self.has_heard(self._told_up_to)
        assert self.feed.is_fresh

    async def refusal(self, credential: str) -> str:
        with pytest.raises(MeshError) as refused:
            await self.resolver.resolve(credential, None)
        return refused.value.reason_name


@asynccontextmanager
async def bench(*, outage_seconds: float = 300.0, failure: MeshError | None = None) -> AsyncIterator[Bench]:
    """A bench whose feed has been heard once, unless it is refused."""
    background = BackgroundTasks()
    async with running_mesh() as mesh:
        made = Bench(mesh, outage_seconds)
        made.service.watch_failure = failure
        background.start("feed", made.feed.run)
        try:
            if failure is None:
                await made.is_watched()
                await made.hear()
            yield made
        finally:
            await background.close()


async def unavailable(request: auth_pb.AuthenticateRequest) -> str:
    """An outage."""
    raise Unavailable("tenant")


async def revoked(request: auth_pb.AuthenticateRequest) -> str:
    """A refusal."""
    raise Unauthenticated(error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID, "revoked")


async def test_a_fresh_feed_stands_in_for_asking() -> None:
    """While the feed is fresh an answer serves without a question for half of its token's life; then a new token is got."""
    async with bench() as b:
        first = await b.resolver.resolve("a", None)
        b.seconds += 149.9
        await b.hear()
        assert await b.resolver.resolve("a", None) == first
        assert b.asked == 1
        b.seconds += 0.2
        await b.hear()
        renewed = await b.resolver.resolve("a", None)
        assert b.asked == 2
        assert renewed.expire_time > first.expire_time


async def test_a_token_that_ends_soon_is_not_asked_for_again_and_again() -> None:
    """A key in its last seconds is asked about once a second at most, and not trusted past its end."""
    async with bench() as b:
        b.lifetime = 1.5
        await b.resolver.resolve("a", None)
        b.seconds += 0.7
        await b.hear()
        await b.resolver.resolve("a", None)
        assert b.asked == 1
        b.service.answer = revoked
        b.seconds += 0.8
        await b.hear()
        assert await b.refusal("a") == "CREDENTIAL_INVALID"


async def test_a_change_ends_the_trust_in_its_tenant_alone() -> None:
    """What was known of the changed tenant is asked for again, of others it is not; a change of everybody ends all trust."""
    async with bench() as b:
        await b.resolver.resolve("a", None)
        await b.resolver.resolve("b", None)
        await b.hear(b.a)
        await b.resolver.resolve("b", None)
        assert b.asked == 2
        b.service.answer = revoked
        assert await b.refusal("a") == "CREDENTIAL_INVALID"
        assert await b.resolver.resolve("b", None)
        await b.hear(NO_TENANT)
        assert await b.refusal("b") == "CREDENTIAL_INVALID"


async def test_an_answer_that_a_change_overtook_is_not_believed() -> None:
    """Asked before a change was heard and arriving after it, an answer is asked for again: for its asker and for all who joined it."""
    async with bench() as b:
        asked, go = asyncio.Event(), asyncio.Event()

        async def slow(request: auth_pb.AuthenticateRequest) -> str:
            token = await b.valid(request)
            b.service.answer = revoked
            asked.set()
            await go.wait()
            return token

        b.service.answer = slow
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            first = group.create_task(b.refusal("a"))
            await asked.wait()
            await b.hear(b.a)
            joined = group.create_task(b.refusal("a"))
            await asyncio.sleep(0)
            go.set()
        assert (first.result(), joined.result()) == ("CREDENTIAL_INVALID", "CREDENTIAL_INVALID")
        assert b.asked == 2
        assert await b.refusal("a") == "CREDENTIAL_INVALID"


async def test_an_answer_is_kept_through_a_change_of_another_tenant() -> None:
    """A change of somebody else, heard while a question is under way, costs no second question."""
    async with bench() as b:
        asked, go = asyncio.Event(), asyncio.Event()

        async def slow(request: auth_pb.AuthenticateRequest) -> str:
            asked.set()
            await go.wait()
            return await b.valid(request)

        b.service.answer = slow
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            first = group.create_task(b.resolver.resolve("a", None))
            await asked.wait()
            await b.hear(b.b)
            go.set()
        assert await b.resolver.resolve("a", None) == first.result()
        assert b.asked == 1


async def test_a_domain_given_to_another_tenant_ends_the_trust_in_who_came_by_a_host() -> None:
    """A host that was nobody's may be another tenant's now: whoever came by one is asked about again, and nobody who named none."""
    async with bench() as b:
        by_host = {"x-tenant-host": "help.b.example"}
        with Binding(enter_scope(RequestScope(metadata=by_host))):
            await b.resolver.resolve("a", None)
        await b.resolver.resolve("a", None)
        await b.hear(b.b)
        assert b.asked == 2
        await b.hear(b.b, kind="DOMAIN")
        await b.resolver.resolve("a", None)
        assert b.asked == 2
        b.service.answer = revoked
        with Binding(enter_scope(RequestScope(metadata=by_host))):
            assert await b.refusal("a") == "CREDENTIAL_INVALID"


async def test_an_answer_by_a_host_that_another_tenants_domain_overtook_is_not_believed() -> None:
    """Asked before the domain was another's and arriving after it, an answer for a host is asked for again."""
    async with bench() as b:

        async def overtaken(request: auth_pb.AuthenticateRequest) -> str:
            token = await b.valid(request)
            b.service.answer = revoked
            await b.hear(b.b, kind="DOMAIN")
            return token

        b.service.answer = overtaken
        with Binding(enter_scope(RequestScope(metadata={"x-tenant-host": "help.b.example"}))):
            assert await b.refusal("a") == "CREDENTIAL_INVALID"
        assert b.asked == 2


async def test_an_unending_stream_of_changes_is_no_endless_question() -> None:
    """A tenant that changes during each question gets UNAVAILABLE, not an old answer and not silence."""
    async with bench() as b:

        async def overtaken(request: auth_pb.AuthenticateRequest) -> str:
            token = await b.valid(request)
            await b.hear(b.a)
            return token

        b.service.answer = overtaken
        assert await b.refusal("a") == "DEPENDENCY_UNAVAILABLE"
        assert b.asked == 3
        assert len(b.resolver._answers) == 0


async def test_a_silent_feed_ends_all_trust_without_asking() -> None:
    """750 ms after the feed's last word each call asks, callers at once share one question, and a revoked key is refused."""
    async with bench() as b:
        await b.resolver.resolve("a", None)
        b.seconds += 0.76
        assert b.feed.state is FeedState.STALE
        await b.resolver.resolve("a", None)
        await b.resolver.resolve("a", None)
        assert b.asked == 3
        async with asyncio.TaskGroup() as group:
            for _ in range(10):
                group.create_task(b.resolver.resolve("a", None))
        assert b.asked == 4
        b.service.answer = revoked
        assert await b.refusal("a") == "CREDENTIAL_INVALID"


async def test_a_service_without_a_feed_is_asked_once_a_second() -> None:
    """Beside an older tenant service an answer serves for one second, as if there were no feed."""
    async with bench(failure=UNIMPLEMENTED) as b:
        await b.is_in(FeedState.UNSERVED)
        await b.resolver.resolve("a", None)
        b.seconds += 0.99
        await b.resolver.resolve("a", None)
        assert b.asked == 1
        b.seconds += 0.02
        await b.resolver.resolve("a", None)
        assert b.asked == 2


async def test_an_operators_answer_is_never_older_than_a_second() -> None:
    """Each second of an operator's access is asked for and so audited, feed or not, and none of it is from before an outage."""
    async with bench() as b:
        await b.resolver.resolve("op", None)
        b.seconds += 0.5
        await b.hear()
        await b.resolver.resolve("op", None)
        assert b.asked == 1
        b.seconds += 0.5
        await b.hear()
        await b.resolver.resolve("op", None)
        assert b.asked == 2
        b.service.answer = unavailable
        b.seconds += 1.0
        assert await b.refusal("op") == "DEPENDENCY_UNAVAILABLE"


async def test_an_outage_is_bridged_for_as_long_as_the_setting_says() -> None:
    """Counted from the feed's last word, known credentials work for the set time after the tenant service fell silent, and no longer."""
    async with bench(outage_seconds=10.0) as b:
        first = await b.resolver.resolve("a", None)
        b.seconds += 100.0
        await b.hear()
        b.service.answer = unavailable
        b.seconds += 9.9
        assert await b.resolver.resolve("a", None) == first
        b.seconds += 0.2
        assert await b.refusal("a") == "DEPENDENCY_UNAVAILABLE"
        assert await b.refusal("unknown") == "DEPENDENCY_UNAVAILABLE"


async def test_an_operator_may_prefer_refusal_to_an_outage() -> None:
    """Set to nought, nothing is trusted past the feed's word: a known key is refused as soon as nobody can vouch for it."""
    async with bench(outage_seconds=0.0) as b:
        await b.resolver.resolve("a", None)
        b.service.answer = unavailable
        b.seconds += 0.7
        assert await b.resolver.resolve("a", None)
        b.seconds += 0.1
        assert await b.refusal("a") == "DEPENDENCY_UNAVAILABLE"


async def test_what_a_change_ended_does_not_come_back_in_an_outage() -> None:
    """A key whose tenant changed before the tenant service went away is refused: nobody can tell what the change was."""
    async with bench() as b:
        await b.resolver.resolve("a", None)
        await b.hear(b.a)
        b.service.answer = unavailable
        assert await b.refusal("a") == "DEPENDENCY_UNAVAILABLE"


async def test_forgetting_goes_on_working_when_memory_is_full() -> None:
    """Answers that gave way to newer ones leave nothing behind, and the newer ones are still forgotten by tenant."""
    async with bench() as b:
        for number in range(10):
            await b.resolver.resolve(f"b{number}", None)
        await b.resolver.resolve("a", None)
        assert len(b.resolver._answers) == 3
        await b.hear(b.b)
        assert len(b.resolver._answers) == 1
        await b.hear(b.a)
        assert b.resolver._answers._keys_of == {}
