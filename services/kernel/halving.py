"""One bad item among many: a batch that is refused is cut in halves until the item that is refused stands alone. Repeats what it cuts."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

I = TypeVar("I")  # noqa: E741 - input
O = TypeVar("O")  # noqa: E741 - output


async def each_by_halves(
    items: Sequence[I], act: Callable[[Sequence[I]], Awaitable[Sequence[O]]], is_refusal: Callable[[Exception], bool]
) -> list[O | Exception]:
    """Returns for each item what `act` answers, or the refusal it gets alone. `act` must be safe to repeat.

    n refused items among m cost about n·log2(m) calls. Raises: what is no refusal, from whichever part.
    """
    try:
        return list(await act(items))
    except Exception as error:
        if not is_refusal(error):
            raise
        if len(items) == 1:
            return [error]
    middle = len(items) // 2
    return [*await each_by_halves(items[:middle], act, is_refusal), *await each_by_halves(items[middle:], act, is_refusal)]
