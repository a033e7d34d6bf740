"""Page tokens of call lists: where the next page starts, for one tenant and one filter. Refuses everything it did not make itself.

A token is no authority, since the query names its tenant anyway; the check keeps it from being used with another filter, or guessed at.
"""

import base64
import binascii
import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from services.kernel.errors import InvalidRequest
from services.kernel.ids import TenantId
from services.metering.call import CallState

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BODY = struct.Struct(">Bq16s")
_FORM = 1
_CHECK_BYTES = 12


@dataclass(frozen=True, slots=True)
class PagePosition:
    """The last call of the page before: the next page holds calls opened before it."""

    open_time: datetime
    reservation_id: bytes


def encode_page_token(position: PagePosition, tenant_id: TenantId, states: Sequence[CallState]) -> str:
    """Returns the opaque text for a position."""
    body = _BODY.pack(_FORM, (position.open_time - _EPOCH) // timedelta(microseconds=1), position.reservation_id)
    return base64.urlsafe_b64encode(body + _check(body, tenant_id, states)).rstrip(b"=").decode()


def decode_page_token(token: str, tenant_id: TenantId, states: Sequence[CallState]) -> PagePosition | None:
    """Reads a token; None for the empty one. Raises: InvalidRequest for a token of another tenant, filter or making."""
    if not token:
        return None
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        body, check = raw[: _BODY.size], raw[_BODY.size :]
        form, micros, reservation_id = _BODY.unpack(body)
        open_time = _EPOCH + timedelta(microseconds=micros)
    except (binascii.Error, ValueError, struct.error, OverflowError):
        raise _refusal() from None
    if form != _FORM or not hmac.compare_digest(check, _check(body, tenant_id, states)):
        raise _refusal()
    return PagePosition(open_time, reservation_id)


def _check(body: bytes, tenant_id: TenantId, states: Sequence[CallState]) -> bytes:
    filtered = ",".join(str(int(state)) for state in sorted(set(states)))
    return hashlib.sha256(b"|".join((b"calls", tenant_id.bytes, filtered.encode(), body))).digest()[:_CHECK_BYTES]


def _refusal() -> InvalidRequest:
    return InvalidRequest("page_token", "is not a token of this list; start again without one, and keep the same states from page to page")
