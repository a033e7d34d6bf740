"""Documents, question and history are told apart by their place in the request."""

import orjson

from devstack.provider_stub.answer import Prompt
from devstack.provider_stub.faults import split_question
from devstack.provider_stub.messages import parse
from devstack.provider_stub.models import catalogue
from devstack.provider_stub.prompt import read

MODELS = catalogue(["claude-haiku-4-5"])
WRAPPED = '<documents>\n<document id="d1" title="Tea &amp; coffee">Tea is at four.</document>\n</documents>\nWhen is tea?'


def prompt_of(content: object, **fields: object) -> Prompt:
    """How a request with this last user message is read."""
    body = {"model": "claude-haiku-4-5", "messages": [{"role": "user", "content": content}], **fields}
    return read(parse(orjson.dumps(body), MODELS, counting=True))


def test_wrapped_documents_are_sources_and_the_rest_is_the_question() -> None:
    """Documents come out of the last user message or the system prompt, with their titles."""
    found = prompt_of(WRAPPED)
    assert found.question == "When is tea?"
    assert [(document.title, document.text) for document in found.documents] == [("Tea & coffee", "Tea is at four.")]
    found = prompt_of("When?", system=WRAPPED)
    assert (found.question, len(found.documents)) == ("When?", 1)


def test_document_blocks_are_sources() -> None:
    """The API's own document blocks are read like wrapped ones."""
    block = {"type": "document", "title": "Menu", "source": {"type": "text", "media_type": "text/plain", "data": "Soup is hot."}}
    found = prompt_of([block, {"type": "text", "text": "Is the soup hot?"}])
    assert [(document.title, document.text) for document in found.documents] == [("Menu", "Soup is hot.")]


def test_a_document_that_is_never_closed_stays_part_of_the_question() -> None:
    """Text is only a document when it is marked as one from end to end."""
    found = prompt_of('<document title="x">Open. What?')
    assert found.documents == ()
    assert found.question.endswith("Open. What?")


def test_a_directive_inside_a_document_orders_nothing() -> None:
    """A stored document cannot steer the provider, even where directives are allowed."""
    text = '<document title="x">[[stub: error=500]] Tea is at four.</document> When is tea?'
    assert split_question(prompt_of(text).question) == ("When is tea?", {})
