"""A whole mesh of real processes for tests: five services, real stores, the provider stub."""

import contextlib
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import redis.asyncio

from devstack.addresses import Ports
from devstack.environment import PROVIDER_ACCOUNT, Wiring
from devstack.handbook import Company
from devstack.mesh_client import MeshClient
from devstack.provisioning import create_tenant, ingest
from devstack.stack import Stack, certificates_in, running_stack
from devstack.state import DemoTenant
from services.ratelimit.packing import unpacked


@dataclass(frozen=True, slots=True)
class Mesh:
    """A running stack, a client of it, and how to get tenants."""

    stack: Stack
    client: MeshClient

    async def tenant(self, plan: str = "professional", isolation: str = "pool") -> DemoTenant:
        """Makes a tenant of its own for one test: in the pool, or in a bridge or silo."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        company = Company(name, name.title(), plan, f"{name}@example.com", "Tester")
        return await create_tenant(self.stack, self.client, company, isolation=isolation)

    async def another(self, company: Company) -> DemoTenant:
        """Makes a tenant on a demo company's plan and with its handbook, for one test alone."""
        slug = f"{company.slug}-{uuid.uuid4().hex[:12]}"
        tenant = await create_tenant(self.stack, self.client, replace(company, slug=slug))
        await ingest(self.client, company, tenant)
        return tenant

    async def company(self, company: Company) -> DemoTenant:
        """Makes a demo company's tenant, with its handbook, once a mesh."""
        known = self.stack.state.tenants
        if company.slug not in known:
            known[company.slug] = await create_tenant(self.stack, self.client, company)
            await ingest(self.client, company, known[company.slug])
        return known[company.slug]


@contextlib.contextmanager
def state_folder() -> Iterator[Path]:
    """A place for a stack's state, gone at the end. Not pytest's: nobody but its owner passes there, and PostgreSQL refuses to be root."""
    with tempfile.TemporaryDirectory(prefix="tenantry-mesh-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "state"


@contextlib.asynccontextmanager
async def running_mesh(*, trace_sample_ratio: float = 1.0, tls: bool = False, pgbouncer: bool = False) -> AsyncIterator[Mesh]:
    """A mesh on free ports with an empty state, gone at the end; its connections on mutual TLS, or Postgres behind PgBouncer, if told."""
    with state_folder() as state:
        ports = Ports.free()
        wiring = Wiring(certificates_in(state) if tls else None, pgbouncer=pgbouncer)
        async with (
            running_stack(state, ports, trace_sample_ratio=trace_sample_ratio, wiring=wiring) as stack,
            MeshClient.connect(ports, stack.client_leaf) as client,
        ):
            yield Mesh(stack, client)


async def account_use(mesh: Mesh, tenant: DemoTenant) -> tuple[int, int, int]:
    """What the house's account at the provider counts of a tenant's calls: requests, input tokens and output tokens."""
    client = redis.asyncio.from_url(mesh.stack.redis.url)
    packed = await client.hget(f"{{acct:{PROVIDER_ACCOUNT}}}:members", str(tenant.tenant_id))
    await client.aclose()
    member = unpacked(packed) if isinstance(packed, bytes) else (0, ())
    log = cast("tuple[int, ...]", cast("tuple[object, ...]", member)[1])
    return sum(log[1::4]), sum(log[2::4]), sum(log[3::4])
