"""How many tokens a text has at most, by how dense each model's texts were so far. A guess that is never taken for a fact.

Never below what was seen, and never above the byte bound, which is the answer for a model of which nothing was seen.
"""

from collections import OrderedDict

from services.inference.worst_case import MESSAGE_OVERHEAD_TOKENS

# Texts of one model differ: its densest so far may be passed by a quarter.
SAFETY_PERCENT = 125
CAPACITY = 1_000
_SCALE = 1_000_000


class TokenDensities:
    """The running maximum of tokens in a million bytes, by model, the least recently seen forgotten first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._densest: OrderedDict[str, int] = OrderedDict()

    def bound(self, model: str, byte_count: int, least_percent: int = 0) -> int:
        """Returns the most tokens to expect of so many bytes; `least_percent` of the bytes at least."""
        densest = self._densest.get(model)
        if densest is None:
            return byte_count
        tokens = MESSAGE_OVERHEAD_TOKENS - (-byte_count * densest * SAFETY_PERCENT // (100 * _SCALE))
        return min(byte_count, max(tokens, -(-byte_count * least_percent // 100)))

    def seen(self, model: str, byte_count: int, tokens: int) -> None:
        """Learns from a text whose tokens the provider has counted."""
        # The first few tokens are the wrapping's: a text of one word says nothing about density.
        beyond = tokens - MESSAGE_OVERHEAD_TOKENS
        density = min(_SCALE, -(-beyond * _SCALE // byte_count)) if beyond > 0 and byte_count > 0 else 0
        self._densest[model] = max(self._densest.get(model, 0), density)
        self._densest.move_to_end(model)
        if len(self._densest) > self._capacity:
            self._densest.popitem(last=False)
