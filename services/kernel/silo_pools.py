"""Connection pools of tenants with a database of their own: bounded in number, small, and closed when others need the room."""

from pydantic import SecretStr

from services.kernel.lending import Lending
from services.kernel.settings import DEFAULT_SILO_POOLS
from services.kernel.tenant_database import Database

POOL_SIZE = 4


class SiloPools(Lending[SecretStr, Database]):
    """At most `limit` pools, one a DSN."""

    def __init__(self, limit: int = DEFAULT_SILO_POOLS, *, pool_size: int = POOL_SIZE, application_name: str = "tenantry-silo") -> None:
        async def open_pool(dsn: SecretStr) -> Database:
            # It connects with the first statement: opening one here only allocates.
            return await Database.open(dsn.get_secret_value(), min_size=0, max_size=pool_size, application_name=application_name)

        async def close_pool(database: Database) -> None:
            await database.close()

        super().__init__(limit, open_pool, close_pool, dependency="postgres")
