"""The texts of the scripts as the store gets them."""

import re

import pytest

from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.adapters.scripts import NAMES, load_script, made_late, with_constants, without_unused


def test_a_name_of_a_number_is_the_number_wherever_it_is_a_name() -> None:
    """Texts of commands, comments, longer names and lines stay as they are."""
    text = "local TIME, COST = 17, 3 -- of what\nlocal t = call('TIME')[TIME] + R_COST -- the caller's COST\nreturn t + COST"
    assert with_constants(text) == "\nlocal t = call('TIME')[17] + R_COST -- the caller's COST\nreturn t + 3"


def test_what_is_no_number_stays_a_local() -> None:
    """A constant that is computed, or a text, is not put in anybody's place."""
    text = "local SUM = 2 ^ 52\nlocal WAKES = 'wakes'\nlocal ONE = 1\nreturn SUM, WAKES, ONE"
    assert with_constants(text) == "local SUM = 2 ^ 52\nlocal WAKES = 'wakes'\n\nreturn SUM, WAKES, 1"


_CALLS = """local function fourth()
  return 4
end
local function third()
  return 3
end
local function second() -- not fourth()
  return third() or second()
end
local function first()
  return 1
end
return first()"""


def test_functions_that_nothing_calls_are_left_out() -> None:
    """Also those that only such a one calls, or that call themselves; what a comment names is not called by it."""
    assert without_unused(_CALLS) == "\n\n\nlocal function first()\n  return 1\nend\nreturn first()"


async def test_late_functions_are_nothing_until_they_are_made(link: PipelinedLink) -> None:
    """And are those of one call then, with what they hold between them."""
    part = "local held = 0\nlocal function inner()\n  held = held + 1\nend\nlocal function more()\n  inner()\n  return held\nend\n"
    own = "local before = more == nil\nmake()\nreturn { before and 1 or 0, more(), more() }"
    text = made_late("make", part, own)
    assert text.startswith("local more\n")
    assert await link.send("EVAL", text + own, 0) == [1, 1, 2]


def test_a_hold_makes_no_functions_of_those_who_wait() -> None:
    """What only who stands in line needs is defined within the function that makes it."""
    text = load_script("reserve").text
    assert "\nlocal function stand_in_line()\n" in text
    assert "\n  local function ticket_of(" in text
    assert "\nlocal function ticket_of(" not in text


@pytest.mark.parametrize("name", NAMES)
def test_no_script_changes_what_stands_for_a_number(name: str) -> None:
    """Nothing is assigned to a number, and no table has a field of that name."""
    assert not re.search(r"^\s*(local )?\d+(, \d+)* = |\.\d+ =|\d = \d", load_script(name).text, re.MULTILINE)
