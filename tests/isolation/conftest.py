"""One mesh, one attacked tenant and one attacker for the whole suite; what the attacked tenant keeps is compared at the end."""

from collections.abc import AsyncIterator

import pytest

from tests.isolation.credentials_forged import Inside
from tests.isolation.surface import Surface
from tests.isolation.target import Target, plant
from tests.support.mesh import Mesh


@pytest.fixture(scope="session")
async def surface(mesh: Mesh) -> AsyncIterator[Surface]:
    """Every rpc the mesh serves."""
    found = Surface(mesh.stack.ports)
    await found.discover()
    yield found
    await found.close()


@pytest.fixture(scope="session")
def inside(mesh: Mesh, surface: Surface) -> Inside:
    """What callers inside the mesh hold."""
    return Inside(mesh.stack.state, surface)


@pytest.fixture(scope="session", params=["pool", "bridge", "silo"])
async def victim(request: pytest.FixtureRequest, mesh: Mesh, surface: Surface) -> Target:
    """The attacked tenant, in each kind of place."""
    return await plant(mesh, surface, isolation=request.param)


@pytest.fixture(scope="session")
async def resident(mesh: Mesh, surface: Surface) -> Target:
    """An attacked tenant of the pool, for attacks that have nothing to do with where content lives."""
    return await plant(mesh, surface)


@pytest.fixture(scope="session")
async def attacker(mesh: Mesh, surface: Surface) -> Target:
    """A tenant with real credentials and data of its own, and bad intentions."""
    return await plant(mesh, surface)
