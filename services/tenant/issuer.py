"""Issuers of JWTs, each registered for one tenant.

Refuses one whose keys cannot be had at the time, a second registration of a name, and scopes from who does not hold them.
"""

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol
from urllib.parse import urlsplit
from uuid import UUID

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import AlreadyExists, Forbidden, InvalidRequest, NotFound, Unavailable
from services.kernel.ids import TenantId
from services.tenant.actor import Actor
from services.tenant.full import too_many
from services.tenant.json_web_key import Algorithm, JwksMalformed, read_jwks
from services.tenant.jwks_cache import JwksDown, JwksPrivate, JwksSource
from services.tenant.scopes import ISSUER_SCOPES, TENANT_SCOPES, grantable
from services.tenant.text import printable

MAX_ISSUERS = 20


@dataclass(frozen=True, slots=True)
class IssuerTerms:
    """What an issuer is called, where its keys are, and what its tokens may be granted."""

    issuer: str
    audience: str
    jwks_uri: str
    algorithms: tuple[Algorithm, ...]
    scopes: frozenset[str]
    clock_skew: timedelta


@dataclass(frozen=True, slots=True)
class Issuer:
    """A registered issuer."""

    issuer_id: UUID
    terms: IssuerTerms
    create_time: datetime


class IssuerTaken(Exception):
    """Issuer and audience are registered."""


# Given the scopes an issuer has, those it shall have. Pure; called while nobody else can change them. Raises what must not be.
DecideScopes = Callable[[frozenset[str]], frozenset[str]]


class IssuerStore(Protocol):
    """Where issuers are kept. Every method is one transaction of that tenant."""

    async def add_issuer(self, tenant_id: TenantId, terms: IssuerTerms, max_issuers: int, actor: Actor) -> Issuer | None:
        """Keeps the issuer; None at `max_issuers`. Raises: IssuerTaken."""
        ...

    async def list_issuers(self, tenant_id: TenantId) -> Sequence[Issuer]:
        """Returns the tenant's issuers, oldest first."""
        ...

    async def change_scopes(self, tenant_id: TenantId, issuer_id: UUID, decide: DecideScopes, actor: Actor) -> Issuer | None:
        """Keeps the scopes that are decided, and returns the issuer with them; None when the tenant does not have it."""
        ...

    async def remove_issuer(self, tenant_id: TenantId, issuer_id: UUID, actor: Actor) -> bool:
        """Removes the issuer; False when the tenant does not have it."""
        ...


class IssuerRegistry:
    """The issuers of whichever tenant a call acts for."""

    def __init__(self, store: IssuerStore, source: JwksSource) -> None:
        self._store = store
        self._source = source

    async def add(self, tenant_id: TenantId, terms: IssuerTerms, actor: Actor) -> Issuer:
        """Registers the issuer once its keys were seen.

        Raises: InvalidRequest, Forbidden(SCOPE_MISSING), AlreadyExists, LimitExceeded(PLAN_LIMIT), Unavailable("jwks"); nothing is
        written then.
        """
        _refuse_unfit(terms)
        await self._refuse_without_keys(terms)
        try:
            issuer = await self._store.add_issuer(tenant_id, terms, MAX_ISSUERS, actor)
        except IssuerTaken:
            raise AlreadyExists("issuer", "issuer", "this issuer is registered with this audience; remove it there first") from None
        if issuer is None:
            raise too_many(tenant_id, "issuers", "issuers", MAX_ISSUERS)
        return issuer

    async def list(self, tenant_id: TenantId) -> Sequence[Issuer]:
        """Returns the tenant's issuers."""
        return await self._store.list_issuers(tenant_id)

    async def set_scopes(self, tenant_id: TenantId, held: frozenset[str], issuer_id: UUID, scopes: frozenset[str], actor: Actor) -> Issuer:
        """Replaces what the issuer's tokens may be granted; what is added must be `held`. Raises: NotFound, Forbidden(SCOPE_MISSING)."""

        def decide(before: frozenset[str]) -> frozenset[str]:
            grantable(scopes - before, held)
            return scopes

        issuer = await self._store.change_scopes(tenant_id, issuer_id, decide, actor)
        if issuer is None:
            raise NotFound("issuer")
        return issuer

    async def remove(self, tenant_id: TenantId, issuer_id: UUID, actor: Actor) -> None:
        """Removes the issuer. Raises: NotFound, also for another tenant's."""
        if not await self._store.remove_issuer(tenant_id, issuer_id, actor):
            raise NotFound("issuer")

    async def _refuse_without_keys(self, terms: IssuerTerms) -> None:
        try:
            keys = read_jwks(await self._source.fetch(terms.jwks_uri))
        except JwksDown:
            raise Unavailable("jwks", "the JWKS does not answer; nothing was registered") from None
        except JwksPrivate:
            raise InvalidRequest(
                "jwks_uri", "must lead to a public address; this one is of a private network, a link or a loopback"
            ) from None
        except JwksMalformed:
            raise InvalidRequest("jwks_uri", "must answer a JSON Web Key Set of at most 64 KB, without a redirect") from None
        if not any(algorithm in key.by_algorithm for key in keys.values() for algorithm in terms.algorithms):
            raise InvalidRequest("jwks_uri", "must have a key with a kid that fits one of the algorithms")


def _refuse_unfit(terms: IssuerTerms) -> None:
    printable(terms.issuer, "issuer")
    printable(terms.audience, "audience")
    for scope in sorted(terms.scopes):
        if scope not in TENANT_SCOPES:
            raise InvalidRequest("scopes", f"{scope} is no scope of a tenant's; leave it out")
        if scope not in ISSUER_SCOPES:
            raise Forbidden(
                error_reason_pb2.ERROR_REASON_SCOPE_MISSING,
                f"an operator does not hold {scope} and cannot hand it out; add the issuer without it, "
                "then grant it by SetIssuerScopes with the tenant's own key",
                scope=scope,
            )
    _refuse_address(terms.jwks_uri)


def _refuse_address(uri: str) -> None:
    field = "jwks_uri"
    if not uri.isascii() or not uri.isprintable() or " " in uri or "\\" in uri:
        raise InvalidRequest(field, "must be an address in printable ASCII")
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise InvalidRequest(field, "must be an address such as https://login.example/keys") from None
    if parts.username is not None or parts.password is not None or "#" in uri or not host:
        raise InvalidRequest(field, "must name a host, and neither a user nor a fragment")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(host)):
        raise InvalidRequest(field, "must be https; http is taken on loopback alone")


def _is_loopback(host: str) -> bool:
    # A literal: what a name leads to is somebody else's to change.
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
