"""Extractive question answering: the sentences of the given context that best match the question, with their sources named.

Pure and deterministic. Says only what the context says; without documents it says so and falls back on what the user said before.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import nsmallest

SENTENCES_MAX = 3
SENTENCE_CHARACTERS_MAX = 400
REMEMBERED_CHARACTERS_MAX = 8_000
RUNNER_UP_RATIO = 0.6
TITLE_WEIGHT = 0.5
LONG_SENTENCE_STEMS = 50
REFLECTION_CHARACTERS_MAX = 240
_WORD = re.compile(r"\w+")
STOP_WORDS = frozenset(
    _WORD.findall(
        "a about according all also am an and any are as at be been but by can could did do does for from had has have he her him his how "
        "i if in into is it its may me more much my no not of on or our please she should so some tell than that the their them then there "
        "these they this to us was we were what when where which who whom whose why will with would you your"
    )
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\s*\n+\s*")
_BULLET = re.compile(r"^(?:[-*#>•]+|\d+[.)])\s+")
_LONG_CHUNK = re.compile(rf".{{1,{SENTENCE_CHARACTERS_MAX}}}(?:\s|$)|\S{{{SENTENCE_CHARACTERS_MAX}}}")
_SUFFIXES = ("ies", "ing", "ed", "ly", "es", "s")


@dataclass(frozen=True, slots=True)
class Document:
    """A source the answer may quote."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """All an answer is made from; `earlier` are the user's turns before the question, oldest first."""

    question: str
    documents: tuple[Document, ...] = ()
    earlier: tuple[str, ...] = ()
    instructions: str = ""


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence and the stems it is found by."""

    text: str
    stems: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Scored:
    score: float
    source: str
    text: str


def answer(prompt: Prompt) -> str:
    """Return the answer to the prompt's question."""
    wanted = stems(prompt.question)
    said = [sentence for turn in prompt.earlier for sentence in sentences(turn) if not sentence.text.endswith("?")]
    recalled = _best(wanted, [("", sentence) for sentence in said], {})
    if not prompt.documents:
        return _without_documents(prompt, wanted, recalled)
    found = _quoted(wanted, prompt.documents)
    if found and (not recalled or recalled[0].score <= found[0].score):
        return _with_sources(found)
    if recalled:
        return _recall(recalled)
    titles = " and ".join(dict.fromkeys(f"[{document.title}]" for document in prompt.documents))
    return f"I looked in {titles}, and nothing there answers the question: “{_shorten(prompt.question)}”"


def stems(text: str) -> frozenset[str]:
    """Return the words of the text that carry meaning, in lower case and without English endings."""
    return frozenset(stem(word) for word in _WORD.findall(text.lower()) if word not in STOP_WORDS)


@lru_cache(maxsize=16_384)
def stem(word: str) -> str:
    """Return a word in lower case without its inflection: policies → polic, policy → polic, shipped → ship."""
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word[: -len(suffix)]
            break
    if len(word) > 4 and word[-1] == word[-2] and word[-1] not in "aeiouls":
        word = word[:-1]
    return word[:-1] if len(word) > 4 and word[-1] in "ey" else word


def sentences(text: str) -> tuple[Sentence, ...]:
    """Return the text's sentences in order, none longer than 400 characters."""
    return _remembered(text) if len(text) <= REMEMBERED_CHARACTERS_MAX else _split(text)


def _split(text: str) -> tuple[Sentence, ...]:
    found: list[Sentence] = []
    for part in _SENTENCE_END.split(text):
        # A heading names what follows; quoted by itself it says nothing.
        if part.lstrip().startswith("#"):
            continue
        bare = _BULLET.sub("", part.strip())
        chunks = [bare] if len(bare) <= SENTENCE_CHARACTERS_MAX else [chunk.strip() for chunk in _LONG_CHUNK.findall(bare)]
        found += [Sentence(chunk, stems(chunk)) for chunk in chunks if chunk]
    return tuple(found)


# The same passages are retrieved again and again; long texts are not kept, or the memory would follow the largest request.
_remembered = lru_cache(maxsize=512)(_split)


def _quoted(wanted: frozenset[str], documents: Iterable[Document]) -> list[_Scored]:
    named = {document.title: wanted & stems(document.title) for document in documents}
    return _best(wanted, [(document.title, sentence) for document in documents for sentence in sentences(document.text)], named)


def _best(wanted: frozenset[str], candidates: Sequence[tuple[str, Sentence]], named: Mapping[str, frozenset[str]]) -> list[_Scored]:
    if not candidates:
        return []
    # A title alone never carries a sentence: it would quote the whole document for any question that names it.
    matches = [
        (order, source, sentence, sentence.stems & wanted)
        for order, (source, sentence) in enumerate(candidates)
        if not sentence.stems.isdisjoint(wanted)
    ]
    frequency = Counter(word for _, _, _, matched in matches for word in matched)
    weight = {word: math.log(1 + len(candidates) / count) for word, count in frequency.items()}
    bonus = {source: TITLE_WEIGHT * math.fsum(weight.get(word, 1.0) for word in words) for source, words in named.items()}
    totals = ((order, source, sentence, sum([weight[word] for word in matched])) for order, source, sentence, matched in matches)
    # Plain tuples: of all that match, three at most become values.
    ranked = nsmallest(
        SENTENCES_MAX,
        (
            (-(total + bonus.get(source, 0.0)) / (1 + len(sentence.stems) / LONG_SENTENCE_STEMS), order, source, sentence)
            for order, source, sentence, total in totals
        ),
    )
    return [_Scored(-rank, source, sentence.text) for rank, _, source, sentence in ranked if rank <= RUNNER_UP_RATIO * ranked[0][0]]


def _with_sources(found: Iterable[_Scored]) -> str:
    by_source: dict[str, list[str]] = {}
    for item in found:
        quoted = by_source.setdefault(item.source, [])
        if item.text not in quoted:
            quoted.append(item.text)
    parts = [" ".join(_ended(text) for text in texts) for texts in by_source.values()]
    openings = ["According to [{}]: ", *["[{}] adds: "] * (len(by_source) - 1)]
    return " ".join(opening.format(title) + part for opening, title, part in zip(openings, by_source, parts, strict=True))


def _without_documents(prompt: Prompt, wanted: frozenset[str], recalled: Sequence[_Scored]) -> str:
    opening = "I have no documents to answer from."
    if recalled:
        return f"{opening} {_recall(recalled)}"
    told = _best(wanted, [("", sentence) for sentence in sentences(prompt.instructions)], {})
    if told:
        return f"{opening} My instructions say: {_ended(told[0].text)}"
    asked = f"{opening} You asked: “{_shorten(prompt.question)}”" if prompt.question else opening
    return f"{asked} Before that you wrote: “{_shorten(prompt.earlier[-1])}”" if prompt.earlier else asked


def _recall(recalled: Sequence[_Scored]) -> str:
    return "Earlier you said: " + " ".join(_ended(item.text) for item in recalled)


def _ended(text: str) -> str:
    return text if text[-1] in ".!?:”" else text + "."


def _shorten(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= REFLECTION_CHARACTERS_MAX else flat[: REFLECTION_CHARACTERS_MAX - 1] + "…"
