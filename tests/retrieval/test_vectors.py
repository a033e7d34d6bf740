"""The development embedder and the sparse terms are deterministic and see spelling."""

import math

from hypothesis import given
from hypothesis import strategies as st

from services.retrieval.embedding import HASHING_DIMENSIONS, hash_vector
from services.retrieval.sparse_terms import document_terms, query_terms


def cosine(left: str, right: str) -> float:
    """The cosine of two texts' vectors."""
    return sum(a * b for a, b in zip(hash_vector(left), hash_vector(right), strict=True))


@given(st.text(min_size=1, max_size=200))
def test_vectors_are_unit_length_or_zero(text: str) -> None:
    """A vector has length 1, or 0 when there is no word to see."""
    vector = hash_vector(text)
    length = math.sqrt(sum(value * value for value in vector))
    assert len(vector) == HASHING_DIMENSIONS
    assert length == 0 or math.isclose(length, 1.0, abs_tol=1e-9)


def test_similar_spelling_lies_nearer_than_other_words() -> None:
    """An inflected word is nearer than an unrelated one."""
    assert cosine("holiday allowance", "holidays allowances") > cosine("holiday allowance", "security incident") + 0.3


def test_a_query_and_a_document_share_their_words_indices() -> None:
    """The same word has the same index on both sides, singular or plural."""
    assert set(query_terms("bikes").indices) <= set(document_terms("A bike is leased.").indices)


def test_repeated_words_weigh_more_but_less_each_time() -> None:
    """Term frequency saturates."""
    once, twice, thrice = (document_terms(" ".join(["spoke"] * count)).values[0] for count in (1, 2, 3))
    assert once < twice < thrice
    assert twice - once > thrice - twice


def test_stop_words_are_no_terms() -> None:
    """A query of nothing but stop words has no terms."""
    assert query_terms("What is it?").indices == []
