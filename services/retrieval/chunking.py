"""Cuts a document into chunks along its own structure: headings first, then paragraphs, then sentences. Pure.

A chunk is a stretch of the document's text, so that a citation can point at it by offsets.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# About 225 tokens of English: several chunks fit a small plan's context, and one still holds a whole thought.
TARGET_CHARACTERS = 900

_HEADING = re.compile(r"^#{1,6}\s", re.MULTILINE)
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of a document: `text` equals the document's characters from `start` to `end`, exclusive; never blank."""

    index: int
    start: int
    end: int
    text: str


def cut(text: str, target_characters: int = TARGET_CHARACTERS) -> list[Chunk]:
    """Returns the chunks of a text in order. They do not overlap, lose only white space, and stay within `target_characters`."""
    pieces = _merged(_sections(text), text, target_characters)
    return [Chunk(index, start, end, text[start:end]) for index, (start, end) in enumerate(pieces)]


def _sections(text: str) -> Iterator[tuple[int, int]]:
    starts = sorted({0, *(match.start() for match in _HEADING.finditer(text))})
    yield from zip(starts, [*starts[1:], len(text)], strict=True)


def _merged(sections: Iterator[tuple[int, int]], text: str, target: int) -> Iterator[tuple[int, int]]:
    for section_start, section_end in sections:
        start = end = section_start
        for piece_start, piece_end in _split(text, section_start, section_end, target):
            if piece_end - start > target and end > start:
                yield from _trimmed(text, start, end)
                start = piece_start
            end = piece_end
        yield from _trimmed(text, start, end)


def _split(text: str, start: int, end: int, target: int) -> Iterator[tuple[int, int]]:
    for paragraph_start, paragraph_end in _between(_PARAGRAPH_END, text, start, end):
        if paragraph_end - paragraph_start <= target:
            yield paragraph_start, paragraph_end
            continue
        for sentence_start, sentence_end in _between(_SENTENCE_END, text, paragraph_start, paragraph_end):
            for cut_start in range(sentence_start, sentence_end, target):
                yield cut_start, min(cut_start + target, sentence_end)


def _between(boundary: re.Pattern[str], text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    piece_start = start
    for match in boundary.finditer(text, start, end):
        yield piece_start, match.end()
        piece_start = match.end()
    if piece_start < end:
        yield piece_start, end


def _trimmed(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    if start < end:
        yield start, end
