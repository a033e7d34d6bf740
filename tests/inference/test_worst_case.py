"""The bound a hold is made from, against everything a prompt can be put together from."""

from hypothesis import given
from hypothesis import strategies as st

from services.inference.prompt_assembly import ASSISTANT, USER, Chunk, Turn, assemble, known_texts, least_bound
from services.inference.worst_case import (
    Price,
    hold_input_tokens,
    input_bound,
    make_hold,
    text_bytes,
)

texts = st.text(max_size=60)
turns = st.builds(Turn, st.sampled_from((USER, ASSISTANT)), texts)
chunks = st.builds(Chunk, st.just("c"), st.just("d"), texts, texts, texts)
questions = st.lists(turns, max_size=4).map(lambda earlier: (*earlier, Turn(USER, "Why & how?")))
budgets = st.integers(0, 400)


@given(
    texts,
    st.lists(turns, max_size=6),
    st.lists(chunks, max_size=6),
    questions,
    st.booleans(),
    budgets,
    budgets,
    budgets,
    st.integers(0, 1500),
)
def test_an_assembled_prompt_never_exceeds_its_hold(
    prompt: str,
    history: list[Turn],
    found: list[Chunk],
    messages: tuple[Turn, ...],
    with_documents: bool,
    prompt_budget: int,
    history_budget: int,
    documents_budget: int,
    cap: int,
) -> None:
    """Whatever is found, remembered and asked, the assembled prompt's bound stays within what was held, or nothing is assembled."""
    found = found if with_documents else []
    hold = hold_input_tokens(
        input_bound(known_texts(messages, with_documents=with_documents)),
        prompt_budget=prompt_budget,
        history_budget=history_budget,
        documents_budget=documents_budget,
        cap=cap,
    )
    assert hold <= cap
    try:
        assembled = assemble(prompt, history, found, messages, with_documents=with_documents, hold=hold)
    except ValueError:
        assert least_bound(prompt, messages, with_documents=with_documents) > hold
        return
    sent = [assembled.system, *(turn.text for turn in assembled.messages)]
    assert sum(len(text.encode()) + 16 for text in sent) + 64 <= assembled.bound <= hold
    assert assembled.messages[-1].text.endswith("Why & how?")
    assert list(assembled.chunks) == found[: len(assembled.chunks)]


@given(st.integers(0, 10_000_000), st.integers(0, 1_000_000), st.integers(0, 10**12), st.integers(0, 10**12), st.data())
def test_a_hold_covers_every_bill_within_it(
    input_tokens: int, output_tokens: int, input_price: int, output_price: int, data: st.DataObject
) -> None:
    """No usage within the held tokens costs more than the held cost, however the ledger rounds each line."""
    hold = make_hold(input_tokens, output_tokens, Price("v", input_price, output_price))
    used_input, used_output = data.draw(st.integers(0, input_tokens)), data.draw(st.integers(0, output_tokens))
    rounded_up = -(-used_input * input_price // 10**6) + -(-used_output * output_price // 10**6)
    assert rounded_up <= hold.cost_nano_usd


@given(st.text())
def test_text_bytes_is_the_length_in_utf8(text: str) -> None:
    """The byte count is that of the UTF-8 form, for ASCII and for everything else."""
    assert text_bytes(text) == len(text.encode())


def test_oldest_history_goes_before_the_lowest_ranked_chunks() -> None:
    """When room is short the oldest turns are dropped first; chunks only when no history is left to drop."""
    history = [Turn(USER, "a" * 100), Turn(ASSISTANT, "b" * 100), Turn(USER, "c" * 100), Turn(ASSISTANT, "d" * 100)]
    found = [Chunk("1", "1", "k", "t", "x" * 100), Chunk("2", "2", "k", "t", "y" * 100)]
    messages = (Turn(USER, "Why?"),)
    least = least_bound("p", messages, with_documents=True)
    half = assemble("p", history, found, messages, with_documents=True, hold=least + 600)
    assert [turn.text[0] for turn in half.messages[:-1]] == ["c", "d"]
    assert len(half.chunks) == 2
    little = assemble("p", history, found, messages, with_documents=True, hold=least + 200)
    assert len(little.messages) == 1
    assert [chunk.chunk_id for chunk in little.chunks] == ["1"]
