"""JSON over HTTP in pages: `{"data": […], "has_more": …, "next_page": …}`, as usage reports answer. Waits when told to; believes nothing.

Follows no redirect, which would carry the key elsewhere, and says no key in any error.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import cast
from urllib.parse import urlsplit

import aiohttp
import orjson

from services.kernel.errors import Unavailable

FEED = "provider usage feed"
_ATTEMPTS = 5
_MOST_WAIT_SECONDS = 60.0
_FIRST_WAIT_SECONDS = 0.5
_MOST_BYTES = 32 * 1024 * 1024
_MOST_PAGES = 1_000
# What the ledger's columns hold: longer or more is no name and no count of a provider's.
_MOST_NAME, _MOST_TOKEN = 200, 2_000
MOST_TOKENS_OF_A_REQUEST, MOST_TOKENS_OF_A_BUCKET = 10**8, 10**13

Query = Sequence[tuple[str, str]]


class Unreadable(Unavailable):
    """An answer, or a part of it, is not what it should be: nothing is concluded from it."""


class JsonPages:
    """Reads pages from one server."""

    def __init__(self, base_url: str, headers: Mapping[str, str], *, timeout_seconds: float = 30.0) -> None:
        self._base_url = base_url.rstrip("/")
        self._session = aiohttp.ClientSession(
            headers=headers, timeout=aiohttp.ClientTimeout(total=timeout_seconds), cookie_jar=aiohttp.DummyCookieJar()
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._session.close()

    async def pages(self, path: str, query: Query) -> AsyncIterator[Mapping[str, object]]:
        """Yields the pages in order. Raises: Unavailable when the server does not answer, refuses, or answers something else."""
        following, seen = "", {""}
        for _ in range(_MOST_PAGES):
            page = await self._get(path, [*query, ("page", following)] if following else query)
            yield page
            if page.get("has_more") is not True:
                return
            following = text(page, "next_page", _MOST_TOKEN)
            if following in seen:
                raise unreadable("it tells a page twice")
            seen.add(following)
        raise unreadable(f"it has over {_MOST_PAGES} pages")

    async def _get(self, path: str, query: Query) -> Mapping[str, object]:
        for attempt in range(1, _ATTEMPTS + 1):
            problem, wait_seconds = "it cannot be reached", None
            try:
                async with self._session.get(self._base_url + path, params=query, allow_redirects=False) as answer:
                    if answer.status == 200:
                        return _object(await _body(answer))
                    problem, wait_seconds = f"it answered {answer.status}", _retry_after(answer.headers)
                    if answer.status != 429 and answer.status < 500:
                        raise self._away(problem)
            except TimeoutError:
                problem = "it did not answer in time"
            except (aiohttp.ClientError, OSError):
                pass
            if attempt < _ATTEMPTS:
                await asyncio.sleep(_pause(attempt, wait_seconds))
        raise self._away(problem)

    def _away(self, problem: str) -> Unavailable:
        return Unavailable(FEED, f"the provider's usage feed at {urlsplit(self._base_url).netloc}: {problem}", 60.0)


def unreadable(problem: str) -> Unreadable:
    """Builds the failure of a feed whose answer is not what it should be."""
    return Unreadable(FEED, f"the provider's usage feed cannot be read: {problem}", 60.0)


def objects(holder: Mapping[str, object], name: str) -> list[Mapping[str, object]]:
    """Returns a list of objects. Raises: Unreadable."""
    value = listed(holder, name)
    if not all(isinstance(item, dict) for item in value):
        raise unreadable(f"{name} is no list of objects")
    return cast("list[Mapping[str, object]]", value)


def listed(holder: Mapping[str, object], name: str) -> list[object]:
    """Returns a list of whatever. Raises: Unreadable."""
    value = holder.get(name)
    if not isinstance(value, list):
        raise unreadable(f"{name} is no list")
    return value


def text(holder: Mapping[str, object], name: str, most: int = _MOST_NAME) -> str:
    """Returns a text of 1 to `most` characters. Raises: Unreadable."""
    value = holder.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= most or "\x00" in value:
        raise unreadable(f"{name} is no text")
    return value


def token_count(holder: Mapping[str, object], name: str, most: int) -> int:
    """Returns a count of 0 to `most` tokens. Raises: Unreadable."""
    value = holder.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise unreadable(f"{name} is no count")
    return value


def moment(holder: Mapping[str, object], name: str) -> datetime:
    """Returns a moment with its zone. Raises: Unreadable."""
    try:
        found = datetime.fromisoformat(text(holder, name))
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise unreadable(f"{name} is no moment")
    return found.astimezone(UTC)


def rfc3339(time: datetime) -> str:
    """Returns a moment as feeds are asked for it."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


async def _body(answer: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in answer.content.iter_chunked(65_536):
        body += chunk
        if len(body) > _MOST_BYTES:
            raise unreadable(f"a page is over {_MOST_BYTES} bytes")
    return bytes(body)


def _object(body: bytes) -> Mapping[str, object]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise unreadable("a page is no JSON") from None
    if not isinstance(value, dict):
        raise unreadable("a page is no object")
    return value


def _retry_after(headers: Mapping[str, str]) -> float | None:
    try:
        return min(_MOST_WAIT_SECONDS, max(0.0, float(headers["retry-after"])))
    except (KeyError, ValueError):
        return None


def _pause(attempt: int, told_seconds: float | None) -> float:
    if told_seconds is not None:
        return told_seconds
    return _FIRST_WAIT_SECONDS * float(2 ** (attempt - 1)) * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
