"""Answers say what the context says, name where it stands, and nothing else."""

from devstack.provider_stub.answer import Document, Prompt, answer, stem

REFUNDS = Document(
    "Refund policy", "Refunds are paid within 14 days of the return. Gift cards cannot be refunded.\n- Our office is in Graz."
)
SHIPPING = Document("Shipping guide", "Parcels leave the warehouse on Mondays. Shipping to Norway takes nine days.")


def test_answer_quotes_the_sentence_that_answers_and_names_its_document() -> None:
    """The best sentence wins, whatever document it stands in."""
    asked = Prompt("How long does shipping to Norway take?", (REFUNDS, SHIPPING))
    assert answer(asked) == "According to [Shipping guide]: Shipping to Norway takes nine days."


def test_answer_matches_words_across_their_inflections() -> None:
    """A refund asked about is found where refunds are spoken of."""
    assert "within 14 days" in answer(Prompt("When do you pay the refund for returned goods?", (SHIPPING, REFUNDS)))
    assert stem("policies") == stem("policy")
    assert stem("shipped") == stem("shipping") == stem("ship")


def test_answer_from_two_documents_names_both() -> None:
    """Sentences that match equally well are both given, each with its source."""
    one, two = Document("A", "The blue valve opens at noon."), Document("B", "The blue valve closes at night.")
    said = answer(Prompt("What does the blue valve do?", (one, two)))
    assert said == "According to [A]: The blue valve opens at noon. [B] adds: The blue valve closes at night."


def test_documents_without_an_answer_are_named_and_nothing_is_made_up() -> None:
    """A question the documents do not touch gets no sentence of theirs."""
    said = answer(Prompt("Who painted the ceiling?", (REFUNDS, SHIPPING)))
    assert "[Refund policy] and [Shipping guide]" in said
    assert "Norway" not in said
    assert "14 days" not in said


def test_without_documents_it_says_so_and_reflects_the_question() -> None:
    """No document is ever pretended."""
    assert answer(Prompt("When are refunds paid?")) == "I have no documents to answer from. You asked: “When are refunds paid?”"


def test_earlier_turns_are_remembered() -> None:
    """What the user said before is context; what the user asked before is not a fact."""
    said = answer(Prompt("What is my dog called?", earlier=("My dog is called Rex.", "What was my dog called?")))
    assert said == "I have no documents to answer from. Earlier you said: My dog is called Rex."


def test_a_fact_from_the_conversation_beats_documents_that_do_not_know_it() -> None:
    """Documents and conversation compete on how well they match."""
    said = answer(Prompt("What is my order number?", (SHIPPING,), ("My order number is 4711.",)))
    assert said == "Earlier you said: My order number is 4711."


def test_the_system_prompt_answers_when_nothing_else_does() -> None:
    """Instructions are context of last resort."""
    said = answer(Prompt("Which company is this?", instructions="You work for the company Acme. Be brief."))
    assert said.endswith("My instructions say: You work for the company Acme.")


def test_no_quoted_sentence_is_longer_than_the_limit() -> None:
    """A document without full stops is not quoted whole."""
    endless = Document("Log", "valve " * 2000)
    assert len(answer(Prompt("valve?", (endless,)))) < 1400
