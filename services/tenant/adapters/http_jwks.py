"""Fetches key sets over HTTP. Refuses redirects, private networks, more than 64 KB, compressed answers and to wait over 2 s.

An address is an operator's word; what answers there is nobody's.
"""

import aiohttp
from aiohttp.abc import AbstractResolver

from services.kernel.public_sockets import PrivateAddress, outward_session
from services.tenant.json_web_key import JwksMalformed
from services.tenant.jwks_cache import JwksDown, JwksPrivate

MAX_BYTES = 64 * 1024
TIMEOUT_SECONDS = 2.0
_MAX_CONNECTIONS = 16
# Uncompressed: a few bytes that unfold into gigabytes pass every bound on what was received.
_HEADERS = {"accept": "application/jwk-set+json, application/json", "accept-encoding": "identity"}


class HttpJwksSource:
    """One client session, opened at the first fetch. `private_addresses`: addresses of private networks are called too."""

    def __init__(self, *, private_addresses: bool = False, resolver: AbstractResolver | None = None) -> None:
        self._private_addresses = private_addresses
        self._resolver = resolver
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()

    async def fetch(self, uri: str) -> bytes:
        """Returns what stands at the address.

        Raises: JwksDown; JwksPrivate; JwksMalformed for a redirect, another refusal and what is too large.
        """
        try:
            async with self._open().get(uri, allow_redirects=False, headers=_HEADERS) as response:
                if response.status >= 500:
                    raise JwksDown
                if response.status != 200 or response.headers.get("content-encoding", "identity") != "identity":
                    raise JwksMalformed
                return await _read(response)
        except aiohttp.ClientConnectorError as error:
            raise (JwksPrivate if isinstance(error.os_error, PrivateAddress) else JwksDown) from None
        except (aiohttp.ClientError, TimeoutError, OSError):
            raise JwksDown from None
        except ValueError:
            raise JwksMalformed from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = outward_session(
                timeout_seconds=TIMEOUT_SECONDS,
                private_addresses=self._private_addresses,
                max_connections=_MAX_CONNECTIONS,
                resolver=self._resolver,
            )
        return self._session


async def _read(response: aiohttp.ClientResponse) -> bytes:
    received = bytearray()
    async for part in response.content.iter_any():
        received += part
        if len(received) > MAX_BYTES:
            raise JwksMalformed
    return bytes(received)
