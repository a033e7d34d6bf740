"""Turns an outside credential into a tenant context, by asking the tenant service. Trusts an answer for at most one second.

One second, because a revoked key must be dead on every replica within it. While the tenant service is away, the last good answer serves
until its own token ends. Refusals are never remembered.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from mesh.common.v1 import error_reason_pb2
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.errors import MeshError, Unauthenticated
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

CacheKey = tuple[bytes, TenantId | None, str, str, str, str]


class CredentialResolver(Protocol):
    """The one way from a credential to a tenant."""

    async def resolve(self, credential: str, claimed_tenant_id: TenantId | None) -> TenantContext:
        """Returns who the credential proves. Raises: Unauthenticated, Forbidden, or Unavailable when nobody can tell."""
        ...


@dataclass(frozen=True, slots=True)
class _Answer:
    context: TenantContext
    asked_at: float


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
    ) -> None:
        self._channel = channel
        self._stub = stub
        self._verifier = verifier
        self._monotonic = monotonic
        self._clock = clock
        self._cache_size = cache_size
        self._answers: OrderedDict[CacheKey, _Answer] = OrderedDict()
        self._asking: dict[CacheKey, asyncio.Task[TenantContext]] = {}
        self._away_until = 0.0

    async def resolve(self, credential: str, claimed_tenant_id: TenantId | None) -> TenantContext:
        """Returns who the credential proves, from an answer asked for at most 1 s ago or from a new one."""
        if len(credential) > _MAX_CREDENTIAL_LENGTH:
            raise Unauthenticated(error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID, "the credential is not valid; check the key")
        # All that came with it is part of the question: an allow-list may answer differently for another address.
        digest = hashlib.sha256(credential.encode()).digest()
        key = (digest, claimed_tenant_id, current_peer_address(), operator_reason(), tenant_host(), tenant_path())
        answer = self._answers.get(key)
        if answer is not None and self._monotonic() - answer.asked_at < _FRESH_SECONDS and answer.context.expire_time > self._clock():
            return answer.context
        if answer is not None and self._monotonic() < self._away_until and answer.context.expire_time > self._clock():
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

    async def _ask(self, key: CacheKey, credential: str) -> TenantContext:
        from mesh.tenant.v1.authentication_service_pb2 import AuthenticateRequest

        _, claimed, address, reason, host, path = key
        # Stamped before asking: a key revoked while the answer is under way must not gain a second from it.
        asked_at = self._monotonic()
        request = AuthenticateRequest(
            credential=credential,
            claimed_tenant_id=b"" if claimed is None else claimed.bytes,
            operator_reason=reason,
            peer_address=address,
            host=host,
            path=path,
        )
        try:
            response = await self._channel.unary(
                self._stub.Authenticate, request, timeout_seconds=_TIMEOUT_SECONDS, tenant=None, idempotent=True
            )
        except MeshError as error:
            return self._without_answer(key, error)
        context = await self._verifier.verify(response.context_token)
        self._answers[key] = _Answer(context, asked_at)
        self._answers.move_to_end(key)
        while len(self._answers) > self._cache_size:
            self._answers.popitem(last=False)
        return context

    def _without_answer(self, key: CacheKey, error: MeshError) -> TenantContext:
        stale = self._answers.get(key)
        # An issuer's keys that cannot be had are no outage of the tenant service: no other credential may live on by it.
        answered = error.metadata.get("dependency") == "jwks"
        if error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED) and not answered:
            self._away_until = self._monotonic() + _FRESH_SECONDS
            if stale is not None and stale.context.expire_time > self._clock():
                return stale.context
        else:
            # A refusal ends the trust in what was answered before: it must not come back during an outage.
            self._answers.pop(key, None)
        raise error

    def _forget_question(self, key: CacheKey, task: asyncio.Task[TenantContext]) -> None:
        self._asking.pop(key, None)
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


def remote_trust(channel: "MeshChannel") -> tuple[RemoteCredentialResolver, ContextTokenVerifier]:
    """Builds the resolver and the verifier that every service but the tenant service uses, on its channel to the tenant service."""
    from mesh.tenant.v1.authentication_service_pb2_grpc import AuthenticationServiceStub

    stub = AuthenticationServiceStub(channel.channel)
    verifier = ContextTokenVerifier(RemoteContextKeySource(stub, channel=channel))
    return RemoteCredentialResolver(stub, verifier, channel=channel), verifier
