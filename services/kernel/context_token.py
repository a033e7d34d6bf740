"""Context tokens: `base64url(payload).base64url(signature)`, Ed25519 over the payload bytes. Refuses forged, altered, expired ones.

The payload is a serialised `mesh.common.v1.TenantClaims`; it is never re-serialised before the signature is checked.
"""

import asyncio
import base64
import binascii
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol
from uuid import UUID

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError

from mesh.common.v1 import error_reason_pb2
from mesh.common.v1.tenant_claims_pb2 import TenantClaims
from services.kernel.errors import MeshError, Unauthenticated, Unavailable
from services.kernel.ids import TenantId
from services.kernel.telemetry.shared_work import context_under, span_parent
from services.kernel.tenant_context import TenantContext
from services.kernel.timestamps import from_timestamp

MAX_LIFETIME = timedelta(seconds=300)
_CLOCK_SKEW = timedelta(seconds=5)
_MAX_TOKEN_LENGTH = 8192
_CACHE_SIZE = 10_000
_REFETCH_SECONDS = 1.0
# A key that is published no more is forgotten after the next look, and none is believed that nobody confirmed for so long.
_LOOK_AGAIN_SECONDS = 30.0
_CONFIRMED_SECONDS = MAX_LIFETIME.total_seconds()


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key and the name its public half is published under."""

    key_id: str
    private_key: Ed25519PrivateKey


class ContextKeySource(Protocol):
    """Where the public keys come from."""

    async def fetch_keys(self) -> Mapping[str, Ed25519PublicKey]:
        """Returns every key that may have signed a token still alive, by key id."""
        ...


def mint(claims: TenantClaims, key: SigningKey) -> str:
    """Signs the claims, naming the key in them. Raises: ValueError for a lifetime over 300 s, which no server would accept."""
    issued, expires = _time(claims, "issue_time"), _time(claims, "expire_time")
    if not timedelta(0) < expires - issued <= MAX_LIFETIME:
        msg = "a context token lives more than 0 and at most 300 s"
        raise ValueError(msg)
    signed = TenantClaims()
    signed.CopyFrom(claims)
    signed.key_id = key.key_id
    payload = signed.SerializeToString(deterministic=True)
    return f"{_encode(payload)}.{_encode(key.private_key.sign(payload))}"


class ContextTokenVerifier:
    """Verifies tokens, remembering each verified text until it expires and each key while it is published.

    The keys are looked at again every 30 s, beside the calls; a call waits for that only when the last look is 300 s ago.
    """

    def __init__(
        self,
        keys: ContextKeySource,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
        cache_size: int = _CACHE_SIZE,
    ) -> None:
        self._source = keys
        self._clock = clock
        self._monotonic = monotonic
        self._cache_size = cache_size
        self._keys: Mapping[str, Ed25519PublicKey] = {}
        self._verified: OrderedDict[str, TenantContext] = OrderedDict()
        self._signed: OrderedDict[str, TenantClaims] = OrderedDict()
        self._fetching = asyncio.Lock()
        self._fetched_at: float | None = None
        self._fetch_failure: MeshError | None = None
        self._look_again_at = 0.0
        self._confirmed_at = 0.0
        self._looking: asyncio.Task[None] | None = None

    async def verify(self, token: str) -> TenantContext:
        """Returns what the token proves. Raises: Unauthenticated(CONTEXT_INVALID), without telling which check failed."""
        if self._keys and self._monotonic() >= self._look_again_at:
            await self._look_again()
        context = self._verified.get(token)
        if context is not None:
            if context.expire_time > self._clock():
                return context
            del self._verified[token]
            raise _invalid()
        payload, signature = _split(token)
        claims = _parse(payload)
        key = await self._key(claims.key_id)
        try:
            key.verify(signature, payload)
        except InvalidSignature:
            raise _invalid() from None
        context = self._accept(claims, token, self._clock())
        self._remember(token, context)
        return context

    async def verify_as_of(self, token: str, moment: datetime, *, grace: timedelta = timedelta(0)) -> TenantContext:
        """Returns what the token proved at a moment of its life, or up to `grace` after it: for records of what happened then.

        Never for admitting a call. Raises: Unauthenticated(CONTEXT_INVALID).
        """
        claims = self._signed.get(token)
        if claims is None:
            payload, signature = _split(token)
            claims = _parse(payload)
            key = await self._key(claims.key_id)
            try:
                key.verify(signature, payload)
            except InvalidSignature:
                raise _invalid() from None
            self._signed[token] = claims
            while len(self._signed) > self._cache_size:
                self._signed.popitem(last=False)
        expires = _time(claims, "expire_time")
        if moment > expires + grace:
            raise _invalid()
        # Within the grace the token is judged as of the last moment it was good.
        return self._accept(claims, token, min(moment, expires - timedelta(microseconds=1)))

    def _accept(self, claims: TenantClaims, token: str, now: datetime) -> TenantContext:
        issued, expires = _time(claims, "issue_time"), _time(claims, "expire_time")
        if expires <= now or issued > now + _CLOCK_SKEW or expires - issued > MAX_LIFETIME:
            raise _invalid()
        if len(claims.tenant_id) not in ((0, 16) if claims.operator else (16,)):
            raise _invalid()
        return TenantContext(
            tenant_id=TenantId(UUID(bytes=claims.tenant_id)) if claims.tenant_id else None,
            tier=claims.tier,
            region=claims.region,
            subject=claims.subject,
            scopes=frozenset(claims.scopes),
            config_version=claims.config_version,
            expire_time=expires,
            operator=claims.operator,
            token=token,
            flags=frozenset(claims.flags),
            placement=claims.placement or "pool",
            encrypt_content=claims.encrypt_content,
        )

    def _remember(self, token: str, context: TenantContext) -> None:
        self._verified[token] = context
        # Oldest first is nearest to its end first, since every token lives about as long.
        while len(self._verified) > self._cache_size:
            self._verified.popitem(last=False)

    async def _key(self, key_id: str) -> Ed25519PublicKey:
        known = self._keys.get(key_id)
        if known is not None:
            return known
        async with self._fetching:
            # Forged key ids must not become a flood of fetches: at most one a second, whoever asks.
            now = self._monotonic()
            if key_id not in self._keys and (self._fetched_at is None or now - self._fetched_at >= _REFETCH_SECONDS):
                await self._fetch(now)
        known = self._keys.get(key_id)
        if known is None and self._fetch_failure is not None:
            # Nobody could tell whether the token is forged: the caller should come back, not be turned away.
            raise Unavailable("tenant", "the keys that prove who is calling cannot be had; try again shortly")
        if known is None:
            raise _invalid()
        return known

    async def _fetch(self, now: float) -> None:
        self._fetched_at, self._fetch_failure = now, None
        try:
            published = dict(await self._source.fetch_keys())
        except MeshError as error:
            self._fetch_failure = error
            return
        if not published.keys() >= self._keys.keys():
            # Some of what was verified may be of the key that went; to verify the rest once more is cheap.
            self._verified.clear()
        self._keys = published
        # From before asking: the answer may have been on its way for as long as its timeout.
        self._confirmed_at, self._look_again_at = now, now + _LOOK_AGAIN_SECONDS

    async def _look_again(self) -> None:
        if self._looking is None:
            # In a context of its own: the look is nobody's call.
            self._looking = asyncio.get_running_loop().create_task(self._look(), context=context_under(span_parent()))
        if self._monotonic() - self._confirmed_at >= _CONFIRMED_SECONDS:
            await asyncio.shield(self._looking)

    async def _look(self) -> None:
        try:
            async with self._fetching:
                now = self._monotonic()
                self._look_again_at = now + _REFETCH_SECONDS
                await self._fetch(now)
                # Longer than a token lives, so that an outage ends no token before its time.
                if self._fetch_failure is not None and now - self._confirmed_at >= _CONFIRMED_SECONDS + _LOOK_AGAIN_SECONDS:
                    self._keys = {}
                    self._verified.clear()
        finally:
            self._looking = None


def _invalid() -> MeshError:
    return Unauthenticated(
        error_reason_pb2.ERROR_REASON_CONTEXT_INVALID,
        "the context token is not valid (any more); authenticate again",
    )


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _invalid() from None
    # One token, one spelling: otherwise a caller could fill the cache with variants of one signature.
    if _encode(raw) != text:
        raise _invalid()
    return raw


def _split(token: str) -> tuple[bytes, bytes]:
    payload, dot, signature = token.partition(".")
    if not dot or not payload or len(token) > _MAX_TOKEN_LENGTH:
        raise _invalid()
    return _decode(payload), _decode(signature)


def _parse(payload: bytes) -> TenantClaims:
    try:
        return TenantClaims.FromString(payload)
    except DecodeError:
        raise _invalid() from None


def _time(claims: TenantClaims, field: str) -> datetime:
    try:
        return from_timestamp(getattr(claims, field))
    except ValueError:
        raise _invalid() from None
