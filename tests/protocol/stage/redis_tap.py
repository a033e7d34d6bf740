"""Stands between the limits and Redis and keeps every loading of a snapshot, so that a run can repeat it.

The limits repeat a batch of commands on a new connection when the old one dies without an answer: what Redis did already, it is then
told again.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import redis.asyncio

from devstack.ports import LOOPBACK
from services.ratelimit.adapters.scripts import load_script
from services.ratelimit.adapters.tenant_scripts import KINDS

_LOAD = load_script("load")
_FIRST_ARGUMENT = 3 + len(KINDS)
_CHUNK = 1 << 16


class RedisTap:
    """The loadings of snapshots, by the tenant's first key and the epoch, whatever connection they came by."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._loads: dict[tuple[bytes, int], list[bytes]] = {}

    async def repeat(self, url: str, tenant_id: str, epoch: int) -> bool:
        """Loads the snapshot of an epoch once more, as it was loaded. Returns whether it ever was."""
        command = self._loads.get((f"{{{tenant_id}}}:{KINDS[0]}".encode(), epoch))
        if command is None:
            return False
        async with redis.asyncio.from_url(url) as client:
            await client.eval(_LOAD.text, len(KINDS), *command[3:])  # type: ignore[no-untyped-call, misc] # as redis has it
        return True

    @asynccontextmanager
    async def serving(self, port: int) -> AsyncIterator[None]:
        """Listens on a loopback port."""
        server = await asyncio.start_server(self._connected, LOOPBACK, port)
        try:
            yield
        finally:
            server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            to_reader, to_writer = await asyncio.open_connection(LOOPBACK, self._port)
            try:
                async with asyncio.TaskGroup() as both:
                    back = both.create_task(_copy(to_reader, writer))
                    await self._commands(reader, to_writer)
                    back.cancel()
            finally:
                to_writer.close()
                writer.close()

    async def _commands(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Passes commands on one by one: arrays of strings with their lengths before them."""
        while head := await reader.readline():
            raw, command = [head], list[bytes]()
            for _ in range(int(head[1:])):
                length = await reader.readline()
                value = await reader.readexactly(int(length[1:]) + 2)
                raw += (length, value)
                command.append(value[:-2])
            if command[0].upper() in (b"EVAL", b"EVALSHA") and command[1] in (_LOAD.sha.encode(), _LOAD.text.encode()):
                self._loads[command[3], int(command[_FIRST_ARGUMENT + 1])] = command
            writer.write(b"".join(raw))
            await writer.drain()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
