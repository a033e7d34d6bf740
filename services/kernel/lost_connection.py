"""How Postgres' absence is told: the driver's many ways of saying "no server", and a connection that died, as one refusal."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import asyncpg

from services.kernel.errors import NotFound, Unavailable

if TYPE_CHECKING:
    from services.kernel.tenant_database import Connection

UNREACHABLE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.QueryCanceledError,
)
# Raised by the triggers that keep rows of erased tenants out.
_TENANT_ERASED = "TN001"


@contextmanager
def unreachable_is_unavailable(connection: "Connection | None" = None) -> Iterator[None]:
    """Turns the driver's ways of saying "no server" into Unavailable, and a row of an erased tenant into NotFound."""
    try:
        yield
    except asyncpg.PostgresError as error:
        if error.sqlstate == _TENANT_ERASED:
            raise NotFound("tenant") from None
        if isinstance(error, UNREACHABLE):
            raise Unavailable("postgres") from error
        raise
    except UNREACHABLE as error:
        raise Unavailable("postgres") from error
    except (asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        # The driver's own words for a connection that the server cut while it was idle.
        if connection is None or is_gone(connection):
            raise Unavailable("postgres") from error
        raise


def is_gone(connection: "Connection") -> bool:
    """Tells whether a connection is dead, or not the borrower's any more."""
    try:
        return bool(connection.is_closed())
    except asyncpg.InterfaceError:
        # The pool took it back at the moment the server cut it: what it lent out says nothing any more, not even that.
        return True
