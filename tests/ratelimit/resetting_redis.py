"""A server that answers every command as Redis would, OK, and resets its connections when it is told to: what a kill may do to them."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
# HGET alone: three words, its key the first after its name.
_COMMANDS = b"*1\r\n*6\r\n$4\r\nhget\r\n:3\r\n*0\r\n:1\r\n:1\r\n:1\r\n"


class ResettingRedis:
    """One node that owns every slot of a cluster, too."""

    def __init__(self) -> None:
        self.port = 0
        self._writers: list[asyncio.StreamWriter] = []

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"redis://127.0.0.1:{self.port}/0"

    async def reset(self) -> None:
        """Resets every connection, and returns when the other ends may know it."""
        for writer in self._writers:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()
        self._writers.clear()
        await asyncio.sleep(0.05)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        while head := await reader.readline():
            command = []
            for _ in range(int(head[1:])):
                length = int((await reader.readline())[1:])
                command.append((await reader.readexactly(length + 2))[:-2].upper())
            writer.write(self._answer(command))

    def _answer(self, command: list[bytes]) -> bytes:
        match command:
            case [b"CLUSTER", b"SLOTS"]:
                return b"*1\r\n*3\r\n:0\r\n:16383\r\n*3\r\n$9\r\n127.0.0.1\r\n:%d\r\n$1\r\nn\r\n" % self.port
            case [b"COMMAND", *_]:
                return _COMMANDS
        return b"+OK\r\n"


@asynccontextmanager
async def resetting_redis() -> AsyncIterator[ResettingRedis]:
    """Listens on a loopback port."""
    redis = ResettingRedis()
    server = await asyncio.start_server(redis._connected, "127.0.0.1", 0)
    redis.port = server.sockets[0].getsockname()[1]
    try:
        yield redis
    finally:
        server.close()
        await redis.reset()
