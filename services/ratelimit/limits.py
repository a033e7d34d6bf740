"""What is asked of the limits: the size of a call or the units of a consumption, and whom it serves. Knows no time and no store."""

from dataclasses import dataclass

from services.kernel.errors import InvalidRequest
from services.kernel.hot_value import hot_value


@hot_value
class Amounts:
    """What a call needs at most, or used: 0–10^7 tokens, 0–10^15 nano-USD."""

    tokens: int
    cost_nano_usd: int


NOTHING = Amounts(0, 0)


@hot_value
class Subject:
    """Whom of the tenant a call serves; empty: nobody in particular."""

    user: str = ""
    feature: str = ""


NOBODY = Subject()


# In characters, as every contract that names them has it.
_LONGEST_USER, _LONGEST_FEATURE = 200, 100


class UnkeepableName(InvalidRequest):
    """A user or feature whose name the ledger could not keep."""


def subject_of(user: str, feature: str) -> Subject:
    """Whom a request serves. Raises: UnkeepableName, before anything is held for it."""
    if "\x00" in user or "\x00" in feature:
        raise UnkeepableName("user" if "\x00" in user else "feature", "must not contain NUL characters")
    if len(user) > _LONGEST_USER:
        raise UnkeepableName("user", f"must be at most {_LONGEST_USER} characters")
    if len(feature) > _LONGEST_FEATURE:
        raise UnkeepableName("feature", f"must be at most {_LONGEST_FEATURE} characters")
    return Subject(user, feature)


@dataclass(frozen=True, slots=True)
class Shortening:
    """How a call may be made shorter: its output tokens, the fewest of use, and nano-USD for 10^6 of them."""

    max_output_tokens: int
    min_output_tokens: int
    output_nano_usd_per_million: int


@hot_value
class Demand:
    """All that one decision is about. `attempt` from 2 on is a retry; 0 asks for a product's units instead of a call."""

    amounts: Amounts = NOTHING
    attempt: int = 1
    quantity: int = 0
    shortening: Shortening | None = None
