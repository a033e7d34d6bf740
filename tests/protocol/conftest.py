"""One theatre for all runs that are played: a run has a tenant of its own."""

from collections.abc import AsyncIterator

import pytest

from tests.protocol.stage.provider_gate import ProviderGate
from tests.protocol.stage.theatre import Theatre, running_theatre


@pytest.fixture(scope="session")
async def stage() -> AsyncIterator[tuple[Theatre, ProviderGate]]:
    """The theatre, and the gate before its provider."""
    async with running_theatre() as running:
        yield running
