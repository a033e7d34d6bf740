"""Receivers of events on loopback: an HTTP server that does as it is told, and an SMTP server that takes mail."""

import asyncio
import email
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.message import Message

from aiohttp import web

# A status that stands for no answer: the connection is closed instead.
CLOSED = 599


@dataclass
class Receiver:
    """What arrived, and what is answered: the scripted statuses first, then 200."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    delay_seconds: float = 0.0
    at_once: int = 0
    most_at_once: int = 0

    async def handle(self, request: web.Request) -> web.Response:
        """Takes one event."""
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            body = await request.read()
            self.received.append(({name.lower(): value for name, value in request.headers.items()}, body))
            if self.delay_seconds:
                await asyncio.sleep(self.delay_seconds)
            status = self.statuses.pop(0) if self.statuses else 200
            if status == CLOSED and request.transport is not None:
                request.transport.close()
            return web.Response(status=status, headers={"location": self.url} if status in (301, 302, 307) else {})
        finally:
            self.at_once -= 1


@asynccontextmanager
async def running_receiver(port: int = 0) -> AsyncIterator[Receiver]:
    """A receiver on a free loopback port."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/events", receiver.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    host, bound, *_ = runner.addresses[0]
    receiver.url = f"http://{host}:{bound}/events"
    try:
        yield receiver
    finally:
        await runner.cleanup()


@dataclass
class Mailbox:
    """An SMTP server's mail, by envelope."""

    port: int = 0
    refuse: bool = False
    taken: list[tuple[list[str], Message]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Speaks as much of RFC 5321 as a client needs to leave a mail."""
        recipients: list[str] = []
        writer.write(b"220 mail\r\n")
        while line := (await reader.readline()).decode().strip():
            command = line.upper()
            if command.startswith("RCPT TO:"):
                recipients.append(line[8:].strip("<> "))
            if command == "DATA":
                writer.write(b"354 go on\r\n")
                content = b""
                while (part := await reader.readline()) != b".\r\n":
                    content += part
                self.taken.append((recipients, email.message_from_bytes(content)))
            refused = self.refuse and command.startswith("RCPT")
            writer.write(b"550 no\r\n" if refused else b"221 bye\r\n" if command == "QUIT" else b"250 ok\r\n")
            if command == "QUIT":
                break
        writer.close()


@asynccontextmanager
async def running_mailbox() -> AsyncIterator[Mailbox]:
    """A mail server on a free loopback port."""
    mailbox = Mailbox()
    server = await asyncio.start_server(mailbox.serve, "127.0.0.1", 0)
    mailbox.port = server.sockets[0].getsockname()[1]
    try:
        yield mailbox
    finally:
        server.close()
        await server.wait_closed()
