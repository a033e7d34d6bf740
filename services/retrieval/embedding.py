"""Text to vectors: the port of an embedder, and the development embedder that needs no model.

The hashing embedder knows spelling, not meaning: words and character n-grams are hashed into a fixed number of dimensions.
It is for development and tests.
Source: Weinberger et al., Feature Hashing for Large Scale Multitask Learning, 2009.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Protocol
from zlib import crc32

HASHING_DIMENSIONS = 384
_WORD = re.compile(r"\w+")
_NGRAM_SIZES = (3, 4, 5)
_WORD_WEIGHT = 1.0
_NGRAM_WEIGHT = 0.3


class Embedder(Protocol):
    """Turns texts into vectors of one length, so that near meanings lie near each other by cosine."""

    @property
    def name(self) -> str:
        """The model's name: vectors of different names cannot be compared."""
        ...

    @property
    def dimensions(self) -> int:
        """The vectors' length."""
        ...

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Returns one unit vector a text, in order."""
        ...


class HashingEmbedder:
    """Deterministic, without a model; 384 dimensions."""

    name = "hashing-384"
    dimensions = HASHING_DIMENSIONS

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Returns one unit vector a text; the zero vector only for a text without a word."""
        return [hash_vector(text) for text in texts]


def hash_vector(text: str) -> list[float]:
    """Returns the unit vector of a text's words and character n-grams. Equal texts, equal vectors, on every machine."""
    vector = [0.0] * HASHING_DIMENSIONS
    for feature, weight in _features(text.casefold()):
        digest = crc32(feature.encode())
        # One hash bit decides the sign, so that collisions cancel out on average instead of adding up.
        vector[digest % HASHING_DIMENSIONS] += weight if digest & 0x80000000 else -weight
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector] if length else vector


def _features(text: str) -> Iterator[tuple[str, float]]:
    for word in _WORD.findall(text):
        yield word, _WORD_WEIGHT
        marked = f"^{word}$"
        for size in _NGRAM_SIZES:
            for start in range(len(marked) - size + 1):
                yield marked[start : start + size], _NGRAM_WEIGHT
