"""A timed test is repeated for a machine that stood still, and for nothing else."""

import time

import pytest

from tests.support import steadiness
from tests.support.steadiness import TRIES, steadily


async def test_a_failure_while_the_process_had_no_turn_is_tried_again() -> None:
    """The first attempt stands still and fails, the second one passes."""
    attempts: list[int] = []

    @steadily
    async def test() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            time.sleep(0.3)  # noqa: ASYNC251 # nothing else may run
            raise AssertionError

    await test()
    assert len(attempts) == 2


async def test_a_failure_at_a_steady_pace_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not repeated."""
    monkeypatch.setattr(steadiness, "STOOD_STILL_SECONDS", 60.0)
    attempts: list[int] = []

    @steadily
    async def test() -> None:
        attempts.append(1)
        raise AssertionError

    with pytest.raises(AssertionError):
        await test()
    assert len(attempts) == 1


async def test_what_fails_each_time_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """However still the machine stands."""
    monkeypatch.setattr(steadiness, "STOOD_STILL_SECONDS", -1.0)
    attempts: list[int] = []

    @steadily
    async def test() -> None:
        attempts.append(1)
        raise AssertionError

    with pytest.raises(AssertionError):
        await test()
    assert len(attempts) == TRIES
