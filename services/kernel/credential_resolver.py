"""Turns an outside credential into a tenant context, by asking the tenant service, and remembers the answer as long as it can be trusted.

With a fresh change feed an answer is trusted until a change of its tenant is heard; with a silent one nothing is trusted without asking;
with none at all, for a second. While the tenant service is away, known answers serve for a bounded time. Refusals are never remembered.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from mesh.common.v1 import error_reason_pb2
from services.kernel.change_feed import ChangeFeed, FeedState
from services.kernel.context_token import MAX_LIFETIME, ContextTokenVerifier
from services.kernel.credential_answers import Answer, CacheKey, CredentialAnswers
from services.kernel.errors import MeshError, Unauthenticated, Unavailable
from services.kernel.ids import TenantId
from services.kernel.request_context import current_peer_address, operator_reason, tenant_host, tenant_path
from services.kernel.telemetry.shared_work import context_under, span_parent
from services.kernel.tenant_context import TenantContext

if TYPE_CHECKING:
    from mesh.tenant.v1.authentication_service_pb2_grpc import AuthenticationServiceStub
    from services.kernel.rpc.channel import MeshChannel

_FRESH_SECONDS = 1.0
_CACHE_SIZE = 50_000
_MAX_CREDENTIAL_LENGTH = 4096
_TIMEOUT_SECONDS = 2.0
# Half of a whole token's life: what begins with a remembered token has as long to end.
_RENEW_SECONDS = MAX_LIFETIME.total_seconds() / 2
_OVERTAKEN_TIMES = 3


class CredentialResolver(Protocol):
    """The one way from a credential to a tenant."""

    async def resolve(self, credential: str, claimed_tenant_id: TenantId | None) -> TenantContext:
        """Returns who the credential proves. Raises: Unauthenticated, Forbidden, or Unavailable when nobody can tell."""
        ...


class RemoteCredentialResolver:
    """Asks `AuthenticationService.Authenticate`, one question at a time for each credential."""

    def __init__(
        self,
        stub: "AuthenticationServiceStub",
        verifier: ContextTokenVerifier,
        *,
        channel: "MeshChannel",
        monotonic: Callable[[], float] = time.monotonic,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        cache_size: int = _CACHE_SIZE,
        feed: ChangeFeed | None = None,
        outage_seconds: float = MAX_LIFETIME.total_seconds(),
    ) -> None:
        self._channel = channel
        self._stub = stub
        self._verifier = verifier
        self._monotonic = monotonic
        self._clock = clock
        self._feed = feed
        self._outage_seconds = outage_seconds
        self._answers = CredentialAnswers(cache_size)
        if feed is not None:
            feed.subscribe(self._answers.forget)
        self._asking: dict[CacheKey, asyncio.Task[TenantContext]] = {}
        self._away_until = 0.0

    async def resolve(self, credential: str, claimed_tenant_id: TenantId | None) -> TenantContext:
        """Returns who the credential proves, from an answer that can be trusted now or from a new one."""
        if len(credential) > _MAX_CREDENTIAL_LENGTH:
            raise Unauthenticated(error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID, "the credential is not valid; check the key")
        # All that came with it is part of the question: an allow-list may answer differently for another address.
        digest = hashlib.sha256(credential.encode()).digest()
        key = (digest, claimed_tenant_id, current_peer_address(), operator_reason(), tenant_host(), tenant_path())
        answer = self._answers.get(key)
        if answer is not None and self._is_trusted(answer):
            return answer.context
        if answer is not None and self._monotonic() < self._away_until and self._serves_outage(answer):
            # The tenant service did not answer a moment ago: not every call has to find that out again.
            return answer.context
        task = self._asking.get(key)
        if task is None:
            # In a context of its own: the answer is for all who wait, so one caller's short deadline must not fail it.
            task = asyncio.get_running_loop().create_task(self._ask(key, credential), context=context_under(span_parent()))
            self._asking[key] = task
            task.add_done_callback(lambda done: self._forget_question(key, done))
        # Shielded: one caller giving up must not fail the others who wait for the same answer.
        return await asyncio.shield(task)

    def _is_trusted(self, answer: Answer) -> bool:
        now = self._monotonic()
        if now >= answer.renew_at or answer.context.expire_time <= self._clock():
            return False
        state = FeedState.UNSERVED if self._feed is None else self._feed.state
        if state is FeedState.STALE:
            return False
        # Each second of an operator's access is on record: no feed stands in for that.
        if state is FeedState.UNSERVED or answer.context.operator:
            return now - answer.asked_at < _FRESH_SECONDS
        return True

    def _serves_outage(self, answer: Answer) -> bool:
        if answer.context.operator:
            return self._monotonic() - answer.asked_at < _FRESH_SECONDS
        if answer.context.expire_time <= self._clock():
            return False
        # Known to be good then: answered at that moment, or not contradicted by a feed that had heard everything.
        known_at = answer.asked_at if self._feed is None else max(answer.asked_at, self._feed.read_at)
        away_seconds = self._monotonic() - known_at
        return away_seconds < self._outage_seconds or (self._feed is not None and self._feed.is_fresh)

    async def _ask(self, key: CacheKey, credential: str) -> TenantContext:
        """Asks until the answer was not overtaken by a change: whoever joined after the change must not get the answer from before."""
        for _ in range(_OVERTAKEN_TIMES):
            heard = self._answers.heard
            # Stamped before asking: a key revoked while the answer is under way must not gain a second from it.
            asked_at = self._monotonic()
            try:
                context = await self._authenticated(key, credential)
            except MeshError as error:
                return self._without_answer(key, error)
            life_seconds = (context.expire_time - self._clock()).total_seconds()
            renew_at = asked_at + max(_FRESH_SECONDS, min(_RENEW_SECONDS, life_seconds / 2))
            if self._answers.keep(key, Answer(context, asked_at, renew_at), heard):
                return context
        raise Unavailable("tenant", "the tenant is changing too fast to tell who is calling; try again shortly")

    async def _authenticated(self, key: CacheKey, credential: str) -> TenantContext:
        from mesh.tenant.v1.authentication_service_pb2 import AuthenticateRequest

        _, claimed, address, reason, host, path = key
        request = AuthenticateRequest(
            credential=credential,
            claimed_tenant_id=b"" if claimed is None else claimed.bytes,
            operator_reason=reason,
            peer_address=address,
            host=host,
            path=path,
        )
        response = await self._channel.unary(
            self._stub.Authenticate, request, timeout_seconds=_TIMEOUT_SECONDS, tenant=None, idempotent=True
        )
        return await self._verifier.verify(response.context_token)

    def _without_answer(self, key: CacheKey, error: MeshError) -> TenantContext:
        known = self._answers.get(key)
        # An issuer's keys that cannot be had are no outage of the tenant service: no other credential may live on by it.
        answered = error.metadata.get("dependency") == "jwks"
        if error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED) and not answered:
            self._away_until = self._monotonic() + _FRESH_SECONDS
            if known is not None and self._serves_outage(known):
                return known.context
        else:
            # A refusal ends the trust in what was answered before: it must not come back during an outage.
            self._answers.drop(key)
        raise error

    def _forget_question(self, key: CacheKey, task: asyncio.Task[TenantContext]) -> None:
        self._asking.pop(key, None)
        if not self._asking:
            self._answers.nothing_is_asked()
        if not task.cancelled():
            # Read, so that a question all askers gave up on is not reported as a forgotten exception.
            task.exception()


class RemoteContextKeySource:
    """Fetches the verifying keys from `AuthenticationService.GetContextKeys`."""

    def __init__(self, stub: "AuthenticationServiceStub", *, channel: "MeshChannel") -> None:
        self._channel = channel
        self._stub = stub

    async def fetch_keys(self) -> Mapping[str, Ed25519PublicKey]:
        """Returns every published key by key id."""
        from mesh.tenant.v1.authentication_service_pb2 import GetContextKeysRequest

        response = await self._channel.unary(
            self._stub.GetContextKeys, GetContextKeysRequest(), timeout_seconds=_TIMEOUT_SECONDS, tenant=None, idempotent=True
        )
        return {key.key_id: Ed25519PublicKey.from_public_bytes(key.public_key) for key in response.keys}


def remote_trust(
    channel: "MeshChannel", *, feed: ChangeFeed | None = None, outage_seconds: float = MAX_LIFETIME.total_seconds()
) -> tuple[RemoteCredentialResolver, ContextTokenVerifier]:
    """Builds the resolver and the verifier that every service but the tenant service uses, on its channel to the tenant service."""
    from mesh.tenant.v1.authentication_service_pb2_grpc import AuthenticationServiceStub

    stub = AuthenticationServiceStub(channel.channel)
    verifier = ContextTokenVerifier(RemoteContextKeySource(stub, channel=channel))
    return RemoteCredentialResolver(stub, verifier, channel=channel, feed=feed, outage_seconds=outage_seconds), verifier
