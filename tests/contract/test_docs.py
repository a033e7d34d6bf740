"""What the pages promise: every dependency has its row, every link leads somewhere, nothing was left to fill in."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_OURS = {"node_modules", "dist", "build"}
CODE_BLOCK = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(<?([^)\s>]+)>?\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
ELSEWHERE = re.compile(r"^[a-z][a-z0-9+.-]*:|^//")
MASK_AS_TEXT = re.compile(r'"update_?[mM]ask": *"')
UNFILLED = re.compile(r"<!-- *(?:transcript|contact|guarantees)")
DEPENDENCY_ROW = re.compile(r"^\| ([A-Za-z0-9._-]+)(?: \(extra `[^`]+`\))? \| ([^ |]+) \|", re.MULTILINE)
REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]+\])?==([^ ;]+)$")


def pages() -> Iterator[Path]:
    """Every Markdown file of the repository; folders with a dot are caches and what tools installed."""
    for path in sorted(ROOT.rglob("*.md")):
        folders = path.relative_to(ROOT).parts[:-1]
        if not any(folder.startswith(".") or folder in NOT_OURS for folder in folders):
            yield path


def name_of(path: Path) -> str:
    """The page's path from the root, for a test's name."""
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """The page without its code, in which brackets are no links and a `#` is no heading."""
    return CODE_BLOCK.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """The fragments that a page's headings can be reached by: lower case, without punctuation, hyphens for blanks."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(prose(path))}


def broken_link(page: Path, link: str) -> bool:
    """Tells whether a relative link leads to nothing: to no file of the repository, or to no heading of its page."""
    target, _, fragment = link.partition("#")
    path = (page.parent / target).resolve() if target else page
    if not path.is_relative_to(ROOT) or not path.exists():
        return True
    return bool(fragment) and path.suffix == ".md" and fragment not in anchors(path)


@pytest.mark.parametrize("page", list(pages()), ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    """A link inside the repository names a file that is there, and a heading that the page has."""
    links = LINK.findall(CODE.sub("", prose(page)))
    assert [link for link in links if not ELSEWHERE.match(link) and broken_link(page, link)] == []


@pytest.mark.parametrize("page", list(pages()), ids=name_of)
def test_no_page_waits_to_be_filled_in(page: Path) -> None:
    """No marker of a transcript, an address or a table stands where the text should be."""
    assert UNFILLED.findall(page.read_text(encoding="utf-8")) == []


def declared() -> dict[str, str]:
    """Every direct dependency of pyproject.toml, of the product and of each extra, with its version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, str] = {}
    for requirement in (*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)):
        match = REQUIREMENT.match(requirement)
        assert match, f"{requirement} is not pinned to one version"
        found[match[1]] = match[2]
    return found


def test_the_dependencies_page_lists_exactly_what_is_depended_on() -> None:
    """Each direct dependency has one row with its pinned version, and no row is of anything else."""
    page = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    rows = [row for row in DEPENDENCY_ROW.findall(page) if row != ("package", "version")]
    assert dict(rows) == declared()
    assert len(rows) == len(dict(rows))


def test_every_guarantee_names_a_test_file_that_is_there() -> None:
    """Each row under `What holds` cites test files by their paths below tests/, and each of them exists."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## What holds\n")[2].partition("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("| ") and not row.startswith("| guarantee ")]
    assert len(rows) >= 20
    for row in rows:
        cited = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", row.rsplit(" | ", 1)[-1])
        assert cited, row
        for shown, path in cited:
            assert path == f"tests/{shown}", row
            assert (ROOT / path).is_file(), row


@pytest.mark.parametrize("page", list(pages()), ids=name_of)
def test_a_mask_is_written_as_grpcurl_reads_it(page: Path) -> None:
    """A field mask is for grpcurl the message it is, with `paths`: it refuses the text that JSON has for it elsewhere."""
    assert MASK_AS_TEXT.findall(page.read_text(encoding="utf-8")) == []
