"""One mesh, one attacked tenant and one attacker for each round; what the attacked tenant keeps is compared at the end."""

from collections.abc import AsyncIterator

import pytest

from devstack.environment import WITH_POSTGRES, role_dsn
from tests.isolation.credentials_forged import Inside
from tests.isolation.rounds import BRIDGE, MTLS, PGBOUNCER, PLAIN, POOL, ROUNDS, SILO
from tests.isolation.surface import Surface
from tests.isolation.target import Target, plant
from tests.support.mesh import Mesh, running_mesh
from tests.support.pooler import leave_behind, require_pgbouncer


class Planted:
    """One attacked tenant for each kind of place, made when it is first asked for."""

    def __init__(self, mesh: Mesh, surface: Surface) -> None:
        self._mesh = mesh
        self._surface = surface
        self._targets: dict[str, Target] = {}

    async def in_place(self, isolation: str) -> Target:
        """The one that lives there. Behind a pooler a faulty client has just left it on every session there is."""
        if isolation not in self._targets:
            # Sealed in the silo alone: what leaks out of another place must be readable, or nobody would notice.
            self._targets[isolation] = await plant(self._mesh, self._surface, isolation=isolation, sealed=isolation == SILO)
        await self._leave_on_sessions(self._targets[isolation], isolation)
        return self._targets[isolation]

    async def _leave_on_sessions(self, target: Target, isolation: str) -> None:
        wiring = self._mesh.stack.wiring
        if not wiring.pgbouncer:
            return
        left = {"app.tenant_id": str(target.tenant_id)}
        if isolation == BRIDGE:
            left["search_path"] = f"t_{target.tenant_id.hex}"
        for service in sorted(WITH_POSTGRES):
            dsn = role_dsn(self._mesh.stack.state, self._mesh.stack.ports, service, "service", wiring=wiring)
            await leave_behind(dsn, left)


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


@pytest.fixture(scope="session")
def planted(mesh: Mesh, surface: Surface) -> Planted:
    """The attacked tenants of this mesh, by the kind of place they live in."""
    return Planted(mesh, surface)


@pytest.fixture
async def victim(request: pytest.FixtureRequest, planted: Planted) -> Target:
    """The attacked tenant: in a silo and sealed, unless a test or its module names another place."""
    return await planted.in_place(getattr(request, "param", SILO))


@pytest.fixture
async def resident(planted: Planted) -> Target:
    """An attacked tenant of the pool, for attacks that have nothing to do with where content lives."""
    return await planted.in_place(POOL)


@pytest.fixture(scope="session")
async def attacker(mesh: Mesh, surface: Surface) -> Target:
    """A tenant with real credentials and data of its own, and bad intentions."""
    return await plant(mesh, surface)
