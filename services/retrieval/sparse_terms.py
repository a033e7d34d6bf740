"""Text to sparse term vectors for BM25: the words' saturated frequencies. The store multiplies in each word's rarity.

Source: Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond, 2009.
"""

import re
from collections import Counter
from dataclasses import dataclass
from zlib import crc32

SATURATION = 1.2
LENGTH_WEIGHT = 0.75
TYPICAL_WORDS = 120.0
_WORD = re.compile(r"\w+")
_STOP_WORD_LIST = (
    "a an and are as at be but by can do does for from has have how i if in is it its may my not of on or our that the their this to was "
    "we what when where which who will with you your"
)
_STOP_WORDS = frozenset(_STOP_WORD_LIST.split())


@dataclass(frozen=True, slots=True)
class SparseVector:
    """Indices (unsigned 32-bit, unique) and their weights, in the same order."""

    indices: list[int]
    values: list[float]


def document_terms(text: str) -> SparseVector:
    """Returns the weights of a chunk's words: more for a repeated word, less each time, less in a long chunk."""
    counts = Counter(_terms(text))
    length = sum(counts.values())
    norm = SATURATION * (1 - LENGTH_WEIGHT + LENGTH_WEIGHT * length / TYPICAL_WORDS)
    return _hashed({term: count * (SATURATION + 1) / (count + norm) for term, count in counts.items()})


def query_terms(text: str) -> SparseVector:
    """Returns the words of a query, each once."""
    return _hashed(dict.fromkeys(_terms(text), 1.0))


def _terms(text: str) -> list[str]:
    return [_stem(word) for word in _WORD.findall(text.casefold()) if word not in _STOP_WORDS]


def _stem(word: str) -> str:
    # Plurals only: enough for `bikes` to find `bike`, too little to merge different words.
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith("ss") and len(word) > 3:
        return word[:-1]
    return word


def _hashed(weights: dict[str, float]) -> SparseVector:
    by_index: dict[int, float] = {}
    for term, weight in weights.items():
        index = crc32(term.encode())
        by_index[index] = max(weight, by_index.get(index, 0.0))
    return SparseVector(list(by_index), list(by_index.values()))
