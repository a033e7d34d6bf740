"""One theatre for all runs that are played: a run has a tenant of its own. Large worlds are explored beside the other tests."""

from collections.abc import AsyncIterator

import pytest

from tests.protocol.ahead import Ahead
from tests.protocol.stage.provider_gate import ProviderGate
from tests.protocol.stage.theatre import Theatre, running_theatre
from tests.protocol.world import Protocol

_AHEAD = pytest.StashKey[Ahead]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """With the first test of the folder begins to explore what the tests that were chosen will ask for."""
    if _AHEAD in item.config.stash:
        return
    item.config.stash[_AHEAD] = ahead = Ahead()
    params = [each.callspec.params for each in item.session.items if isinstance(each, pytest.Function) and hasattr(each, "callspec")]
    ahead.begin(each["world"] for each in params if isinstance(each.get("world"), Protocol))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends what is explored for nobody."""
    if _AHEAD in config.stash:
        config.stash[_AHEAD].close()


@pytest.fixture
def ahead(request: pytest.FixtureRequest) -> Ahead:
    """What explores beside the tests."""
    return request.config.stash[_AHEAD]


@pytest.fixture(scope="session")
async def stage() -> AsyncIterator[tuple[Theatre, ProviderGate]]:
    """The theatre, and the gate before its provider."""
    async with running_theatre() as running:
        yield running
