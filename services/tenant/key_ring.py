"""A tenant's API keys: made, listed, changed, rotated, revoked. Refuses a hundred-and-first live key, and any look at another tenant's."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Protocol, assert_never
from uuid import UUID

from services.kernel.errors import ContentConflict, InvalidRequest, MeshError, NotFound, WrongState
from services.kernel.ids import TenantId
from services.kernel.paging import cut_page, decode_page_token, encode_page_token, page_size, position_time
from services.tenant.actor import Actor
from services.tenant.api_key import ApiKeyText, new_api_key
from services.tenant.api_key_record import ApiKeyRecord
from services.tenant.cidr import read_cidrs
from services.tenant.full import too_many
from services.tenant.key_change import KeyChange, changed_key
from services.tenant.scopes import grantable
from services.tenant.text import printable

MAX_LIVE_KEYS = 100
DEFAULT_OVERLAP_SECONDS = 86_400
_LISTING = "api_keys"


@dataclass(frozen=True, slots=True)
class NewKeyTerms:
    """What a new key is called and may do; `expire_time` None: for ever; no networks: from anywhere."""

    display_name: str
    scopes: Sequence[str]
    expire_time: datetime | None
    allowed_cidrs: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class RotationWish:
    """Which key to replace, and how long it goes on beside its successor."""

    key_id: str
    overlap: timedelta
    request_id: UUID

    def digest(self) -> bytes:
        """Returns the SHA-256 of the content: a repeated request must have the same."""
        return hashlib.sha256(f"{self.key_id} {self.overlap.total_seconds():.0f}".encode()).digest()


class RotationRefusal(Enum):
    """Why a key was not replaced."""

    ABSENT = "ABSENT"
    REVOKED = "REVOKED"
    EXPIRED = "EXPIRED"
    REPLACED = "REPLACED"
    FULL = "FULL"
    OTHER_CONTENT = "OTHER_CONTENT"


@dataclass(frozen=True, slots=True)
class Rotation:
    """The key, its successor, and whether the text offered for the successor is the one that is kept."""

    replaced: ApiKeyRecord
    successor: ApiKeyRecord
    text_is_kept: bool


# Given the key as it is, what it shall be. Pure; called while nobody else can change it. Raises what must not be.
Decide = Callable[[ApiKeyRecord], ApiKeyRecord]


class KeyStore(Protocol):
    """Where a tenant's keys are kept. Every method is one transaction of that tenant."""

    async def add_key(self, tenant_id: TenantId, key: ApiKeyText, terms: NewKeyTerms, max_live: int, actor: Actor) -> ApiKeyRecord | None:
        """Stores the key; None when the tenant has `max_live` live keys already."""
        ...

    async def list_keys(self, tenant_id: TenantId, after: tuple[datetime, str] | None, limit: int) -> Sequence[ApiKeyRecord]:
        """Returns keys older than the position, newest first."""
        ...

    async def get_key(self, tenant_id: TenantId, key_id: str) -> ApiKeyRecord | None:
        """Returns the key; None when the tenant has no such key."""
        ...

    async def change_key(
        self, tenant_id: TenantId, key_id: str, decide: Decide, actor: Actor
    ) -> tuple[ApiKeyRecord, tuple[str, ...]] | None:
        """Keeps what is decided, and returns it with the paths that changed; None when the tenant has no such key."""
        ...

    async def rotate_key(
        self, tenant_id: TenantId, wish: RotationWish, key: ApiKeyText, max_live: int, actor: Actor
    ) -> Rotation | RotationRefusal:
        """Stores the key as the successor and ends the old one, or gives the successor this wish made before the new secret."""
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
        granted = NewKeyTerms(
            printable(terms.display_name, "display_name"),
            grantable(terms.scopes, held),
            terms.expire_time,
            read_cidrs(terms.allowed_cidrs, "allowed_cidrs"),
        )
        if terms.expire_time is not None and terms.expire_time <= self._clock():
            raise InvalidRequest("expire_time", "must be in the future")
        key = new_api_key(tier)
        record = await self._store.add_key(tenant_id, key, granted, MAX_LIVE_KEYS, actor)
        if record is None:
            raise _too_many(tenant_id)
        return record, key

    async def update(
        self, tenant_id: TenantId, held: frozenset[str], key_id: str, change: KeyChange, actor: Actor
    ) -> tuple[ApiKeyRecord, tuple[str, ...]]:
        """Changes a live key; widening it takes its scopes. Raises: NotFound, InvalidRequest, WrongState, Forbidden(SCOPE_MISSING)."""
        changed = await self._store.change_key(tenant_id, key_id, lambda key: changed_key(key, change, held, self._clock()), actor)
        if changed is None:
            raise NotFound("api_key")
        return changed

    async def rotate(
        self, tenant_id: TenantId, tier: str, held: frozenset[str], wish: RotationWish, actor: Actor
    ) -> tuple[Rotation, ApiKeyText]:
        """Replaces a key by one with the same rights, which the caller must hold: its text is as good as the old key's.

        Raises: NotFound, Forbidden(SCOPE_MISSING), WrongState, ContentConflict, LimitExceeded(PLAN_LIMIT).
        """
        old = await self._store.get_key(tenant_id, wish.key_id)
        if old is None:
            raise NotFound("api_key")
        # A key's scopes never change, so what is checked here holds in the transaction as well.
        grantable(old.scopes, held)
        key = new_api_key(tier)
        rotation = await self._store.rotate_key(tenant_id, wish, key, MAX_LIVE_KEYS, actor)
        if isinstance(rotation, RotationRefusal):
            raise _not_rotated(rotation, tenant_id)
        # A repeated wish keeps the successor's id and changes its secret alone.
        return rotation, ApiKeyText(tier, rotation.successor.key_id, key.secret)

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


def _not_rotated(refusal: RotationRefusal, tenant_id: TenantId) -> MeshError:
    match refusal:
        case RotationRefusal.ABSENT:
            return NotFound("api_key")
        case RotationRefusal.REVOKED | RotationRefusal.EXPIRED:
            return WrongState("api_key", refusal.value, "the key is dead already; make a new one")
        case RotationRefusal.REPLACED:
            return WrongState("api_key", refusal.value, "the key has a successor already; rotate that one")
        case RotationRefusal.OTHER_CONTENT:
            return ContentConflict("api_key", "this request id was used with other content; use a new one")
        case RotationRefusal.FULL:
            return _too_many(tenant_id, "revoke one first, or rotate with an overlap of 0")
        case _:
            assert_never(refusal)


def _too_many(tenant_id: TenantId, advice: str = "revoke one first") -> MeshError:
    return too_many(tenant_id, "live_api_keys", "live keys", MAX_LIVE_KEYS, advice)
