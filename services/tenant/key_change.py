"""What may be changed of a key that is there, and by whom. Pure; refuses to widen a key for somebody who does not hold its scopes."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from services.kernel.errors import InvalidRequest, WrongState
from services.tenant.api_key_record import ApiKeyRecord
from services.tenant.cidr import Network, read_cidrs
from services.tenant.scopes import grantable
from services.tenant.text import printable

PATHS = ("allowed_cidrs", "display_name", "expire_time")


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What is wanted of the key: `paths` names the fields that count, the others are not looked at."""

    paths: frozenset[str]
    display_name: str
    expire_time: datetime | None
    allowed_cidrs: Sequence[str]


def expand_mask(paths: Sequence[str]) -> frozenset[str]:
    """Returns the fields a mask names. Raises: InvalidRequest(update_mask)."""
    if not paths:
        raise InvalidRequest("update_mask", f"must name at least one of {', '.join(PATHS)}")
    unknown = sorted(set(paths) - set(PATHS))
    if unknown:
        raise InvalidRequest("update_mask", f"knows no path {unknown[0]!r}; the paths are {', '.join(PATHS)}")
    return frozenset(paths)


def changed_key(key: ApiKeyRecord, change: KeyChange, held: frozenset[str], now: datetime) -> ApiKeyRecord:
    """Returns the key as it is wanted. Raises: InvalidRequest, WrongState for a dead key, Forbidden(SCOPE_MISSING) for a widened one."""
    if key.revoke_time is not None or (key.expire_time is not None and key.expire_time <= now):
        state = "EXPIRED" if key.revoke_time is None else "REVOKED"
        raise WrongState("api_key", state, "the key is dead already; make a new one")
    wanted = _wanted(key, change, now)
    later = _ends_later(key.expire_time, wanted.expire_time)
    if later and key.replaced_by:
        raise WrongState("api_key", "REPLACED", "the key has a successor and ends for it; change the successor instead")
    if later or not _within(wanted.allowed_cidrs, key.allowed_cidrs):
        # Somebody who found a key's text but is held off by its networks, or comes too late, must not open them with less than it is worth.
        grantable(key.scopes, held)
    return wanted


def changed_paths(before: ApiKeyRecord, after: ApiKeyRecord) -> tuple[str, ...]:
    """Returns what differs, sorted."""
    return tuple(path for path in PATHS if getattr(before, path) != getattr(after, path))


def _wanted(key: ApiKeyRecord, change: KeyChange, now: datetime) -> ApiKeyRecord:
    if "display_name" in change.paths:
        if not change.display_name:
            raise InvalidRequest("display_name", "must have at least 1 character")
        key = replace(key, display_name=printable(change.display_name, "display_name"))
    if "expire_time" in change.paths:
        if change.expire_time is not None and change.expire_time <= now:
            raise InvalidRequest("expire_time", "must be in the future; RevokeApiKey ends a key now")
        key = replace(key, expire_time=change.expire_time)
    if "allowed_cidrs" in change.paths:
        key = replace(key, allowed_cidrs=read_cidrs(change.allowed_cidrs, "allowed_cidrs"))
    return key


def _ends_later(before: datetime | None, after: datetime | None) -> bool:
    return before is not None and (after is None or after > before)


def _within(after: Sequence[str], before: Sequence[str]) -> bool:
    """Tells whether each network lies in one of those before; no networks at all are every network."""
    if not before or not after:
        return not before
    networks = [ipaddress.ip_network(text) for text in before]
    return all(any(_lies_in(ipaddress.ip_network(text), network) for network in networks) for text in after)


def _lies_in(inner: Network, outer: Network) -> bool:
    if isinstance(inner, ipaddress.IPv4Network):
        return isinstance(outer, ipaddress.IPv4Network) and inner.subnet_of(outer)
    return isinstance(outer, ipaddress.IPv6Network) and inner.subnet_of(outer)
