"""A process that seals a tenant's rows again until it is killed: told what to do by its input."""

import asyncio
import json
import sys
from datetime import UTC, datetime, timedelta
from uuid import UUID

from services.kernel.ids import TenantId
from services.kernel.request_context import bind_tenant
from services.kernel.sealing import TenantKeys
from services.kernel.tenant_cipher import TenantCipher
from services.kernel.tenant_context import TenantContext
from services.kernel.tenant_database import TenantDatabase
from services.retrieval.adapters.postgres_sealing import PostgresSealedRows


def context_of(tenant_id: TenantId, *, encrypts: bool = True) -> TenantContext:
    """The context of a tenant whose content is sealed."""
    later = datetime.now(UTC) + timedelta(seconds=300)
    return TenantContext(tenant_id, "enterprise", "local", "key:1", frozenset(), 1, later, False, "token", encrypt_content=encrypts)


class GivenKeys:
    """Keys that were written down for this process."""

    def __init__(self, keys: dict[int, bytes]) -> None:
        self._keys = keys

    async def fetch(self, context: TenantContext, tenant_id: TenantId) -> TenantKeys:
        return TenantKeys.of(tenant_id, self._keys, max(self._keys))


async def work(dsn: str, tenant_id: TenantId, keys: dict[int, bytes]) -> None:
    """Says so after each page."""
    database = await TenantDatabase.open(dsn)
    rows = PostgresSealedRows(database, TenantCipher(GivenKeys(keys)))
    with bind_tenant(context_of(tenant_id)):
        least = await rows.begin(tenant_id, max(keys))
        while await rows.reseal_page(tenant_id, least):
            sys.stdout.write("page\n")
            sys.stdout.flush()
    await database.close()


if __name__ == "__main__":
    told = json.loads(sys.stdin.readline())
    asyncio.run(work(told["dsn"], TenantId(UUID(told["tenant_id"])), {int(name): bytes.fromhex(key) for name, key in told["keys"].items()}))
