"""A product's process that uses units as fast as it may, and writes down each use that was admitted.

`python -m tests.ratelimit.slice_client ADDRESS SECONDS LOG USER…`; the metadata of its calls is read from standard input, as JSON.
"""

import asyncio
import json
import os
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from mesh.ratelimit.v1.rate_limit_service_pb2_grpc import RateLimitServiceStub
from tenantry.limits import LimitSlices

UNIT = "searches"
_FORM = struct.Struct("<ddqq?")


@dataclass(frozen=True, slots=True)
class AdmittedUse:
    """One use, which happened between two moments of the machine's monotonic clock."""

    after: float
    before: float
    quantity: int
    user: int
    local: bool


def read_log(path: Path) -> Iterator[AdmittedUse]:
    """Every use that was written down whole."""
    data = path.read_bytes()
    for start in range(0, len(data) - _FORM.size + 1, _FORM.size):
        yield AdmittedUse(*_FORM.unpack_from(data, start))


def most_in_any_window(uses: Iterable[AdmittedUse], window_seconds: float) -> int:
    """The most that was surely used within one window of that length."""
    events = sorted(uses, key=lambda use: use.before)
    most = total = 0
    inside: list[AdmittedUse] = []
    for use in events:
        inside.append(use)
        total += use.quantity
        # A window is open at its start: a use exactly as old as it has left it.
        gone = [item for item in inside if item.after <= use.before - window_seconds]
        if gone:
            total -= sum(item.quantity for item in gone)
            inside = [item for item in inside if item.after > use.before - window_seconds]
        most = max(most, total)
    return most


async def use_up(limits: LimitSlices, seconds: float, users: Sequence[str], log: int) -> None:
    """Uses one unit after the other until the time is over."""
    end, turn = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        turn += 1
        user, quantity = turn % len(users), 1 + turn % 3
        after = time.monotonic()
        try:
            answer = await limits.try_use(UNIT, quantity, user=users[user])
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.01)
            continue
        if answer:
            os.write(log, _FORM.pack(after, time.monotonic(), quantity, user, answer.local))
        await asyncio.sleep(0.0005 if answer else 0.005)


async def main(address: str, seconds: str, log: str, *users: str) -> None:
    """Runs four users' loops side by side on one object."""
    metadata = [(key, value) for key, value in json.load(sys.stdin)]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    async with (
        grpc.aio.insecure_channel(address) as channel,
        LimitSlices(RateLimitServiceStub(channel), metadata=metadata) as limits,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(4):
            group.create_task(use_up(limits, float(seconds), users, descriptor))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
