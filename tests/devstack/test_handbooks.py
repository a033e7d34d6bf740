"""The two sample companies' handbooks: what their questions promise is in the documents, and nothing of one is in the other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

HANDBOOKS = Path(__file__).parents[2] / "devstack" / "handbooks"
COMPANIES = ("lumen-bikes", "harbor-dental")
CANARIES = {
    "lumen-bikes": ("Velvet Sprocket", "Depot Kestrel", "LB-7731", "Loose Chain", "Copper Heron", "Quillwheel", "Spindle House", "lumen"),
    "harbor-dental": ("Mooring", "Clinic Breakwater", "HD-2094", "Grey Lantern", "Ebb Note", "Low Water", "Fledgling", "harbor-"),
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question to one company, with what its answer must and must not contain."""

    question: str
    expected_phrases: tuple[str, ...]
    forbidden_phrases: tuple[str, ...]
    source: str


def _documents(company: str) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted((HANDBOOKS / company).glob("*.md"))}


def _questions(company: str) -> list[Question]:
    listed = yaml.safe_load((HANDBOOKS / "questions.yaml").read_text(encoding="utf-8"))[company]
    return [Question(q["question"], tuple(q["expected_phrases"]), tuple(q["forbidden_phrases"]), q["source"]) for q in listed]


def _occurs(phrase: str, text: str) -> bool:
    # Whole words: "8 years" must not be found in "18 years", nor be missed for a line break.
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    return re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE) is not None


@pytest.mark.parametrize("company", COMPANIES)
def test_each_company_has_twelve_documents_of_handbook_length(company: str) -> None:
    """A handbook is twelve Markdown documents of 120 to 350 words, each with one title and some sections."""
    documents = _documents(company)
    assert len(documents) == 12
    for name, text in documents.items():
        assert 120 <= len(text.split()) <= 350, name
        assert re.findall(r"^# .+", text, re.MULTILINE) == [text.splitlines()[0]], name
        assert len(re.findall(r"^## .+", text, re.MULTILINE)) >= 2, name


@pytest.mark.parametrize("company", COMPANIES)
def test_every_expected_phrase_occurs_in_its_source(company: str) -> None:
    """The document a question names contains every phrase its answer must contain."""
    documents = _documents(company)
    for q in _questions(company):
        for phrase in q.expected_phrases:
            assert _occurs(phrase, documents[q.source]), (q.source, phrase)


@pytest.mark.parametrize("company", COMPANIES)
def test_no_forbidden_phrase_occurs_in_the_company_documents(company: str) -> None:
    """A forbidden phrase cannot come from the company's own documents: whoever says it has read the other's."""
    for q in _questions(company):
        for phrase in q.forbidden_phrases:
            assert [name for name, text in _documents(company).items() if _occurs(phrase, text)] == [], phrase


@pytest.mark.parametrize(("company", "other"), [COMPANIES, COMPANIES[::-1]])
def test_every_forbidden_phrase_is_a_fact_of_the_other_company(company: str, other: str) -> None:
    """A forbidden phrase could be said: it stands in the other company's documents."""
    for q in _questions(company):
        for phrase in q.forbidden_phrases:
            assert any(_occurs(phrase, text) for text in _documents(other).values()), phrase


@pytest.mark.parametrize(("company", "other"), [COMPANIES, COMPANIES[::-1]])
def test_canaries_stay_in_their_company(company: str, other: str) -> None:
    """A company's distinctive names stand in its own documents and nowhere in the other's, in any case of letters."""
    own, foreign = "\n".join(_documents(company).values()).lower(), "\n".join(_documents(other).values()).lower()
    for canary in CANARIES[company]:
        assert canary.lower() in own, canary
        assert canary.lower() not in foreign, canary


def test_questions_are_eight_a_company_and_unique() -> None:
    """Each company has eight questions, and no question is asked twice in either list."""
    asked = {company: [q.question for q in _questions(company)] for company in COMPANIES}
    assert [len(questions) for questions in asked.values()] == [8, 8]
    assert len({question for questions in asked.values() for question in questions}) == 16
