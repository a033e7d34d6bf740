"""Splits a byte stream into the data of its server-sent events. Refuses nothing; comments and other fields are passed over.

Source: WHATWG HTML, server-sent events, interpreting an event stream.
"""

from collections.abc import Iterator


class EventSplitter:
    """Fed bytes as they arrive; an event may be spread over any number of reads."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yields the data of each event that is complete now."""
        buffer = self._rest + chunk
        if b"\r" in buffer:
            # A carriage return at the very end may be half of a pair: it waits for the next read.
            held = b"\r" if buffer.endswith(b"\r") else b""
            buffer = buffer[: len(buffer) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + held
        *events, self._rest = buffer.split(b"\n\n")
        for event in events:
            data = _data(event)
            if data:
                yield data


def _data(event: bytes) -> bytes:
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return lines[0] if len(lines) == 1 else b"\n".join(lines)
