"""SDK clients by the endpoint they speak to: everybody's for the life of the process, tenants' own ones bounded and dropped when idle.

Refuses to close a client that a call is using: a stream is never cut to make room.
"""

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anthropic
import httpx2

ANTHROPIC_URL = "https://api.anthropic.com"
MAX_DEDICATED_CLIENTS = 64


def key_headers(provider_key: str) -> dict[str, str | anthropic.Omit]:
    """Returns the headers that make a request use a tenant's own key; none when it has none."""
    # The client's own authorization must not go along: it is the house's key.
    return {"x-api-key": provider_key, "Authorization": anthropic.Omit()} if provider_key else {}


class _Lent:
    """A client and how many calls use it."""

    __slots__ = ("client", "users")

    def __init__(self, client: anthropic.AsyncAnthropic) -> None:
        self.client = client
        self.users = 0


class EndpointClients:
    """Lends a client for a call and keeps it for the next one to the same endpoint."""

    def __init__(self, *, base_url: str, api_key: str, max_connections: int, max_dedicated: int = MAX_DEDICATED_CLIENTS) -> None:
        self._api_key = api_key
        self._max_connections = max_connections
        self._max_dedicated = max_dedicated
        # Never left to the SDK, which would read an address out of the environment.
        self._shared = self._new(base_url or ANTHROPIC_URL)
        self._dedicated: OrderedDict[str, _Lent] = OrderedDict()

    @asynccontextmanager
    async def lend(self, endpoint: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
        """Yields a client for the endpoint, or everybody's when it is empty."""
        if not endpoint:
            yield self._shared
            return
        lent = self._dedicated.get(endpoint)
        if lent is None:
            lent = self._dedicated[endpoint] = _Lent(self._new(endpoint))
        self._dedicated.move_to_end(endpoint)
        lent.users += 1
        try:
            yield lent.client
        finally:
            lent.users -= 1
            await self._drop_idle()

    def endpoints(self) -> tuple[str, ...]:
        """Returns the dedicated endpoints a client is kept for, the least recently used first."""
        return tuple(self._dedicated)

    async def close(self) -> None:
        """Closes every client's connections."""
        while self._dedicated:
            _, lent = self._dedicated.popitem()
            await lent.client.close()
        await self._shared.close()

    async def _drop_idle(self) -> None:
        # While more are in use at once than may be kept, they are kept: calls under way are bounded elsewhere.
        over = len(self._dedicated) - self._max_dedicated
        idle = [endpoint for endpoint, lent in self._dedicated.items() if not lent.users] if over > 0 else []
        # Taken out before anything is awaited, so that no call can be lent a client that is being closed.
        for lent in [self._dedicated.pop(endpoint) for endpoint in idle[:over]]:
            await lent.client.close()

    def _new(self, base_url: str) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(
            api_key=self._api_key,
            base_url=base_url,
            max_retries=0,
            # The transport's own pool must never be a second, hidden queue behind the fair one.
            http_client=anthropic.DefaultAioHttpClient(
                limits=httpx2.Limits(max_connections=self._max_connections),
                # A redirect would send the request a second time.
                follow_redirects=False,
            ),
            open_telemetry={"traces": False, "propagation": False},
        )
