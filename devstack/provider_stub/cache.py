"""Prompt cache accounting: which part of a request's input is read from the cache, which is written to it, which is neither.

Holds digests of prefixes per API key and model, never the text. A prefix is forgotten when its time to live ends unread.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from devstack.provider_stub.messages import Block, MessagesRequest
from devstack.provider_stub.tokens import MESSAGE_OVERHEAD_TOKENS

LOOKBACK_BLOCKS = 20
PREFIXES_MAX = 20_000
ONE_HOUR_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class InputUsage:
    """How the input is billed; the four add up to the request's input tokens."""

    input_tokens: int
    cache_creation_5m: int = 0
    cache_creation_1h: int = 0
    cache_read: int = 0


@dataclass(frozen=True, slots=True)
class _Boundary:
    digest: bytes
    token_count: int
    ttl_seconds: int


class PromptCache:
    """The prefixes seen, in memory; times are seconds on one monotonic clock."""

    def __init__(self, *, minimum_tokens: int = 0) -> None:
        self._minimum_tokens = minimum_tokens
        self._expiry_by_digest: dict[bytes, float] = {}

    def bill(self, request: MessagesRequest, api_key_hash: str, now: float) -> InputUsage:
        """Return the input's usage and remembers its marked prefixes."""
        if not request.cached:
            return InputUsage(request.input_tokens)
        boundaries = _boundaries(request, api_key_hash)
        marked = [index for index, boundary in enumerate(boundaries) if self._cacheable(boundary)]
        if not marked:
            return InputUsage(request.input_tokens)
        read_index = self._longest_known(boundaries, marked, now)
        written = {ONE_HOUR_SECONDS: 0, 300: 0}
        covered = read = boundaries[read_index].token_count if read_index >= 0 else 0
        for index in marked:
            boundary = boundaries[index]
            if index > read_index:
                written[boundary.ttl_seconds] += boundary.token_count - covered
                covered = boundary.token_count
            self._expiry_by_digest[boundary.digest] = now + boundary.ttl_seconds
        self._prune(now)
        return InputUsage(request.input_tokens - covered, written[300], written[ONE_HOUR_SECONDS], read)

    def _cacheable(self, boundary: _Boundary) -> bool:
        return bool(boundary.ttl_seconds) and boundary.token_count >= self._minimum_tokens

    def _longest_known(self, boundaries: list[_Boundary], marked: list[int], now: float) -> int:
        for mark in reversed(marked):
            for index in range(mark, max(-1, mark - LOOKBACK_BLOCKS), -1):
                if self._expiry_by_digest.get(boundaries[index].digest, now) > now:
                    return index
        return -1

    def _prune(self, now: float) -> None:
        if len(self._expiry_by_digest) <= PREFIXES_MAX:
            return
        live = {digest: expiry for digest, expiry in self._expiry_by_digest.items() if expiry > now}
        for digest in list(live)[: len(live) - PREFIXES_MAX // 2]:
            del live[digest]
        self._expiry_by_digest = live


def _boundaries(request: MessagesRequest, api_key_hash: str) -> list[_Boundary]:
    running = hashlib.blake2b(f"{api_key_hash}\0{request.model.id}".encode(), digest_size=16)
    token_count = 0
    found: list[_Boundary] = []
    for section, overhead, block in _blocks(request):
        # Lengths go in before texts, so that two blocks cannot be joined into the digest of one.
        running.update(f"\0{section}\0{block.kind}\0{len(block.title)}\0{len(block.text)}\0{block.title}\0{block.text}".encode())
        token_count += overhead + block.token_count
        found.append(_Boundary(running.digest(), token_count, block.cache_ttl_seconds))
    return found


def _blocks(request: MessagesRequest) -> Iterator[tuple[str, int, Block]]:
    for block in request.tools:
        yield "tools", 0, block
    for block in request.system:
        yield "system", 0, block
    for message in request.messages:
        for index, block in enumerate(message.blocks):
            yield f"{message.role}{'' if index else ' begins'}", 0 if index else MESSAGE_OVERHEAD_TOKENS, block
