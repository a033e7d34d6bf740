"""A refused batch is cut until the refused items stand alone; every other item gets its answer."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kernel.halving import each_by_halves


class Refused(Exception):
    """What the one bad item is answered."""


@given(st.lists(st.booleans(), min_size=1, max_size=70))
async def test_each_item_gets_its_own_answer(bad: list[bool]) -> None:
    """Whatever items are refused, they alone are, in their places; and one among two hundred costs a handful of calls, not two hundred."""
    calls = list[int]()

    async def act(items: Sequence[int]) -> Sequence[int]:
        calls.append(len(items))
        if any(bad[item] for item in items):
            raise Refused
        return [item * 2 for item in items]

    found = await each_by_halves(range(len(bad)), act, lambda error: isinstance(error, Refused))
    assert [isinstance(item, Refused) if is_bad else item for item, is_bad in zip(found, bad, strict=True)] == [
        True if is_bad else index * 2 for index, is_bad in enumerate(bad)
    ]
    assert len(calls) <= 1 + 2 * sum(bad) * (len(bad).bit_length() + 1)


async def test_what_is_no_refusal_is_raised() -> None:
    """A failure that says nothing of the items is not looked for among them."""
    calls = list[int]()

    async def act(items: Sequence[int]) -> Sequence[int]:
        calls.append(len(items))
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await each_by_halves(range(8), act, lambda error: isinstance(error, Refused))
    assert calls == [8]
