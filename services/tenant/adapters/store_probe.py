"""Knocks at stores that somebody else made, before anything is written about a tenant that is to live there. Never repeats a secret."""

import asyncio
from urllib.parse import urlsplit

import asyncpg

from services.kernel.errors import InvalidRequest, Unavailable
from services.tenant.placement import SiloStores, database_dsns

# Less than a caller waits for an answer, and more than a name and a handshake take in another network.
_CONNECT_SECONDS = 3.0
_POSTGRES_PORT = 5432
_QDRANT_PORT = 6334
_NO_SERVER = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.AdminShutdownError,
)


class StoreProbe:
    """Connects to each store that was named, and leaves again."""

    async def refuse_unreachable(self, stores: SiloStores) -> None:
        """Raises: Unavailable for an address that does not answer, InvalidRequest for a login that it refuses; both name the address."""
        for field_name, dsn in database_dsns(stores).items():
            await knock(field_name, dsn)
        if stores.qdrant_url:
            await _reach("silo.qdrant_url", stores.qdrant_url)


async def knock(field_name: str, dsn: str) -> None:
    """Logs in and leaves. Raises: as `StoreProbe.refuse_unreachable`."""
    address = address_of(dsn, _POSTGRES_PORT)
    try:
        connection = await asyncpg.connect(dsn, timeout=_CONNECT_SECONDS)  # noqa: TID251 - a stranger's database, for a moment
    except _NO_SERVER:
        raise unreachable(field_name, address) from None
    except (asyncpg.PostgresError, asyncpg.InterfaceError, ValueError):
        # The driver's own words may repeat what stands in the DSN.
        raise InvalidRequest(field_name, f"{address} refuses this login, or has no such database") from None
    connection.terminate()


async def _reach(field_name: str, url: str) -> None:
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port or _QDRANT_PORT)
    except (OSError, TimeoutError):
        raise unreachable(field_name, address_of(url, _QDRANT_PORT)) from None
    writer.close()


def address_of(url: str, default_port: int) -> str:
    """Returns host, port and database, and nothing of who logs in."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or default_port}{parts.path.rstrip('/')}"


def unreachable(field_name: str, address: str) -> Unavailable:
    """Builds the refusal of stores that do not answer."""
    message = f"{field_name}: {address} does not answer; nothing was begun, repeat the call once it does"
    return Unavailable("silo", message, field=field_name, address=address)
