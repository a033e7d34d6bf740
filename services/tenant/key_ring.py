"""A tenant's API keys: made, listed, revoked. Refuses a hundred-and-first live key, and any look at another tenant's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import InvalidRequest, LimitExceeded, NotFound, QuotaViolation
from services.kernel.ids import TenantId
from services.kernel.paging import cut_page, decode_page_token, encode_page_token, page_size, position_time
from services.tenant.actor import Actor
from services.tenant.api_key import ApiKeyText, new_api_key
from services.tenant.scopes import grantable
from services.tenant.text import printable

MAX_LIVE_KEYS = 100
_LISTING = "api_keys"


@dataclass(frozen=True, slots=True)
class ApiKeyRecord:
    """A key without its secret."""

    key_id: str
    display_name: str
    scopes: tuple[str, ...]
    create_time: datetime
    expire_time: datetime | None
    revoke_time: datetime | None


@dataclass(frozen=True, slots=True)
class NewKeyTerms:
    """What a new key is called and may do; `expire_time` None: for ever."""

    display_name: str
    scopes: Sequence[str]
    expire_time: datetime | None


class KeyStore(Protocol):
    """Where a tenant's keys are kept. Every method is one transaction of that tenant."""

    async def add_key(self, tenant_id: TenantId, key: ApiKeyText, terms: NewKeyTerms, max_live: int, actor: Actor) -> ApiKeyRecord | None:
        """Stores the key; None when the tenant has `max_live` live keys already."""
        ...

    async def list_keys(self, tenant_id: TenantId, after: tuple[datetime, str] | None, limit: int) -> Sequence[ApiKeyRecord]:
        """Returns keys older than the position, newest first."""
        ...

    async def revoke_key(self, tenant_id: TenantId, key_id: str, actor: Actor) -> ApiKeyRecord | None:
        """Revokes the key unless it is revoked; None when the tenant has no such key."""
        ...


class KeyRing:
    """The keys of whichever tenant a call acts for."""

    def __init__(self, store: KeyStore, *, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._clock = clock

    async def create(
        self, tenant_id: TenantId, tier: str, held: frozenset[str], terms: NewKeyTerms, actor: Actor
    ) -> tuple[ApiKeyRecord, ApiKeyText]:
        """Makes a key with no more rights than `held`. Raises: Forbidden(SCOPE_MISSING), LimitExceeded(PLAN_LIMIT)."""
        granted = NewKeyTerms(printable(terms.display_name, "display_name"), grantable(terms.scopes, held), terms.expire_time)
        if terms.expire_time is not None and terms.expire_time <= self._clock():
            raise InvalidRequest("expire_time", "must be in the future")
        key = new_api_key(tier)
        record = await self._store.add_key(tenant_id, key, granted, MAX_LIVE_KEYS, actor)
        if record is None:
            raise _too_many(tenant_id)
        return record, key

    async def list(self, tenant_id: TenantId, asked_size: int, token: str) -> tuple[Sequence[ApiKeyRecord], str]:
        """Returns a page of keys, newest first, and the token of the next page. Raises: InvalidRequest(page_token)."""
        size = page_size(asked_size)
        found = await self._store.list_keys(tenant_id, _position(token), size + 1)
        return cut_page(found, size, lambda last: encode_page_token(_LISTING, [last.create_time.isoformat(), last.key_id]))

    async def revoke(self, tenant_id: TenantId, key_id: str, actor: Actor) -> ApiKeyRecord:
        """Revokes a key of this tenant; idempotent. Raises: NotFound for an absent key and for another tenant's."""
        record = await self._store.revoke_key(tenant_id, key_id, actor)
        if record is None:
            raise NotFound("api_key")
        return record


def _position(token: str) -> tuple[datetime, str] | None:
    position = decode_page_token(token, _LISTING, 2)
    return None if position is None else (position_time(position[0]), position[1])


def _too_many(tenant_id: TenantId) -> LimitExceeded:
    message = f"the tenant has {MAX_LIVE_KEYS} live keys, the most it may have; revoke one first"
    return LimitExceeded(
        error_reason_pb2.ERROR_REASON_PLAN_LIMIT,
        message,
        None,
        [QuotaViolation(f"tenant:{tenant_id}", message)],
        rule="live_api_keys",
        limit=str(MAX_LIVE_KEYS),
        used=str(MAX_LIVE_KEYS),
        remaining="0",
    )
