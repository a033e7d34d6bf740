"""What a request may order the provider to do wrong, and the two ways to order it: `x-stub-*` headers and `[[stub: …]]` in the question.

Refuses an order it does not know, so that a misspelt fault cannot pass for a provider that works.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from devstack.provider_stub.errors import ApiError, invalid

OUTPUT_TOKENS_MAX = 200_000
ERROR_STATUSES = frozenset({400, 401, 403, 404, 413, 429, 500, 529})
NUMBERS = ("error", "retry_after", "overload_after", "cut_after", "stall_after", "latency_ms", "token_ms", "output_tokens", "notice_ms")
SWITCH = "ignore_max_tokens"
RETRY_AFTER_DEFAULT_SECONDS = 1
_HEADERS = {f"x-stub-{name.replace('_', '-')}": name for name in (*NUMBERS, SWITCH)}
_DIRECTIVE = re.compile(r"\[\[stub:([^\]]*)\]\]")


class Ending(Enum):
    """How a generation ends."""

    COMPLETE = "complete"
    OVERLOADED = "overloaded"
    CUT = "cut"
    STALLED = "stalled"


@dataclass(frozen=True, slots=True)
class Faults:
    """The orders of one request; `…_after` count output tokens, None means never."""

    error: int | None = None
    retry_after: int | None = None
    overload_after: int | None = None
    cut_after: int | None = None
    stall_after: int | None = None
    latency_ms: int = 0
    token_ms: int = 0
    output_tokens: int | None = None
    notice_ms: int = 0
    ignore_max_tokens: bool = False

    def refusal(self) -> ApiError | None:
        """Return the error ordered instead of an answer, if any."""
        if self.error is None:
            return None
        seconds = self.retry_after if self.retry_after is not None or self.error != 429 else RETRY_AFTER_DEFAULT_SECONDS
        return ApiError(self.error, headers={} if seconds is None else {"retry-after": str(seconds)})

    def ending(self, token_count: int) -> tuple[Ending, int]:
        """Return how an answer of this many tokens ends and after which of them; an order past the end fires at the end."""
        orders = ((Ending.OVERLOADED, self.overload_after), (Ending.CUT, self.cut_after), (Ending.STALLED, self.stall_after))
        given = [(min(after, token_count), ending) for ending, after in orders if after is not None]
        if not given:
            return Ending.COMPLETE, token_count
        after, ending = min(given, key=lambda order: order[0])
        return ending, after

    def written_unnoticed(self, left: int) -> int:
        """Return how many of the tokens left are generated between a client's leaving and its being noticed: all of them without a pace."""
        if not self.notice_ms:
            return 0
        return min(left, self.notice_ms // self.token_ms) if self.token_ms else left


NO_FAULTS = Faults()


def split_question(question: str) -> tuple[str, dict[str, str]]:
    """Return the question without its directives, and the orders they hold."""
    if "[[stub:" not in question:
        return question, {}
    orders: dict[str, str] = {}
    for body in _DIRECTIVE.findall(question):
        for word in body.replace(",", " ").split():
            name, _, value = word.partition("=")
            orders[name] = value
    return _DIRECTIVE.sub("", question).strip(), orders


def header_orders(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the orders a request's headers hold."""
    return {name: headers[header] for header, name in _HEADERS.items() if header in headers}


def parse(orders: Mapping[str, str]) -> Faults:
    """Return the faults ordered. Raises: ApiError 400 for an unknown order or a value that is not a whole number."""
    if not orders:
        return NO_FAULTS
    _known(orders)
    numbers = {name: _number(name, orders[name]) for name in NUMBERS if name in orders}
    if "error" in numbers and numbers["error"] not in ERROR_STATUSES:
        raise invalid(f"stub: error must be one of {sorted(ERROR_STATUSES)}")
    if numbers.get("output_tokens", 0) > OUTPUT_TOKENS_MAX:
        raise invalid(f"stub: output_tokens must be at most {OUTPUT_TOKENS_MAX}")
    return Faults(
        error=numbers.get("error"),
        retry_after=numbers.get("retry_after"),
        overload_after=numbers.get("overload_after"),
        cut_after=numbers.get("cut_after"),
        stall_after=numbers.get("stall_after"),
        latency_ms=numbers.get("latency_ms", 0),
        token_ms=numbers.get("token_ms", 0),
        output_tokens=numbers.get("output_tokens"),
        notice_ms=numbers.get("notice_ms", 0),
        ignore_max_tokens=SWITCH in orders and orders[SWITCH].lower() not in ("0", "false"),
    )


def _known(names: Iterable[str]) -> None:
    for name in names:
        if name not in NUMBERS and name != SWITCH:
            raise invalid(f"stub: unknown order {name!r}; known are {', '.join((*NUMBERS, SWITCH))}")


def _number(name: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) <= 9):
        raise invalid(f"stub: {name} must be a whole number, got {value!r}")
    return int(value)
