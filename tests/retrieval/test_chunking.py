"""Chunks are stretches of the document, and lose nothing but white space."""

from hypothesis import given
from hypothesis import strategies as st

from services.retrieval.chunking import cut

TEXTS = st.text(alphabet=st.sampled_from("ab .!?\n#é"), max_size=400)


@given(TEXTS, st.integers(5, 60))
def test_chunks_are_stretches_of_the_text_in_order(text: str, target: int) -> None:
    """Every chunk equals the text between its offsets; chunks neither overlap nor run backwards."""
    end = 0
    for chunk in cut(text, target):
        assert chunk.text == text[chunk.start : chunk.end]
        assert chunk.start >= end
        end = chunk.end


@given(TEXTS, st.integers(5, 60))
def test_only_white_space_is_left_out(text: str, target: int) -> None:
    """Joining the chunks gives the text without its white space between them."""
    covered = "".join("".join(chunk.text.split()) for chunk in cut(text, target))
    assert covered == "".join(text.split())


@given(TEXTS, st.integers(5, 60))
def test_chunks_stay_within_the_target_and_are_never_blank(text: str, target: int) -> None:
    """No chunk is longer than asked for, and none is blank."""
    assert all(0 < len(chunk.text) <= target and chunk.text.strip() for chunk in cut(text, target))


def test_headings_begin_chunks() -> None:
    """A section is not mixed with the one before it."""
    text = "# Title\n\nOpening words.\n\n## Holidays\n\nTwenty days.\n\n## Expenses\n\nKeep receipts."
    assert [chunk.text.splitlines()[0] for chunk in cut(text)] == ["# Title", "## Holidays", "## Expenses"]


def test_a_blank_text_has_no_chunks() -> None:
    """White space alone is nothing to find."""
    assert cut(" \n\t ") == []
