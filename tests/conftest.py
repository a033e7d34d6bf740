"""What every test may ask for: real stores, started once a session and only when wanted."""

from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer

from tests.support.mesh import Mesh, running_mesh
from tests.support.sharing_out import Schedule, longest_first
from tests.support.stores import PostgresStore, RedisStore, running_postgres, running_redis

# What an example proves does not depend on the pace of a machine that has other things to do.
settings.register_profile("at-any-pace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("at-any-pace")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first."""
    longest_first(items)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Schedule:
    """Shares a run in several processes out as the tests need it."""
    # The order of the tests is that in which they shall begin.
    config.option.loadscopereorder = False
    return Schedule(config, log)


@pytest.fixture(scope="session")
async def postgres() -> AsyncIterator[PostgresStore]:
    """A real PostgreSQL."""
    async with running_postgres() as store:
        yield store


@pytest.fixture(scope="session")
async def redis_server() -> AsyncIterator[RedisStore]:
    """A real Redis."""
    async with running_redis() as store:
        yield store


@pytest.fixture(scope="session")
async def mesh() -> AsyncIterator[Mesh]:
    """A whole running mesh. Tests make tenants of their own and leave its processes alone."""
    async with running_mesh() as running:
        yield running
