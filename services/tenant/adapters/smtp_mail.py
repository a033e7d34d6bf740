"""Sends the welcome mail to a new tenant's owner over SMTP. Refuses to build a header from anything that could hold a line break."""

import asyncio
import smtplib
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.errors import HeaderParseError
from email.message import EmailMessage
from urllib.parse import parse_qs, unquote, urlsplit

from services.kernel.errors import MeshError
from services.kernel.ids import TenantId
from services.kernel.tenant_database import TenantDatabase
from services.kernel.webhook_signing import DeliveryFailed
from services.tenant.events import Event

TIMEOUT_SECONDS = 10.0
GET_OWNER = """
SELECT u.email, t.display_name, t.slug FROM tenant.users u JOIN tenant.tenants t ON t.tenant_id = u.tenant_id
WHERE u.tenant_id = $1 AND u.role = 'OWNER'
"""


@dataclass(frozen=True, slots=True)
class Addressee:
    """Whom to welcome."""

    email: str
    display_name: str
    slug: str


class PostgresOwners:
    """Where owners are read, at the time of sending: an event holds no address."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def find(self, tenant_id: TenantId) -> Addressee | None:
        """Returns the owner; None once the tenant is gone."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(GET_OWNER, tenant_id)
        return None if row is None else Addressee(row["email"], row["display_name"], row["slug"])


class SmtpMail:
    """One mail server, by `smtp://user:password@host:port?starttls=1`; a connection a mail, in a thread."""

    def __init__(self, url: str, sender: str, find_owner: Callable[[TenantId], Awaitable[Addressee | None]]) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "localhost", parts.port or 25
        self._user, self._password = unquote(parts.username or ""), unquote(parts.password or "")
        self._starttls = parse_qs(parts.query).get("starttls", ["0"])[0] == "1"
        self._sender = sender
        self._find_owner = find_owner

    async def send(self, event: Event) -> None:
        """Sends the welcome mail; nothing when the tenant is gone already. Raises: DeliveryFailed."""
        try:
            owner = await self._find_owner(event.tenant_id)
        except MeshError as error:
            raise DeliveryFailed(f"the owner cannot be read ({error.reason_name})") from None
        if owner is None:
            return
        try:
            message = welcome(self._sender, owner, str(event.event_id))
            await asyncio.to_thread(self._send, message)
        except (smtplib.SMTPException, OSError, ValueError, HeaderParseError) as error:
            # The kind alone: a server's words often repeat the address.
            raise DeliveryFailed(f"the mail was not taken ({type(error).__name__})") from None

    def _send(self, message: EmailMessage) -> None:
        with smtplib.SMTP(self._host, self._port, timeout=TIMEOUT_SECONDS) as server:
            if self._starttls:
                server.starttls(context=ssl.create_default_context())
            if self._user:
                server.login(self._user, self._password)
            server.send_message(message)


def welcome(sender: str, owner: Addressee, event_id: str) -> EmailMessage:
    """Builds the mail. Raises: ValueError for an address with a line break, which no header can hold."""
    message = EmailMessage()
    message["From"] = sender
    message["To"] = owner.email
    message["Subject"] = f"{owner.display_name} is ready"
    # The same for every attempt, so that a second delivery can be told from a second mail.
    message["Message-ID"] = f"<{event_id}@tenantry>"
    message.set_content(
        f"{owner.display_name} is ready to be used.\n\nIts name in addresses is {owner.slug}. "
        "The first API key was given to whoever asked for the tenant; it is not in this mail.\n"
    )
    return message
