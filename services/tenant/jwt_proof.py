"""What a JWT proves. Refuses every token whose issuer, audience, algorithm, key, signature and times do not all fit one registration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from services.kernel.ids import TenantId
from services.tenant.credential_refusals import expired, invalid
from services.tenant.issuer import Issuer
from services.tenant.json_web_key import Algorithm
from services.tenant.json_web_token import Claims, JsonWebToken
from services.tenant.jwks_cache import JwksCache
from services.tenant.scopes import TENANT_SCOPES
from services.tenant.tenant_record import TenantFacts

MAX_SUBJECT_LENGTH = 200
# Beyond this no calendar holds the moment.
_LAST_SECOND = 253_402_300_799


@dataclass(frozen=True, slots=True)
class KnownIssuer:
    """A registration, and its tenant at this moment."""

    tenant_id: TenantId
    issuer: Issuer
    facts: TenantFacts


@dataclass(frozen=True, slots=True)
class ProvenToken:
    """Who a token speaks for, what it may do, and when that ends."""

    subject: str
    scopes: frozenset[str]
    end_time: datetime


class KnownIssuers(Protocol):
    """Where registrations are found before the tenant is known."""

    async def find_issuer(self, issuer: str, audiences: Sequence[str]) -> KnownIssuer | None:
        """Returns the one registration of the issuer with one of the audiences; None for none or several. One round trip."""
        ...


class JwtProof:
    """Checks tokens against a registration and its keys."""

    def __init__(self, issuers: KnownIssuers, keys: JwksCache, *, clock: Callable[[], datetime]) -> None:
        self._issuers = issuers
        self._keys = keys
        self._clock = clock

    async def find_issuer(self, token: JsonWebToken) -> KnownIssuer:
        """Returns the registration the token appeals to: nothing of the token is proven by it. Raises: Unauthenticated."""
        known = await self._issuers.find_issuer(token.issuer, token.audiences)
        if known is None:
            raise invalid()
        return known

    async def prove(self, token: JsonWebToken, issuer: Issuer) -> ProvenToken:
        """Returns what the token proves. Raises: Unauthenticated, Unavailable("jwks")."""
        await self._refuse_unsigned(token, issuer)
        return read_claims(token, issuer, self._clock())

    async def _refuse_unsigned(self, token: JsonWebToken, issuer: Issuer) -> None:
        terms = issuer.terms
        if token.algorithm not in {algorithm.value for algorithm in terms.algorithms}:
            raise invalid()
        key = await self._keys.find(terms.jwks_uri, token.key_id)
        if key is None or not key.verify(token, Algorithm(token.algorithm)):
            raise invalid()


def read_claims(token: JsonWebToken, issuer: Issuer, now: datetime) -> ProvenToken:
    """Returns what a token with a right signature says at this moment. Raises: Unauthenticated(CREDENTIAL_INVALID | CREDENTIAL_EXPIRED)."""
    terms, claims = issuer.terms, token.claims
    skew = terms.clock_skew
    if token.issuer != terms.issuer or terms.audience not in token.audiences:
        raise invalid()
    end_time = _moment(claims, "exp")
    if end_time is None:
        raise invalid()
    for name in ("nbf", "iat"):
        begin = _moment(claims, name)
        if begin is not None and begin > now + skew:
            raise invalid()
    if end_time + skew <= now:
        raise expired(end_time)
    return ProvenToken(
        subject=f"jwt:{issuer.issuer_id}:{_subject(claims)}",
        scopes=_scopes(claims) & terms.scopes & TENANT_SCOPES,
        # A token inside its skew has ended by this clock, and lives by its issuer's.
        end_time=end_time if end_time > now else end_time + skew,
    )


def _subject(claims: Claims) -> str:
    subject = claims.get("sub")
    if not isinstance(subject, str) or not 1 <= len(subject) <= MAX_SUBJECT_LENGTH or not subject.isprintable():
        raise invalid()
    return subject


def _scopes(claims: Claims) -> frozenset[str]:
    scope = claims.get("scope", "")
    if not isinstance(scope, str):
        raise invalid()
    return frozenset(scope.split(" "))


def _moment(claims: Claims, name: str) -> datetime | None:
    seconds = claims.get(name)
    if seconds is None and name not in claims:
        return None
    # bool is a kind of int.
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= _LAST_SECOND - 3600:
        raise invalid()
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
