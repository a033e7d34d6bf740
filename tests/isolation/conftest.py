"""One mesh, one attacked tenant and one attacker for each round; what the attacked tenant keeps is compared at the end."""

from collections.abc import AsyncIterator

import pytest

from devstack.environment import WITH_POSTGRES, role_dsn
from tests.isolation.credentials_forged import Inside
from tests.isolation.rounds import MTLS, PGBOUNCER, PLAIN, ROUNDS
from tests.isolation.surface import Surface
from tests.isolation.target import Target, plant
from tests.support.mesh import Mesh, running_mesh
from tests.support.pooler import leave_behind, require_pgbouncer


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One round after the other, so that each mesh is started once."""
    own = [(number, item) for number, item in enumerate(items) if _round_of(item) is not None]
    ordered = sorted((item for _, item in own), key=lambda item: ROUNDS.index(str(_round_of(item))))
    for (number, _), item in zip(own, ordered, strict=True):
        items[number] = item


def _round_of(item: pytest.Item) -> str | None:
    parameters = getattr(item, "callspec", None)
    return parameters.params.get("mesh") if parameters is not None else None


@pytest.fixture(scope="session", params=(PLAIN, MTLS))
async def mesh(request: pytest.FixtureRequest) -> AsyncIterator[Mesh]:
    """A mesh for each round; the one before has stopped by then."""
    if request.param == PGBOUNCER:
        require_pgbouncer()
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


@pytest.fixture(scope="session", params=["pool", "bridge", "silo"])
async def victim(request: pytest.FixtureRequest, mesh: Mesh, surface: Surface) -> Target:
    """The attacked tenant, in each kind of place. Behind a pooler a faulty client has left it on every session there is."""
    target = await plant(mesh, surface, isolation=request.param)
    await _leave_on_sessions(mesh, target)
    return target


@pytest.fixture(scope="session")
async def resident(mesh: Mesh, surface: Surface) -> Target:
    """An attacked tenant of the pool, for attacks that have nothing to do with where content lives."""
    target = await plant(mesh, surface)
    await _leave_on_sessions(mesh, target)
    return target


async def _leave_on_sessions(mesh: Mesh, target: Target) -> None:
    wiring = mesh.stack.wiring
    if wiring.pgbouncer:
        for service in sorted(WITH_POSTGRES):
            dsn = role_dsn(mesh.stack.state, mesh.stack.ports, service, "service", wiring=wiring)
            await leave_behind(dsn, {"app.tenant_id": str(target.tenant_id)})


@pytest.fixture(scope="session")
async def attacker(mesh: Mesh, surface: Surface) -> Target:
    """A tenant with real credentials and data of its own, and bad intentions."""
    return await plant(mesh, surface)
