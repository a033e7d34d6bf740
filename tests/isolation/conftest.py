"""One mesh, one attacked tenant and one attacker for each round; what the attacked tenant keeps is compared at the end."""

from collections.abc import AsyncIterator

import pytest

from devstack.pgbouncer import find_pgbouncer
from tests.isolation.credentials_forged import Inside
from tests.isolation.rounds import MTLS, PGBOUNCER, PLAIN
from tests.isolation.surface import Surface
from tests.isolation.target import Target, plant
from tests.support.mesh import Mesh, running_mesh


@pytest.fixture(scope="session", params=(PLAIN, MTLS))
async def mesh(request: pytest.FixtureRequest) -> AsyncIterator[Mesh]:
    """A mesh for each round; the one before has stopped by then."""
    if request.param == PGBOUNCER and find_pgbouncer() is None:
        pytest.skip("pgbouncer is not installed (on Debian: apt install pgbouncer): nothing is attacked through it")
    async with running_mesh(tls=request.param == MTLS, pgbouncer=request.param == PGBOUNCER) as running:
        yield running


@pytest.fixture(scope="session")
async def surface(mesh: Mesh) -> AsyncIterator[Surface]:
    """Every rpc the mesh serves."""
    found = Surface(mesh.stack)
    await found.discover()
    yield found
    await found.close()


@pytest.fixture(scope="session")
def inside(mesh: Mesh, surface: Surface) -> Inside:
    """What callers inside the mesh hold."""
    return Inside(mesh.stack.state, surface)


@pytest.fixture(scope="session")
async def victim(mesh: Mesh, surface: Surface) -> Target:
    """The attacked tenant."""
    return await plant(mesh, surface)


@pytest.fixture(scope="session")
async def attacker(mesh: Mesh, surface: Surface) -> Target:
    """A tenant with real credentials and data of its own, and bad intentions."""
    return await plant(mesh, surface)
