"""A channel that stays the same object while its certificates change: new calls go over a new connection, old ones end on theirs."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import structlog

from services.kernel.background import BackgroundTasks
from services.kernel.rpc.certificates import CertificateFiles, Certificates

log = structlog.get_logger(__name__)

Open = Callable[[Certificates], grpc.aio.Channel]


class ReloadingChannel:
    """What stubs are built on. Serves the four ways of calling and nothing else of a grpc channel."""

    def __init__(self, files: CertificateFiles, open_channel: Open) -> None:
        self._files = files
        self._open = open_channel
        self._background = BackgroundTasks()
        self._retired: list[_Connection] = []
        self._count = 0
        self._connection = self._connect(files.current())

    def unary_unary(self, path: str, *arguments: Any, **options: Any) -> Any:
        """As grpc.aio.Channel."""
        return _Method(self, "unary_unary", path, arguments, options)

    def unary_stream(self, path: str, *arguments: Any, **options: Any) -> Any:
        """As grpc.aio.Channel."""
        return _Method(self, "unary_stream", path, arguments, options)

    def stream_unary(self, path: str, *arguments: Any, **options: Any) -> Any:
        """As grpc.aio.Channel."""
        return _Method(self, "stream_unary", path, arguments, options)

    def stream_stream(self, path: str, *arguments: Any, **options: Any) -> Any:
        """As grpc.aio.Channel."""
        return _Method(self, "stream_stream", path, arguments, options)

    async def close(self) -> None:
        """Closes every connection; calls under way fail."""
        await self._background.close()
        for connection in (*self._retired, self._connection):
            await connection.channel.close()

    def _current(self) -> "_Connection":
        found = self._files.current()
        if found is not self._connection.certificates:
            before, self._connection = self._connection, self._connect(found)
            self._retire(before)
        return self._connection

    def _connect(self, certificates: Certificates) -> "_Connection":
        self._count += 1
        return _Connection(self._open(certificates), certificates)

    def _retire(self, connection: "_Connection") -> None:
        self._retired.append(connection)
        connection.retire()

        async def close_when_idle() -> None:
            await connection.idle.wait()
            await connection.channel.close()
            self._retired.remove(connection)

        self._background.start(f"retired_channel_{self._count}", close_when_idle)


class _Connection:
    """A grpc channel with the certificates it was opened with, its methods and how many calls are under way on it."""

    def __init__(self, channel: grpc.aio.Channel, certificates: Certificates) -> None:
        self.channel = channel
        self.certificates = certificates
        self.methods: dict[_Method, Any] = {}
        self.idle = asyncio.Event()
        self._calls = 0
        self._is_retired = False

    def begin(self) -> None:
        self._calls += 1

    def end(self, _: object) -> None:
        self._calls -= 1
        self._tell()

    def retire(self) -> None:
        self._is_retired = True
        self._tell()

    def _tell(self) -> None:
        if self._is_retired and not self._calls:
            self.idle.set()


class _Method:
    """A multicallable that asks for the current connection at each call."""

    def __init__(self, owner: ReloadingChannel, kind: str, path: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._owner = owner
        self._make: tuple[str, str, tuple[Any, ...], dict[str, Any]] = (kind, path, arguments, options)
        # As grpc's own multicallables carry it: the caller's span is named after it.
        self._method = path.encode()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        connection = self._owner._current()
        method = connection.methods.get(self)
        if method is None:
            kind, path, made_with, made_as = self._make
            method = connection.methods[self] = getattr(connection.channel, kind)(path, *made_with, **made_as)
        call = method(*arguments, **options)
        connection.begin()
        call.add_done_callback(connection.end)
        return call
