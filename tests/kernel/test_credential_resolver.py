"""A credential's answer is trusted for a second, shared by all who ask at once, and kept only for the tenant service's absence."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest

from mesh.common.v1 import error_reason_pb2
from mesh.tenant.v1 import authentication_service_pb2 as auth_pb
from mesh.tenant.v1 import authentication_service_pb2_grpc as auth_grpc
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.credential_resolver import RemoteContextKeySource, RemoteCredentialResolver, remote_trust
from services.kernel.errors import MeshError, Unauthenticated, Unavailable
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.request_context import Binding, RequestScope, enter_scope
from tests.kernel.mesh import Mesh, running_mesh


class Bench:
    """A resolver on a real tenant service, with time in the test's hand."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.seconds = 0.0
        stub = auth_grpc.AuthenticationServiceStub(mesh.as_inference.channel)
        verifier = ContextTokenVerifier(RemoteContextKeySource(stub, channel=mesh.as_inference), clock=self.now)
        self.resolver = RemoteCredentialResolver(
            stub, verifier, channel=mesh.as_inference, monotonic=lambda: self.seconds, clock=self.now, cache_size=100
        )
        self.start = datetime.now(UTC)

    def now(self) -> datetime:
        return self.start + timedelta(seconds=self.seconds)

    @property
    def asked(self) -> int:
        return len(self.mesh.authentication.requests)


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    """A bench on a server of its own."""
    async with running_mesh() as mesh:
        yield Bench(mesh)


async def unavailable(request: auth_pb.AuthenticateRequest) -> str:
    """An outage."""
    raise Unavailable("postgres")


async def revoked(request: auth_pb.AuthenticateRequest) -> str:
    """A refusal."""
    raise Unauthenticated(error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID, "revoked")


async def test_an_answer_serves_for_one_second_and_no_longer() -> None:
    """A key revoked now is dead on this replica within one second."""
    async with bench() as b:
        first = await b.resolver.resolve("key", None)
        b.seconds = 0.99
        assert await b.resolver.resolve("key", None) == first
        assert b.asked == 1
        b.mesh.authentication.answer = revoked
        b.seconds = 1.0
        with pytest.raises(MeshError) as refused:
            await b.resolver.resolve("key", None)
        assert refused.value.reason_name == "CREDENTIAL_INVALID"


async def test_a_refusal_is_never_remembered() -> None:
    """A credential that becomes valid works at once."""
    async with bench() as b:
        valid, b.mesh.authentication.answer = b.mesh.authentication.answer, revoked
        with pytest.raises(MeshError):
            await b.resolver.resolve("key", None)
        b.mesh.authentication.answer = valid
        await b.resolver.resolve("key", None)


async def test_the_last_good_answer_serves_an_outage_until_its_token_ends() -> None:
    """Known credentials work while the tenant service is away; new ones get UNAVAILABLE."""
    async with bench() as b:
        first = await b.resolver.resolve("key", None)
        b.mesh.authentication.answer = unavailable
        b.seconds = 150.0
        assert await b.resolver.resolve("key", None) == first
        with pytest.raises(MeshError) as unknown:
            await b.resolver.resolve("another", None)
        assert unknown.value.code.name == "UNAVAILABLE"
        b.seconds = 201.0
        with pytest.raises(MeshError) as ended:
            await b.resolver.resolve("key", None)
        assert ended.value.code.name == "UNAVAILABLE"


async def test_a_revoked_key_does_not_come_back_in_an_outage() -> None:
    """A refusal removes the answer that an outage would have brought back."""
    async with bench() as b:
        await b.resolver.resolve("key", None)
        b.mesh.authentication.answer = revoked
        b.seconds = 2.0
        with pytest.raises(MeshError):
            await b.resolver.resolve("key", None)
        b.mesh.authentication.answer = unavailable
        b.seconds = 3.0
        with pytest.raises(MeshError) as refused:
            await b.resolver.resolve("key", None)
        assert refused.value.code.name == "UNAVAILABLE"


