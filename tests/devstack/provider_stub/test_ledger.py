"""The ledger file survives what happens to it."""

import asyncio
from pathlib import Path

import pytest

from devstack.provider_stub import ledger as ledger_module
from devstack.provider_stub.ledger import Entry, Ledger, fold


def entry(request_id: str, outcome: str) -> Entry:
    """A line of one token."""
    return Entry(request_id, None, "hash", "model", 1, 0, 0, 0, 0, outcome, "2026-01-01T00:00:00+00:00", None)


async def test_concurrent_calls_share_an_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred calls that wait together cost a few commits, not a hundred."""
    flush = ledger_module._flush
    flushed: list[int] = []

    def counted(file: int) -> None:
        flushed.append(file)
        flush(file)

    monkeypatch.setattr(ledger_module, "_flush", counted)
    ledger = Ledger(tmp_path / "ledger.jsonl")

    async def bill(number: int) -> None:
        ledger.record(entry(str(number), "complete"))
        await ledger.durable()

    async with asyncio.TaskGroup() as calls:
        for number in range(100):
            calls.create_task(bill(number))
    await ledger.close()
    assert len(fold(ledger.path)) == 100
    assert 1 <= len(flushed) <= 3


async def test_a_line_is_written_even_when_nobody_waits_any_more(tmp_path: Path) -> None:
    """A call cancelled while it waits for the disk is billed all the same."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    async with asyncio.TaskGroup() as calls:
        ledger.record(entry("1", "started"))
        waiting = calls.create_task(ledger.durable())
        await asyncio.sleep(0)
        waiting.cancel()
    await ledger.close()
    assert [line["request_id"] for line in fold(ledger.path)] == ["1"]


async def test_a_torn_line_spoils_no_other(tmp_path: Path) -> None:
    """A file that ends inside a line is continued on a new one; the torn one is passed over."""
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"request_id":"0","outc')
    ledger = Ledger(path)
    ledger.record(entry("1", "started"))
    ledger.record(entry("1", "complete"))
    await ledger.close()
    assert [(line["request_id"], line["outcome"]) for line in fold(path)] == [("1", "complete")]


async def test_a_lost_line_stops_the_billing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the disk refused a line, every later call is refused too instead of going unbilled."""

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    ledger = Ledger(tmp_path / "ledger.jsonl")
    monkeypatch.setattr(ledger_module, "_flush", refuse)
    ledger.record(entry("1", "started"))
    with pytest.raises(OSError, match="No space"):
        await ledger.durable()
    monkeypatch.undo()
    ledger.record(entry("2", "started"))
    with pytest.raises(OSError, match="No space"):
        await ledger.close()
