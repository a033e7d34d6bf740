"""Many pieces of text, few messages."""

from __future__ import annotations

import asyncio

import pytest

from services.inference.delta_coalescing import FLUSH_BYTES, DeltaForwarder
from tests.support.steadiness import steadily


class Reader:
    """Collects what is written and can be waited for."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.heard = asyncio.Event()

    async def write(self, text: str) -> None:
        self.written.append(text)
        self.heard.set()

    async def next(self) -> str:
        async with asyncio.timeout(10.0):
            await self.heard.wait()
        self.heard.clear()
        return self.written[-1]


@steadily
async def test_the_first_piece_goes_at_once_and_the_rest_together() -> None:
    """The first text is not held back; what follows within the interval is one message."""
    reader = Reader()
    async with DeltaForwarder(reader.write) as forwarder:
        forwarder.add("Hello")
        assert await reader.next() == "Hello"
        for piece in (" you", " there", "!"):
            forwarder.add(piece)
        assert await reader.next() == " you there!"
    assert reader.written == ["Hello", " you there!"]


@steadily
async def test_a_full_buffer_does_not_wait_for_the_interval() -> None:
    """Two kilobytes are written as soon as they are there."""
    reader = Reader()
    loop = asyncio.get_running_loop()
    async with DeltaForwarder(reader.write) as forwarder:
        forwarder.add("a")
        await reader.next()
        started = loop.time()
        forwarder.add("b" * FLUSH_BYTES)
        await reader.next()
        assert loop.time() - started < 0.02


async def test_text_is_complete_and_in_order_however_it_comes() -> None:
    """Nothing is lost, doubled or reordered, and far fewer messages than pieces are written."""
    reader = Reader()
    pieces = [f"{number} " for number in range(3_000)]
    async with DeltaForwarder(reader.write) as forwarder:
        for number, piece in enumerate(pieces):
            forwarder.add(piece)
            if number % 50 == 0:
                await asyncio.sleep(0)
    assert "".join(reader.written) == "".join(pieces)
    assert len(reader.written) < 60


async def test_a_failed_block_still_writes_what_came_before() -> None:
    """An error that ends the answer does not swallow the text before it."""
    reader = Reader()
    with pytest.raises(ValueError, match="cut"):
        async with DeltaForwarder(reader.write) as forwarder:
            forwarder.add("Hello")
            msg = "cut"
            raise ValueError(msg)
    assert reader.written == ["Hello"]


async def test_a_cancelled_block_writes_no_more() -> None:
    """A reader that is gone is not written to."""
    reader = Reader()

    async def block() -> None:
        async with DeltaForwarder(reader.write) as forwarder:
            forwarder.add("a")
            await reader.next()
            forwarder.add("b")
            await asyncio.Event().wait()

    task = asyncio.get_running_loop().create_task(block())
    await reader.next()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert reader.written == ["a"]


async def test_a_failing_reader_fails_the_block() -> None:
    """An error of the reader is the block's error."""

    async def write(_: str) -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        async with DeltaForwarder(write) as forwarder:
            forwarder.add("a")