async def test_many_askers_make_one_question_and_one_giving_up_harms_nobody() -> None:
    """Concurrent calls with one credential share one Authenticate, which outlives the asker that began it."""
    async with bench() as b:
        asked, go = asyncio.Event(), asyncio.Event()
        usual = b.mesh.authentication.answer

        async def slow(request: auth_pb.AuthenticateRequest) -> str:
            asked.set()
            await go.wait()
            return await usual(request)

        b.mesh.authentication.answer = slow
        async with asyncio.TaskGroup() as group:
            first = group.create_task(b.resolver.resolve("key", None))
            await asked.wait()
            others = [group.create_task(b.resolver.resolve("key", None)) for _ in range(20)]
            await asyncio.sleep(0)
            first.cancel()
            go.set()
        assert first.cancelled()
        assert len({other.result() for other in others}) == 1
        assert b.asked == 1


async def test_each_claimed_tenant_is_its_own_question() -> None:
    """An answer for one claimed tenant is not given for another."""
    async with bench() as b:
        claimed = TenantId(new_uuid7())
        await b.resolver.resolve("key", None)
        await b.resolver.resolve("key", claimed)
        assert [request.claimed_tenant_id for request in b.mesh.authentication.requests] == [b"", claimed.bytes]


async def test_each_named_host_and_path_is_its_own_question() -> None:
    """An answer for one host is not given for another; of a path only what can name a tenant counts."""
    async with bench() as b:
        for host, path in (("", ""), ("a.example", ""), ("a.example", "/t/a/1"), ("a.example", "/t/a/2?x"), ("a.example", "/t/b")):
            named = {name: value for name, value in (("x-tenant-host", host), ("x-tenant-path", path)) if value}
            with Binding(enter_scope(RequestScope(metadata=named))):
                await b.resolver.resolve("key", None)
        asked = [(request.host, request.path) for request in b.mesh.authentication.requests]
        assert asked == [("", ""), ("a.example", ""), ("a.example", "/t/a"), ("a.example", "/t/b")]


async def test_each_address_and_reason_is_its_own_question() -> None:
    """An answer for one address is not given for another, which may be outside of a key's networks, nor for another operator's reason."""
    async with bench() as b:
        for address, reason in (("", ""), ("192.0.2.7", ""), ("192.0.2.8", ""), ("192.0.2.8", "ticket 1"), ("192.0.2.8", "ticket 2")):
            made = {"x-operator-reason": reason} if reason else {}
            with Binding(enter_scope(RequestScope(metadata=made, peer_address=address))):
                await b.resolver.resolve("key", None)
        asked = [(request.peer_address, request.operator_reason) for request in b.mesh.authentication.requests]
        assert asked == [("", ""), ("192.0.2.7", ""), ("192.0.2.8", ""), ("192.0.2.8", "ticket 1"), ("192.0.2.8", "ticket 2")]


async def test_an_issuer_without_keys_is_no_outage_of_the_tenant_service() -> None:
    """A token nobody can check is refused as it is told, its last good answer ends, and no other credential lives on by it."""

    async def no_keys(request: auth_pb.AuthenticateRequest) -> str:
        if request.credential == "token":
            raise Unavailable("jwks")
        return await revoked(request)

    async with bench() as b:
        await b.resolver.resolve("token", None)
        await b.resolver.resolve("key", None)
        b.seconds += 1.1
        b.mesh.authentication.answer = no_keys
        with pytest.raises(MeshError, match="jwks"):
            await b.resolver.resolve("token", None)
        with pytest.raises(MeshError, match="CREDENTIAL_INVALID"):
            await b.resolver.resolve("key", None)


async def test_the_memory_of_answers_is_bounded() -> None:
    """Old answers give way to new ones, and an overlong credential is not even asked about."""
    async with bench() as b:
        for number in range(105):
            await b.resolver.resolve(f"key-{number}", None)
        assert len(b.resolver._answers) == 100
        with pytest.raises(Unauthenticated):
            await b.resolver.resolve("x" * 5000, None)
        assert b.asked == 105


async def test_trust_of_a_service_is_built_on_one_channel() -> None:
    """The resolver and verifier of a service work on its channel to the tenant service alone."""
    async with running_mesh() as mesh:
        resolver, verifier = remote_trust(mesh.as_inference)
        context = await resolver.resolve("key", None)
        assert await verifier.verify(context.token) == context
