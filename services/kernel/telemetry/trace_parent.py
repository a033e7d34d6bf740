"""The W3C `traceparent` of a call, as text: parsed once, passed on unchanged when no span is made. Source: W3C Trace Context §3.2."""

import random
import re
from dataclasses import dataclass

_PATTERN = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_ZERO_TRACE = "0" * 32
_ZERO_SPAN = "0" * 16
# Ids of traces must be unlike, not secret; the operating system's generator costs a system call each.
_random = random.SystemRandom().getrandbits(128)
_generator = random.Random(_random)  # noqa: S311 - not secret


@dataclass(frozen=True, slots=True)
class TraceParent:
    """A trace id (32 hex), a span id (16 hex) and whether the trace is sampled."""

    trace_id: str
    span_id: str
    sampled: bool

    @property
    def header(self) -> str:
        """The value of `traceparent`."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


def parse_trace_parent(value: str) -> TraceParent | None:
    """Reads a header; None for a malformed one, which W3C says to treat as absent."""
    match = _PATTERN.fullmatch(value)
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest) or trace_id == _ZERO_TRACE or span_id == _ZERO_SPAN:
        return None
    return TraceParent(trace_id, span_id, bool(int(flags, 16) & 1))


def new_trace_parent(*, sampled: bool = False) -> TraceParent:
    """Begins a trace for a call that came without one, so that its logs and errors can still be found together."""
    return TraceParent(f"{_generator.getrandbits(128) | 1:032x}", f"{_generator.getrandbits(64) | 1:016x}", sampled)
