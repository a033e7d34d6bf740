"""Which of a service's migrations says a thing last: an edit of what a later one says anew, or takes away, takes no wall down.

Functions and views go by name alone: where a later file adds an overload, that one is what is called from then on.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.isolation.mutations import Edit

Thing = tuple[str, ...]
"""A kind and names; the table comes first where there is one."""

_QUOTED = r"'(?:[^']|'')*'"
_TOKEN = re.compile(rf"\$(\w*)\$.*?\$\1\$|{_QUOTED}|--[^\n]*|;", re.DOTALL)
_LOOP = re.compile(r"FOREACH \w+ IN ARRAY ARRAY\[(.*?)\] LOOP (.*?) END LOOP")
_FORMATTED = re.compile(rf"EXECUTE format\( ?((?:{_QUOTED} ?)+)")

_NAME = r"(?!IF |ONLY |CONCURRENTLY )(?:\w+\.)?([%\w]+)"
_KIND = r"(FUNCTION|PROCEDURE|VIEW|INDEX)"
_MADE = re.compile(rf"(?:CREATE (?:OR REPLACE )?(?:UNIQUE )?|ALTER ){_KIND} {_NAME}")
_INDEX = re.compile(rf"CREATE (?:UNIQUE )?INDEX {_NAME} ON {_NAME}")
_TABLE = re.compile(rf"CREATE TABLE {_NAME}")
_ON_TABLE = re.compile(rf"(?:CREATE (?:OR REPLACE )?|ALTER |DROP )(POLICY|TRIGGER) (?:IF EXISTS )?{_NAME} .*?\bON {_NAME}")
_DROPPED = re.compile(rf"DROP (?:{_KIND}|TABLE) (?:IF EXISTS )?(.+?)(?: CASCADE| RESTRICT)?$")
_ALTERED = re.compile(rf"ALTER TABLE {_NAME} (.+)")
_SECURED = re.compile(r"(ENABLE|DISABLE|(?:NO )?FORCE) ROW LEVEL SECURITY")
_SWITCHED = re.compile(rf"(?:ENABLE|DISABLE) (?:ALWAYS |REPLICA )?TRIGGER (?!ALL|USER){_NAME}")
_CONSTRAINED = re.compile(rf"(?:ADD|DROP) CONSTRAINT (?:IF EXISTS )?{_NAME}")
_RESHAPED = re.compile(r"DROP CONSTRAINT|DROP COLUMN|ALTER COLUMN")
_RIGHT = re.compile(r"(GRANT|REVOKE) (.+?) ON (.+?) (?:TO|FROM) (.+)")
_PRIVILEGE = re.compile(r"\w+(?: \([^)]*\))?")
_EVERYTHING = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER", "EXECUTE")
_PLAIN = re.compile(r"(?:INSERT|UPDATE|DELETE|SELECT|LOCK TABLE|CREATE TYPE) |ALTER TABLE \S+ (?:ADD COLUMN|SET \()")
_WALL = re.compile(r"\b(?:ALTER|DROP|REPLACE|FUNCTION|VIEW|INDEX|POLICY|TRIGGER|GRANT|REVOKE)\b", re.IGNORECASE)
_ARGUMENTS = re.compile(r"\([^)]*\)")


def superseded(root: Path, edit: Edit) -> str:
    """Tells why the edit of a migration changes nothing in the end; empty when it does change something, or edits no migration."""
    path = root / edit.path
    if path.suffix != ".sql":
        return ""
    text = path.read_text()
    before, after = definitions(text), definitions(text.replace(edit.find, edit.put))
    changed = {thing for thing in before.keys() | after.keys() if before.get(thing) != after.get(thing)}
    if not changed:
        return f"{edit.path}: the edit is of no statement that is known here"
    for later in sorted((other for other in path.parent.glob("*.sql") if other.name > path.name), reverse=True):
        newer = definitions(later.read_text())
        for thing in sorted(changed):
            if any(other in newer for other in (thing, ("TABLE", thing[1]), _everywhere(thing))):
                return f"{edit.path}: {later.name} has the last word on {' '.join(thing)}"
    return ""


def _everywhere(thing: Thing) -> Thing:
    """The right to all tables or functions that a right is part of."""
    return ("RIGHT", "FUNCTIONS" if "EXECUTE" in thing else "TABLES", *thing[2:]) if thing[0] == "RIGHT" else thing


def definitions(sql: str) -> Mapping[Thing, list[str]]:
    """What the file makes, changes or drops, each with the text that does."""
    found = defaultdict[Thing, list[str]](list)
    for statement in _statements(sql):
        for text in _in_loops(statement) if statement.startswith("DO ") else (statement,):
            for thing, said in _things(text):
                found[thing].append(said)
    return found


def not_understood(sql: str) -> list[str]:
    """The statements that could say something anew in words that are not known here."""
    return [
        text
        for text in _statements(sql)
        if not any(_things(text)) and not _PLAIN.match(text) and (not text.startswith("DO ") or _WALL.search(_LOOP.sub(_unread, text)))
    ]


def _unread(loop: re.Match[str]) -> str:
    return _FORMATTED.sub("", loop[2])


def _statements(sql: str) -> Iterator[str]:
    """The statements, each on one line and without the comments between them; what is quoted is no end of one."""
    kept, at = "", 0
    for token in _TOKEN.finditer(sql):
        kept, at = kept + sql[at : token.start()], token.end()
        if token[0] == ";":
            yield " ".join(kept.split())
            kept = ""
        elif not token[0].startswith("--"):
            kept += token[0]


def _in_loops(block: str) -> Iterator[str]:
    """The statements that a block executes for every name of a list."""
    for names, body in _LOOP.findall(block):
        for literals in _FORMATTED.findall(body):
            text = "".join(re.findall(_QUOTED, literals)).replace("''", "\0").replace("'", "").replace("\0", "'")
            yield from (text.replace("%I", name) for name in re.findall(r"'(\w+)'", names))


def _things(text: str) -> Iterator[tuple[Thing, str]]:
    if made := _MADE.match(text):
        yield made.groups(), text
    if index := _INDEX.match(text):
        yield ("INDEX OF", index[2], index[1]), text
    if table := _TABLE.match(text):
        yield ("SHAPE", table[1]), text
    if on_table := _ON_TABLE.match(text):
        yield (on_table[1], on_table[3], on_table[2]), text
    if dropped := _DROPPED.match(text):
        for name in _names(dropped[2]):
            yield (dropped[1] or "TABLE", name), text
    if altered := _ALTERED.match(text):
        yield from _alterations(altered[1], altered[2])
    if right := _RIGHT.match(text):
        for privilege in _EVERYTHING if right[2] == "ALL" else _PRIVILEGE.findall(right[2]):
            yield from ((("RIGHT", name, privilege, role), right[1]) for name in _names(right[3]) for role in right[4].split(", "))


def _alterations(table: str, actions: str) -> Iterator[tuple[Thing, str]]:
    """A constraint that stands in the table's own statement may have no name there: whatever reshapes the table may be of it."""
    for secured in _SECURED.findall(actions):
        yield ("ROW LEVEL SECURITY", table, "FORCE" if "FORCE" in secured else "ENABLE"), secured
    for trigger in _SWITCHED.findall(actions):
        yield ("TRIGGER", table, trigger), actions
    for constraint in _CONSTRAINED.findall(actions):
        yield ("CONSTRAINT", table, constraint), actions
    if _RESHAPED.search(actions):
        yield ("SHAPE", table), actions


def _names(listed: str) -> list[str]:
    """Names without schemas and arguments; of ALL TABLES IN SCHEMA it is TABLES."""
    return [name.partition(" IN SCHEMA ")[0].split()[-1].rpartition(".")[2] for name in _ARGUMENTS.sub("", listed).split(", ")]
