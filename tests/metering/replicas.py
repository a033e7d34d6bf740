"""Further replicas of the service, as processes on the same database: they sweep and fold, and can be killed."""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from devstack.managed_process import ManagedProcess
from devstack.ports import LOOPBACK, free_port
from devstack.stack import is_serving_at
from tests.metering.mesh import Caller, Mesh
from tests.support.waiting import eventually

LEDGER = "mesh.metering.v1.LedgerService"
START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Replica:
    """A process of the service, and two of its callers."""

    process: ManagedProcess
    inference: Caller
    ratelimit: Caller

    async def kill(self) -> None:
        """Ends it with SIGKILL."""
        self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def running_replicas(mesh: Mesh, folder: Path, count: int, **settings: object) -> AsyncIterator[list[Replica]]:
    """Runs that many processes with the mesh's settings but these; all are gone at the end."""
    replicas: list[Replica] = []
    try:
        for number in range(count):
            port = free_port()
            argv = [sys.executable, "-m", "services.metering"]
            environment = environment_of(mesh, port, settings)
            process = ManagedProcess("metering", argv, log_path=folder / f"metering-{number}.log", env=environment)
            replicas.append(Replica(process, Caller("inference", port), Caller("ratelimit", port)))
            await process.start()
        for replica in replicas:
            address = replica.inference.address
            await eventually(lambda address=address: is_serving_at(address, LEDGER), within_seconds=START_SECONDS)  # type: ignore[misc] # bound now
        yield replicas
    finally:
        for replica in replicas:
            for caller in (replica.inference, replica.ratelimit):
                await caller.channel.close()
            if replica.process.exit_code is None:
                await replica.kill()


def environment_of(mesh: Mesh, port: int, settings: dict[str, object]) -> dict[str, str]:
    """The environment of a replica on a port: this process's, with the mesh's settings but these."""
    told = mesh.settings.model_dump() | {"listen_address": f"{LOOPBACK}:{port}", "log_level": "WARNING"} | settings
    texts = {name: value.get_secret_value() if isinstance(value, SecretStr) else str(value) for name, value in told.items()}
    return dict(os.environ) | {f"TENANTRY_{name}".upper(): text for name, text in texts.items()}
