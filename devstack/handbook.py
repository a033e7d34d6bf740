"""The two demo companies: who they are, their handbooks and the questions one can ask."""

from dataclasses import dataclass
from pathlib import Path

import yaml

FOLDER = Path(__file__).parent / "handbooks"


@dataclass(frozen=True, slots=True)
class Company:
    """A fictional company on a plan."""

    slug: str
    display_name: str
    plan: str
    owner_email: str
    assistant_name: str


@dataclass(frozen=True, slots=True)
class HandbookQuestion:
    """A question, what its answer must contain, and what it must not (the other company's facts)."""

    question: str
    expected_phrases: tuple[str, ...]
    forbidden_phrases: tuple[str, ...]
    source: str


LUMEN = Company("lumen-bikes", "Lumen Bikes", "free", "owner@lumen-bikes.example.com", "Spoke")
HARBOR = Company("harbor-dental", "Harbor Dental", "professional", "owner@harbor-dental.example.com", "Pearl")
COMPANIES = (LUMEN, HARBOR)


def documents(company: Company) -> list[tuple[str, str, str]]:
    """Returns (key, title, text) of each of a company's documents, in the order of their names."""
    found = []
    for path in sorted((FOLDER / company.slug).glob("*.md")):
        text = path.read_text()
        found.append((path.name, text.splitlines()[0].removeprefix("# ").strip(), text))
    return found


def questions(company: Company) -> list[HandbookQuestion]:
    """Returns the questions one can ask a company's handbook."""
    listed = yaml.safe_load((FOLDER / "questions.yaml").read_text())[company.slug]
    return [
        HandbookQuestion(item["question"], tuple(item["expected_phrases"]), tuple(item["forbidden_phrases"]), item["source"])
        for item in listed
    ]
