"""Reads a request the way the model does: which parts are documents, which is the question, what was said before."""

import html
import re
from collections.abc import Iterable

from devstack.provider_stub.answer import Document, Prompt
from devstack.provider_stub.messages import Block, MessagesRequest

CLOSING = "</document>"
_OPENING = re.compile(r"<document\b([^>]*)>")
_TITLE = re.compile(r"""\b(title|id)\s*=\s*("([^"]*)"|'([^']*)')""")
_WRAPPER = re.compile(r"</?(?:documents|question|context|instructions)\b[^>]*>")


def read(request: MessagesRequest) -> Prompt:
    """Return the question and everything it may be answered from."""
    documents: list[Document] = []
    instructions = _text(request.system, documents)
    turns: list[str] = []
    for message in request.messages:
        text = _text(message.blocks, documents)
        if message.role == "system":
            instructions = f"{instructions}\n{text}"
        elif message.role == "user" and text:
            turns.append(text)
    return Prompt(turns[-1] if turns else "", tuple(documents), tuple(turns[:-1]), instructions)


def _text(blocks: Iterable[Block], documents: list[Document]) -> str:
    said: list[str] = []
    for block in blocks:
        if block.kind == "text":
            said.append(_without_documents(block.text, documents))
        elif block.kind in ("document", "search_result", "tool_result"):
            documents.append(Document(block.title or block.kind.replace("_", " "), block.text))
    return "\n".join(text for text in said if text)


def _without_documents(text: str, documents: list[Document]) -> str:
    if "<" not in text:
        return text.strip()
    kept: list[str] = []
    position = 0
    while opened := _OPENING.search(text, position):
        end = text.find(CLOSING, opened.end())
        if end < 0:
            break
        kept.append(text[position : opened.start()])
        documents.append(Document(_title(opened[1], len(documents)), html.unescape(text[opened.end() : end]).strip()))
        position = end + len(CLOSING)
    kept.append(text[position:])
    return _WRAPPER.sub("", "".join(kept)).strip()


def _title(attributes: str, position: int) -> str:
    named = {match[1]: html.unescape(match[3] or match[4] or "") for match in _TITLE.finditer(attributes)}
    return named.get("title") or named.get("id") or f"document {position + 1}"
