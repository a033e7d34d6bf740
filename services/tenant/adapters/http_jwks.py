"""Fetches key sets over HTTP. Refuses redirects, more than 64 KB, compressed answers and to wait over 2 s.

An address is an operator's word; what answers there is nobody's.
"""

import aiohttp

from services.tenant.json_web_key import JwksMalformed
from services.tenant.jwks_cache import JwksDown

MAX_BYTES = 64 * 1024
TIMEOUT_SECONDS = 2.0
_MAX_CONNECTIONS = 16
# Uncompressed: a few bytes that unfold into gigabytes pass every bound on what was received.
_HEADERS = {"accept": "application/jwk-set+json, application/json", "accept-encoding": "identity"}


class HttpJwksSource:
    """One client session, opened at the first fetch."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()

    async def fetch(self, uri: str) -> bytes:
        """Returns what stands at the address. Raises: JwksDown; JwksMalformed for a redirect, another refusal and what is too large."""
        try:
            async with self._open().get(uri, allow_redirects=False, headers=_HEADERS) as response:
                if response.status >= 500:
                    raise JwksDown
                if response.status != 200 or response.headers.get("content-encoding", "identity") != "identity":
                    raise JwksMalformed
                return await _read(response)
        except (aiohttp.ClientError, TimeoutError, OSError):
            raise JwksDown from None
        except ValueError:
            raise JwksMalformed from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
                connector=aiohttp.TCPConnector(limit=_MAX_CONNECTIONS),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        return self._session


async def _read(response: aiohttp.ClientResponse) -> bytes:
    received = bytearray()
    async for part in response.content.iter_any():
        received += part
        if len(received) > MAX_BYTES:
            raise JwksMalformed
    return bytes(received)
