"""The mesh in small, once a module."""

from collections.abc import AsyncIterator

import pytest

from tests.kernel.mesh import Mesh, running_mesh


@pytest.fixture(scope="module")
async def shared_mesh() -> AsyncIterator[Mesh]:
    """One running server for the module."""
    async with running_mesh() as mesh:
        yield mesh


@pytest.fixture
async def mesh(shared_mesh: Mesh) -> Mesh:
    """The module's server with fresh behaviour."""
    fresh = type(shared_mesh.lifecycle)()
    shared_mesh.lifecycle.provision, shared_mesh.lifecycle.export = fresh.provision, fresh.export
    shared_mesh.resolver.known.clear()
    return shared_mesh
