"""The last requests received, for tests that ask what left the product; bounded in count and in bytes, never with an API key."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import orjson

REQUESTS_MAX = 200
BYTES_MAX = 64 * 1024 * 1024
SECRET_HEADERS = frozenset({"x-api-key", "authorization"})


@dataclass(frozen=True, slots=True)
class Received:
    """One request as it arrived."""

    request_id: str
    path: str
    api_key_hash: str
    headers: Mapping[str, str]
    body: bytes


class ReceivedRequests:
    """A ring of requests, oldest dropped first."""

    def __init__(self) -> None:
        self._requests: deque[Received] = deque()
        self._byte_count = 0

    def add(self, received: Received) -> None:
        """Keep the request, dropping the oldest while there are too many or they are too large."""
        self._requests.append(received)
        self._byte_count += len(received.body)
        while len(self._requests) > REQUESTS_MAX or self._byte_count > BYTES_MAX:
            self._byte_count -= len(self._requests.popleft().body)

    def clear(self) -> None:
        """Forget them all."""
        self._requests.clear()
        self._byte_count = 0

    def last(self, count: int) -> list[dict[str, object]]:
        """Return the last requests, oldest first, each with its body as JSON or, where it is none, as text."""
        return [_shown(received) for received in list(self._requests)[-count:]]


def _shown(received: Received) -> dict[str, object]:
    try:
        body = orjson.loads(received.body)
    except orjson.JSONDecodeError:
        body = received.body.decode("utf-8", "replace")
    return {
        "request_id": received.request_id,
        "path": received.path,
        "api_key_hash": received.api_key_hash,
        "headers": {name.lower(): value for name, value in received.headers.items() if name.lower() not in SECRET_HEADERS},
        "body": body,
    }
