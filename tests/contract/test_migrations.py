"""Migrations leave the release before them running: nothing it calls is dropped from under its replicas."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.test_house import statements

ROOT = Path(__file__).parents[2]
# The last files written before the rule: in these, functions were dropped and made again.
BEFORE_THE_RULE = {
    "inference/migrations": 5,
    "metering/migrations": 6,
    "retrieval/migrations": 4,
    "tenant/migrations": 10,
    "tenant/key_store_migrations": 1,
}
COMMENT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
DROP = re.compile(r"\bDROP\s+(?:FUNCTION|ROUTINE|PROCEDURE)\s+(?:IF\s+EXISTS\s+)?([^;]+)", re.IGNORECASE)
RENAME = re.compile(
    r"\bALTER\s+(?:FUNCTION|ROUTINE|PROCEDURE)\s+([^;]+?)\s+(?:RENAME\s+TO|SET\s+SCHEMA)\b"
    r"|\bDROP\s+(?:SCHEMA|TYPE)\b[^;]*\bCASCADE\b",
    re.IGNORECASE,
)
RETIRED = re.compile(r"^-- Retired since (\d+\.\d+\.\d+): \S.*\n\s*$", re.MULTILINE)
RELEASED = re.compile(r"^## \[(\d+\.\d+\.\d+)\]", re.MULTILINE)


def migrations() -> Iterator[Path]:
    """Every migration written under the rule."""
    for folder, last in BEFORE_THE_RULE.items():
        for path in sorted((ROOT / "services" / folder).glob("*.sql")):
            if int(path.name[:4]) > last:
                yield path


def problems(sql: str, released: set[str], calls: str) -> list[str]:
    """What in a migration's text takes away what the release before it may call; `calls` is every statement of the code."""
    # Comments become blanks of the same length, so that a place in one text is the same place in the other.
    bare = COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), sql)
    found = [f"{' '.join(match[0].split())}: keep it beside the new one" for match in RENAME.finditer(bare)]
    for match in DROP.finditer(bare):
        named = " ".join(match[1].split())
        note = list(RETIRED.finditer(sql[: match.start()]))
        if not note or note[-1].end() != match.start():
            found.append(f"{named}: no line before it says since which release nothing calls it")
        elif note[-1][1] not in released:
            found.append(f"{named}: {note[-1][1]} is no released version")
        elif re.search(rf"\b{re.escape(named.partition('(')[0].strip())}\(", calls):
            found.append(f"{named}: the code calls it")
    return found


def released_versions() -> set[str]:
    """The versions that the changelog lists as released."""
    return set(RELEASED.findall((ROOT / "CHANGELOG.md").read_text()))


@pytest.mark.parametrize("path", list(migrations()), ids=lambda path: f"{path.parts[-3]}/{path.name}")
def test_no_function_is_dropped_that_the_release_before_calls(path: Path) -> None:
    """A migration drops or renames no function unless it says since which release nothing calls it, and that is so."""
    assert problems(path.read_text(), released_versions(), "\n".join(statements().values())) == []


def test_every_folder_of_migrations_is_held_to_the_rule() -> None:
    """A new service's migrations are looked at like any other's."""
    folders = {"/".join(path.parts[-3:-1]) for path in (ROOT / "services").glob("*/*migrations/*.sql")}
    assert folders == set(BEFORE_THE_RULE)


DROPS = "DROP FUNCTION tenant.old(uuid);"
REFUSED = {
    "a bare drop": (DROPS, "no line before it"),
    "a drop with a condition": (f"SELECT 1;\n{DROPS.replace('FUNCTION', 'FUNCTION IF EXISTS')}", "no line before it"),
    "lower case over two lines": ("drop function\n  tenant.old(uuid)\n;", "no line before it"),
    "a routine": (DROPS.replace("FUNCTION", "ROUTINE"), "no line before it"),
    "a version that is not released": (f"-- Retired since 0.9.0: tenant.newer(uuid) is called instead.\n{DROPS}", "no released version"),
    "a line that is not the one before": (f"-- Retired since 0.2.0: tenant.newer(uuid) is called instead.\nSELECT 1;\n{DROPS}", "no line"),
    "a second drop under one line": (
        f"-- Retired since 0.2.0: tenant.newer(uuid).\n{DROPS}\nDROP FUNCTION tenant.other(uuid);",
        "tenant.other",
    ),
    "a function still called": ("-- Retired since 0.2.0: nothing.\nDROP FUNCTION tenant.called(uuid);", "the code calls it"),
    "a drop in a block": ("DO $$ BEGIN EXECUTE 'DROP FUNCTION tenant.old(uuid)'; END $$;", "no line before it"),
    "a new name": ("ALTER FUNCTION tenant.old(uuid) RENAME TO older;", "keep it beside"),
    "a type with all that use it": ("DROP TYPE tenant.facts CASCADE;", "keep it beside"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_lint_finds_what_takes_a_function_away(case: str) -> None:
    """However a drop is written, it is found, and the finding says what is missing."""
    sql, said = REFUSED[case]
    found = problems(sql, {"0.1.0", "0.2.0"}, "SELECT tenant.called($1)")
    assert len(found) == 1
    assert said in found[0]


def test_a_retired_function_may_go() -> None:
    """With the line, a released version and no caller, a function is dropped; a comment that mentions a drop is none."""
    retired = f"-- Was: DROP FUNCTION x.\n-- Retired since 0.2.0: tenant.newer(uuid) is called instead.\n{DROPS}\n"
    assert problems(retired, {"0.2.0"}, "SELECT tenant.older($1), tenant.called($1)") == []
    assert problems("CREATE OR REPLACE FUNCTION tenant.old(p uuid) RETURNS void AS $$ $$;\nDROP TABLE x;", set(), "") == []
