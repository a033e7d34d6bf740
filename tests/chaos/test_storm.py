"""A minute of chaos: a part of a loaded mesh is killed every other second, and afterwards every ledger agrees to the token."""

import json

import pytest

from tests.chaos.chances import PARTS, deaths, orders
from tests.chaos.storm import Storm, run

SEED = 7401
SECONDS = 60.0
# What must be there within 10 s of the last restart may take longer where the machine is busy with other things.
SETTLE_SECONDS = 60.0


def test_everything_random_follows_from_the_seed() -> None:
    """The same seed kills the same parts and makes the same calls, another one others; of a hundred deaths each part has some."""
    drawn = [[next(source) for _ in range(100)] for source in (deaths(SEED), deaths(SEED), deaths(SEED + 1))]
    asked = [[next(source) for _ in range(100)] for source in (orders(SEED, 0, 0), orders(SEED, 0, 0), orders(SEED, 0, 1))]
    assert drawn[0] == drawn[1] != drawn[2]
    assert asked[0] == asked[1] != asked[2]
    assert {death.part for death in drawn[0]} == set(PARTS)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_all_ledgers_agree_after_a_minute_of_deaths() -> None:
    """Services, stores and provider killed under load: settled and unresolved are what the provider billed, and no hold is left over."""
    told = await run(Storm(SEED, SECONDS, SETTLE_SECONDS))
    print(json.dumps(told))  # noqa: T201 - how much was proven
    assert told["differences"] == []
    assert told["settled"] > 0
    assert told["unresolved"] > 0
    assert len(told["kills"]) > 1
