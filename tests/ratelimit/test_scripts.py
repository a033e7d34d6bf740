"""The texts of the scripts as the store gets them."""

import re

import pytest

from services.ratelimit.adapters.scripts import NAMES, load_script, with_constants


def test_a_name_of_a_number_is_the_number_wherever_it_is_a_name() -> None:
    """Texts of commands, comments, longer names and lines stay as they are."""
    text = "local TIME, COST = 17, 3 -- of what\nlocal t = call('TIME')[TIME] + R_COST -- the caller's COST\nreturn t + COST"
    assert with_constants(text) == "\nlocal t = call('TIME')[17] + R_COST -- the caller's COST\nreturn t + 3"


def test_what_is_no_number_stays_a_local() -> None:
    """A constant that is computed, or a text, is not put in anybody's place."""
    text = "local SUM = 2 ^ 52\nlocal WAKES = 'wakes'\nlocal ONE = 1\nreturn SUM, WAKES, ONE"
    assert with_constants(text) == "local SUM = 2 ^ 52\nlocal WAKES = 'wakes'\n\nreturn SUM, WAKES, 1"


@pytest.mark.parametrize("name", NAMES)
def test_no_script_changes_what_stands_for_a_number(name: str) -> None:
    """Nothing is assigned to a number, and no table has a field of that name."""
    assert not re.search(r"^\s*(local )?\d+(, \d+)* = |\.\d+ =|\d = \d", load_script(name).text, re.MULTILINE)
