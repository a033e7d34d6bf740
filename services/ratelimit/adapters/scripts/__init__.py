"""The Lua scripts, read once: each is the shared heads it needs followed by its own text.

EVALSHA first, the text when the store does not know it.
"""

import re
from collections import Counter
from dataclasses import dataclass
from hashlib import sha1
from importlib.resources import files
from textwrap import indent

_COUNTING = ("common", "book")
_WAKING = (*_COUNTING, "waiting")
_DECIDING = (*_COUNTING, "deciding")
_HEADS = {
    "reserve": _DECIDING,
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
# Parts that few demands need, made only for those: what a script names here is a function that defines what they hold.
_LATE = {"reserve": ("stand_in_line", ("waiting", "turns"))}
_FUNCTION = re.compile(r"^local function (\w+)\(.*?^end$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"--[^\n]*")
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
    own = read_part(name)
    parts = [read_part(part) for part in _HEADS.get(name, ("common",))]
    if name in _LATE:
        caller, late = _LATE[name]
        parts.append(made_late(caller, "\n".join(map(read_part, late)), own))
    return make_script(name, without_unused("\n".join((*parts, own))))


def read_part(part: str) -> str:
    """Reads the text of one part."""
    return (files(__name__) / f"{part}.lua").read_text("utf-8")


def without_unused(text: str) -> str:
    """Leaves out the functions of the outermost level that nothing calls.

    Each run of a script makes all of its functions anew, and what they capture: those that it has no use for were a tenth of a decision.
    """
    words, unused = _words(text), list[str]()
    for found in _FUNCTION.finditer(text):
        if words[found[1]] == _words(found[0])[found[1]]:
            unused.append(found[0])
    for function in unused:
        text = text.replace(function, "", 1)
    # Those that only these called are unused now.
    return without_unused(text) if unused else text


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", _COMMENT.sub("", text)))


def made_late(caller: str, text: str, used_in: str) -> str:
    """Makes the functions of a text when `caller` is called; until then those that `used_in` names are nothing."""
    words = set(re.findall(r"\w+", used_in))
    names = [found[1] for found in _FUNCTION.finditer(text) if found[1] in words]
    inner = re.sub(rf"^local function (?=(?:{'|'.join(names)})\()", "function ", text, flags=re.MULTILINE)
    return f"local {', '.join(names)}\nlocal function {caller}()\n{indent(inner, '  ')}\nend\n"


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
