"""Writes of sealed rows, in step with rotations: a store refuses a key that a rotation has passed, and the write is done again."""

import time
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import asyncpg

from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId
from services.kernel.sealing import TenantKeys
from services.kernel.tenant_cipher import TenantCipher

T = TypeVar("T")

# Raised by the schemas' require_key_version.
KEY_ROTATED = "TK001"
_ATTEMPTS = 3
RESEAL_SECONDS = 2.0


async def write_sealed(cipher: TenantCipher, tenant_id: TenantId, write: Callable[[TenantKeys], Awaitable[T]]) -> T:
    """Runs `write` with the tenant's keys, and again with newer ones when the store refused them. `write` is one transaction.

    Raises: whatever `write` raises; Unavailable when rotations follow each other faster than a write.
    """
    for _ in range(_ATTEMPTS):
        try:
            return await write(await cipher.keys(tenant_id))
        except asyncpg.PostgresError as error:
            if error.sqlstate != KEY_ROTATED:
                raise
            cipher.forget(tenant_id)
    raise Unavailable("data_key", "the tenant's data key is being changed; try again shortly")


class SealedRows(Protocol):
    """The sealed rows of one service."""

    async def begin(self, tenant_id: TenantId, version: int) -> int:
        """Refuses keys below `version` from now on; returns the least version that may be written."""
        ...

    async def reseal_page(self, tenant_id: TenantId, least_version: int) -> int:
        """Seals a page of rows of older versions again; returns how many, 0 when none is left or all are in others' hands."""
        ...

    async def is_done(self, tenant_id: TenantId, least_version: int) -> bool:
        """Tells whether no row of an older version is left."""
        ...


async def reseal_for_a_while(rows: SealedRows, tenant_id: TenantId, version: int) -> tuple[int, bool]:
    """Seals rows again, page by page, each a transaction; returns how many and whether none are left. Safe to repeat and to kill."""
    least_version, total = await rows.begin(tenant_id, version), 0
    end_time = time.monotonic() + RESEAL_SECONDS
    while time.monotonic() < end_time:
        count = await rows.reseal_page(tenant_id, least_version)
        total += count
        if not count:
            break
    return total, await rows.is_done(tenant_id, least_version)
