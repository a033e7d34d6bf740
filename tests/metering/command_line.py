"""`tenantctl` as people run it: the installed script, in a process of its own, with its credential in the environment."""

import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.metering.mesh import Mesh, Tenant
from tests.metering.peers import OPERATOR

TENANTCTL = Path(sys.executable).parent / "tenantctl"
SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def environment(**credentials: str) -> dict[str, str]:
    """The environment of the tests without credentials, and with these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TENANTRY_")}
    return kept | credentials


async def run(*arguments: str, **credentials: str) -> Ended:
    """Runs the script to its end."""
    process = await asyncio.create_subprocess_exec(
        str(TENANTCTL), *arguments, env=environment(**credentials), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(SECONDS):
        out, err = await process.communicate()
    return Ended(process.returncode or 0, out.decode(), err.decode())


async def as_tenant(mesh: Mesh, tenant: Tenant, *arguments: str) -> Ended:
    """Runs it with the tenant's key."""
    return await run(f"--address={mesh.inference.address}", *arguments, TENANTRY_API_KEY=f"key-{tenant.id}")


async def as_operator(mesh: Mesh, tenant: Tenant | None, *arguments: str) -> Ended:
    """Runs it with an operator's key, for one tenant or for none."""
    named = [f"--tenant={tenant.id}"] if tenant is not None else []
    return await run(f"--address={mesh.inference.address}", "--reason=audit", *named, *arguments, TENANTRY_OPERATOR_KEY=OPERATOR)
