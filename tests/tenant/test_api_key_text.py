"""The text of keys: round trips, and no single slip of a finger goes unnoticed."""

import re
from pathlib import Path

from hypothesis import assume, given
from hypothesis import strategies as st

from services.tenant.api_key import ApiKeyText, OperatorKeyText, new_api_key, new_operator_key, parse

TIERS = st.from_regex(r"[a-z][a-z0-9-]{0,62}", fullmatch=True)
KEY_IDS = st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=16, max_size=16)
SECRETS = st.text("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", min_size=43, max_size=43)
KEYS = st.one_of(st.builds(ApiKeyText, TIERS, KEY_IDS, SECRETS), st.builds(OperatorKeyText, KEY_IDS, SECRETS))


@given(KEYS)
def test_a_keys_text_gives_the_key_back(key: ApiKeyText | OperatorKeyText) -> None:
    """Taking a key's text apart gives the same key."""
    assert parse(str(key)) == key


@given(KEYS, st.data())
def test_any_one_changed_character_is_caught(key: ApiKeyText | OperatorKeyText, data: st.DataObject) -> None:
    """With one character replaced by any other, the text is no key."""
    text = str(key)
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.one_of(st.sampled_from("09AZaz_-"), st.characters()))
    assume(other != text[at])
    assert parse(text[:at] + other + text[at + 1 :]) is None


@given(KEYS, st.data())
def test_a_missing_doubled_or_swapped_character_is_caught(key: ApiKeyText | OperatorKeyText, data: st.DataObject) -> None:
    """Leaving a character out, typing it twice and swapping neighbours are noticed."""
    text = str(key)
    at = data.draw(st.integers(0, len(text) - 2))
    assert parse(text[:at] + text[at + 1 :]) is None
    assert parse(text[:at] + text[at] + text[at:]) is None
    if text[at] != text[at + 1]:
        assert parse(text[:at] + text[at + 1] + text[at] + text[at + 2 :]) is None


@given(st.text(max_size=200))
def test_arbitrary_text_is_no_key_and_no_crash(text: str) -> None:
    """Whatever a stranger sends, parsing answers None."""
    assert parse(text) is None


def test_a_new_key_has_the_published_form() -> None:
    """Tier, 16 characters of id, 43 of secret and 6 of checksum, told apart by underscores that occur nowhere else."""
    assert re.fullmatch(r"ten_professional_[a-z2-7]{16}_[0-9A-Za-z]{49}", str(new_api_key("professional")))
    assert re.fullmatch(r"op_[a-z2-7]{16}_[0-9A-Za-z]{49}", str(new_operator_key()))


def test_new_keys_share_nothing() -> None:
    """A thousand keys have a thousand ids and secrets."""
    keys = [new_api_key("free") for _ in range(1000)]
    assert len({key.key_id for key in keys}) == len({key.secret for key in keys}) == 1000


@given(KEYS)
def test_the_documented_expressions_find_every_key_in_a_text(key: ApiKeyText | OperatorKeyText) -> None:
    """A secret scanner that uses docs/credentials.md finds a key's whole text inside any other."""
    page = (Path(__file__).parents[2] / "docs/credentials.md").read_text(encoding="utf-8")
    expressions = re.findall(r"^(?:ten|op)_\[.*$", page, re.MULTILINE)
    assert len(expressions) == 2
    assert any(re.search(expression, f'token = "{key}";')[0] == str(key) for expression in expressions if re.search(expression, str(key)))
