"""Connections to addresses that somebody else named. Refuses to open one into a private network, whatever a name leads to."""

import socket

import aiohttp
from aiohttp.abc import AbstractResolver

from services.kernel.public_address import is_public

# As aiohttp tells it: family, type, protocol, canonical name, socket address.
_AddressInfo = tuple[int | socket.AddressFamily, int | socket.SocketKind, int, str, tuple[object, ...]]


class PrivateAddress(OSError):
    """Nothing may be sent to the address; what `ClientConnectorError.os_error` of a refused connection is."""

    def __init__(self) -> None:
        # The same words for each: of several addresses of a name, equal failures are told as one of them.
        super().__init__("a private address")


def outward_session(
    *, timeout_seconds: float, private_addresses: bool, max_connections: int = 16, resolver: AbstractResolver | None = None
) -> aiohttp.ClientSession:
    """Opens a client session without cookies and unpacking. `private_addresses`: those of private networks are called too."""

    def open_socket(info: _AddressInfo) -> socket.socket:
        # Here and not where the name is read: what is looked at is what is connected to, whatever the name leads to the next time.
        family, kind, protocol, _, address = info
        if not private_addresses and not is_public(str(address[0])):
            raise PrivateAddress
        return socket.socket(family, kind, protocol)

    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=timeout_seconds),
        connector=aiohttp.TCPConnector(limit=max_connections, resolver=resolver, socket_factory=open_socket),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
    )
