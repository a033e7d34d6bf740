"""Knocks at databases that somebody else made, before anything is written about a tenant that is to live there. Never repeats a secret.

A Qdrant is not knocked at: this service has no business with vectors, and where networks are walled no way to them.
"""

from urllib.parse import urlsplit

import asyncpg

from services.kernel.errors import InvalidRequest, Unavailable
from services.tenant.placement import SiloStores, database_dsns

# Less than a caller waits for an answer, and more than a name and a handshake take in another network.
_CONNECT_SECONDS = 3.0
_POSTGRES_PORT = 5432
_NO_SERVER = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.AdminShutdownError,
)


class StoreProbe:
    """Logs in to each database that was named, and leaves again."""

    async def refuse_unreachable(self, stores: SiloStores) -> None:
        """Raises: Unavailable for an address that does not answer, InvalidRequest for a login that it refuses; both name the address."""
        for field_name, dsn in database_dsns(stores).items():
            await knock(field_name, dsn)


async def knock(field_name: str, dsn: str) -> None:
    """Logs in and leaves. Raises: as `StoreProbe.refuse_unreachable`."""
    address = address_of(dsn)
    try:
        connection = await asyncpg.connect(dsn, timeout=_CONNECT_SECONDS)  # noqa: TID251 - a stranger's database, for a moment
    except _NO_SERVER:
        raise unreachable(field_name, address) from None
    except (asyncpg.PostgresError, asyncpg.InterfaceError, ValueError):
        # The driver's own words may repeat what stands in the DSN.
        raise InvalidRequest(field_name, f"{address} refuses this login, or has no such database") from None
    connection.terminate()


def address_of(dsn: str) -> str:
    """Returns host, port and database, and nothing of who logs in."""
    parts = urlsplit(dsn)
    return f"{parts.hostname}:{parts.port or _POSTGRES_PORT}{parts.path.rstrip('/')}"


def unreachable(field_name: str, address: str) -> Unavailable:
    """Builds the refusal of a database that does not answer."""
    message = f"{field_name}: {address} does not answer; nothing was begun, repeat the call once it does"
    return Unavailable("silo", message, field=field_name, address=address)
