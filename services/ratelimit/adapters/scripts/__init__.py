"""The Lua scripts, read once: each is the shared heads it needs followed by its own text.

EVALSHA first, the text when the store does not know it.
"""

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


def make_script(name: str, text: str) -> Script:
    """Names a text as the store will."""
    # SHA-1 because that is how Redis names scripts; nothing is secured by it.
    return Script(name, text, sha1(text.encode(), usedforsecurity=False).hexdigest())
