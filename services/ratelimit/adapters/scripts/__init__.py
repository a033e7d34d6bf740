"""The Lua scripts, read once: each is the shared heads it needs followed by its own text.

EVALSHA first, the text when the store does not know it.
"""

import re
from dataclasses import dataclass
from hashlib import sha1
from importlib.resources import files

_COUNTING = ("common", "book")
_WAKING = (*_COUNTING, "waiting")
_DECIDING = (*_COUNTING, "deciding")
_HEADS = {
    "reserve": (*_WAKING, "deciding", "turns"),
    "look": _DECIDING,
    "extend": _DECIDING,
    "commit": _WAKING,
    "release": _WAKING,
    "fenced": _WAKING,
    "load": _COUNTING,
    "keep_places": ("common", "waiting"),
    "leave": ("common", "waiting"),
    "take_slice": (*_WAKING, "deciding"),
    "return_slices": _WAKING,
}
_CONSTANTS = re.compile(r"^local ((?:[A-Z][A-Z0-9_]*, )*[A-Z][A-Z0-9_]*) = ((?:\d+, )*\d+)(?: *--.*)?$", re.MULTILINE)
NAMES = (*_HEADS, "renew", "sweep", "begin", "drop", "erase", "export", "guard", "lift_guard")


@dataclass(frozen=True, slots=True)
class Script:
    """A script's text, and the name the store knows it by."""

    name: str
    text: str
    sha: str


def load_script(name: str) -> Script:
    """Reads a script of this package."""
    folder = files(__name__)
    text = "\n".join((folder / f"{part}.lua").read_text("utf-8") for part in (*_HEADS.get(name, ("common",)), name))
    return make_script(name, text)


def with_constants(text: str) -> str:
    """Puts numbers in the place of the names that stand for them.

    Lua 5.1 has no constants: a local that functions use is captured by each of them anew in every run of a script, by a walk through
    all that are captured already. That was a tenth of what a decision under one rule took of the store.
    """
    numbers: dict[str, str] = {}
    for names, values in _CONSTANTS.findall(text):
        numbers.update(zip(names.split(", "), values.split(", "), strict=True))
    # Texts and comments come first: what is in them is nobody's name.
    words = re.compile(r"'[^'\n]*'|--[^\n]*|\b(?:" + "|".join(numbers) + r")\b")
    return words.sub(lambda found: numbers.get(found[0], found[0]), _CONSTANTS.sub("", text))


def make_script(name: str, text: str) -> Script:
    """Names a text as the store will."""
    text = with_constants(text)
    # SHA-1 because that is how Redis names scripts; nothing is secured by it.
    return Script(name, text, sha1(text.encode(), usedforsecurity=False).hexdigest())
