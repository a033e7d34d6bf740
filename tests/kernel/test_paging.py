"""Pages: what a token carries, which ones are refused, and where a list ends."""

import base64
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kernel.errors import InvalidRequest
from services.kernel.paging import cut_page, decode_page_token, encode_page_token, page_size, position_time

PARTS = st.lists(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00"), max_size=30), min_size=1, max_size=3)


@given(PARTS)
def test_a_token_gives_back_its_position(position: list[str]) -> None:
    """Whatever text a store keeps comes back, in letters that any address or shell takes as they are."""
    token = encode_page_token("things", position)
    assert decode_page_token(token, "things", len(position)) == tuple(position)
    assert token.isascii() and token.replace("-", "").replace("_", "").isalnum()


def test_an_empty_token_is_the_first_page() -> None:
    """No token, no position."""
    assert decode_page_token("", "things", 1) is None


@pytest.mark.parametrize(
    "token",
    [
        "garbage",
        "%%%",
        "é",
        "\x00",
        "AQ",
        encode_page_token("other things", ["a"]),
        encode_page_token("things", ["a", "b"]),
        encode_page_token("things", ["a\x00"]),
        base64.urlsafe_b64encode(b"\x02" + base64.urlsafe_b64decode(encode_page_token("things", ["abc"]) + "=" * 2)[1:]).decode(),
        base64.urlsafe_b64encode(b"\x01" + b"c" * 12 + b"\xff\xfe").decode(),
    ],
    ids=["noise", "no base64", "not ascii", "NUL", "cut off", "other list", "longer", "NUL inside", "other version", "no text"],
)
def test_a_token_that_the_list_did_not_give_is_refused(token: str) -> None:
    """Foreign text, another list's token, another version's and one with a NUL name the field `page_token`."""
    with pytest.raises(InvalidRequest) as refused:
        decode_page_token(token, "things", 1)
    assert [violation.field for violation in refused.value.field_violations] == ["page_token"]


@given(st.integers(min_value=0))
def test_an_altered_token_is_refused(where: int) -> None:
    """No single bit of a token can be changed to make another position of it."""
    token = encode_page_token("things", ["2026-01-01", "some key"])
    raw = bytearray(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    raw[where // 8 % len(raw)] ^= 1 << where % 8
    with pytest.raises(InvalidRequest):
        decode_page_token(base64.urlsafe_b64encode(raw).decode().rstrip("="), "things", 2)


@pytest.mark.parametrize(("found", "page", "following"), [(0, 0, ""), (2, 2, ""), (3, 3, ""), (4, 3, "after 2")])
def test_only_a_page_with_more_behind_it_has_a_token(found: int, page: int, following: str) -> None:
    """A store asked for one more than the page holds tells by it whether there is a next page, which begins after the last item shown."""
    items, token = cut_page(range(found), 3, lambda last: f"after {last}")
    assert (list(items), token) == (list(range(page)), following)


def test_a_page_holds_a_hundred_items_unless_told() -> None:
    """0 asks for the default."""
    assert (page_size(0), page_size(7)) == (100, 7)


def test_a_moment_in_a_position_keeps_its_microseconds() -> None:
    """A moment of any zone comes back as the same moment of UTC."""
    moment = datetime(2026, 1, 31, 23, 59, 59, 123_456, tzinfo=timezone(timedelta(hours=5)))
    assert position_time(moment.isoformat()) == moment
    assert position_time(moment.isoformat()).tzinfo is UTC


@pytest.mark.parametrize("text", ["yesterday", "", "2026-01-01T00:00:00", "0001-01-01T00:00:00+23:59"])
def test_a_position_without_a_real_moment_is_refused(text: str) -> None:
    """Words, times without a zone and times before the calendar are no moments."""
    with pytest.raises(InvalidRequest) as refused:
        position_time(text)
    assert [violation.field for violation in refused.value.field_violations] == ["page_token"]
