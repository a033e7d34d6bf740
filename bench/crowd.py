"""Tenant services side by side, each on a database with another number of tenants in it, on one Postgres."""

import contextlib
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path

import asyncpg

from devstack.addresses import Ports
from devstack.embedded_postgres import EmbeddedPostgres
from devstack.environment import DATABASE, KEY_DATABASE, Provider, service_environment
from devstack.managed_process import ManagedProcess, ProcessFailedError
from devstack.ports import LOOPBACK, free_port
from devstack.stack import HEALTH_SERVICE_NAMES, SERVICE_READY_SECONDS, is_serving_at
from devstack.state import StackState
from services.tenant.api_key import new_api_key
from services.tenant.scopes import TENANT_SCOPES

PLAN = "professional"
# Everything a tenant has once it is made. The keys of these rows are nobody's: what callers use is added by `_add_keys`.
FILL = (
    """
    INSERT INTO tenant.tenants (tenant_id, slug, display_name, plan, region, state)
    SELECT uuidv7(), 'bench-' || n, 'Tenant ' || n, $2, 'local', 'ACTIVE' FROM generate_series(1, $1::integer) n
    """,
    "INSERT INTO tenant.tenant_settings (tenant_id, assistant_name) SELECT tenant_id, 'Ada' FROM tenant.tenants",
    "INSERT INTO tenant.users (tenant_id, email, role) SELECT tenant_id, slug || '@bench.example.com', 'OWNER' FROM tenant.tenants",
    """
    INSERT INTO tenant.api_keys (tenant_id, key_id, secret_sha256, display_name, scopes)
    SELECT tenant_id, left(md5(slug), 16), sha256(slug::bytea), 'nobody''s', '{tenant:read}' FROM tenant.tenants
    """,
    """
    INSERT INTO tenant.provisioning (tenant_id, request_id, content_digest, steps_done, first_key_id)
    SELECT t.tenant_id, gen_random_uuid(), sha256(t.slug::bytea), 9, k.key_id
    FROM tenant.tenants t JOIN tenant.api_keys k ON k.tenant_id = t.tenant_id
    """,
    "INSERT INTO tenant.slug_directory (slug, tenant_id) SELECT slug, tenant_id FROM tenant.tenants",
    "INSERT INTO tenant.api_key_directory (key_id, tenant_id) SELECT key_id, tenant_id FROM tenant.api_keys",
    "INSERT INTO tenant.request_directory (request_id, tenant_id) SELECT request_id, tenant_id FROM tenant.provisioning",
)
SOME_TENANTS = "SELECT tenant_id FROM tenant.tenants ORDER BY random() LIMIT $1"
# Used before: the very first use of a key is a durable write, and it is made once in a key's life.
ADD_KEY = """
INSERT INTO tenant.api_keys (tenant_id, key_id, secret_sha256, display_name, scopes, last_use_time) VALUES ($1, $2, $3, 'bench', $4, now())
"""
ADD_KEY_ENTRY = "INSERT INTO tenant.api_key_directory (tenant_id, key_id) VALUES ($1, $2)"
SESSIONS = "SELECT pid FROM pg_stat_activity WHERE datname = ANY($1) AND usename ~ '^tenant' AND pid <> pg_backend_pid() ORDER BY pid"


def process_cpu_seconds(pid: int) -> float:
    """CPU seconds of another process so far, nan when it has ended; to the nanosecond: what /proc tells comes in hundredths of a second."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return nan


@dataclass(slots=True)
class Crowd:
    """One tenant service and its database."""

    tenant_count: int
    address: str
    process: ManagedProcess
    admin: asyncpg.Connection
    databases: Sequence[str]
    keys: Sequence[str]
    load_seconds: float
    sessions: list[int] = field(default_factory=list)

    async def find_sessions(self) -> bool:
        """Notes which processes of Postgres serve this service now; tells whether they are the same as before."""
        before, self.sessions = self.sessions, [row["pid"] for row in await self.admin.fetch(SESSIONS, self.databases)]
        return before == self.sessions

    def cpu_seconds(self) -> float:
        """CPU seconds of the service and of its sessions at Postgres so far."""
        return sum(map(process_cpu_seconds, (self.process.pid, *self.sessions)))


@contextlib.asynccontextmanager
async def crowds(folder: Path, sizes: Sequence[int], key_count: int) -> AsyncIterator[tuple[StackState, list[Crowd]]]:
    """Starts Postgres and, for each size, makes a database, fills it and starts a tenant service on it; all of it is stopped at the end."""
    state, ports = StackState.open(folder), Ports.free()
    postgres = EmbeddedPostgres(
        folder / "postgres", port=ports.postgres, password=state.secrets.postgres_password, log_path=state.log_path("postgres")
    )
    async with contextlib.AsyncExitStack() as closing:
        await postgres.start()
        closing.push_async_callback(postgres.stop)
        started = [await _start(closing, postgres, state, ports, size, key_count) for size in sizes]
        # What loading left behind is written before anything is measured.
        await started[0].admin.execute("CHECKPOINT")
        yield state, started


async def _start(
    closing: contextlib.AsyncExitStack, postgres: EmbeddedPostgres, state: StackState, ports: Ports, size: int, key_count: int
) -> Crowd:
    database, address = f"tenants_{size}", f"{LOOPBACK}:{free_port()}"
    names = {DATABASE: database, KEY_DATABASE: f"{database}_keys"}
    plain = service_environment("tenant", state, ports, Provider.choose(state, ports), trace_sample_ratio=0.0)
    environment = {key: _moved(value, names) for key, value in plain.items()} | {"TENANTRY_LISTEN_ADDRESS": address}
    admin = await asyncpg.connect(postgres.dsn())
    for name in names.values():
        await admin.execute(f"CREATE DATABASE {name}")
    await admin.close()
    migration = _process("migrate", database, state, environment)
    await migration.start()
    if await migration.wait() != 0:
        raise ProcessFailedError(f"the migration failed: {migration.last_log_line()}")
    admin = await asyncpg.connect(postgres.dsn(database))
    closing.push_async_callback(admin.close)
    began = time.monotonic()
    keys = await _fill(admin, size, key_count)
    loaded = time.monotonic() - began
    process = _process("serve", database, state, environment)
    await process.start()
    closing.push_async_callback(process.stop)
    await process.wait_ready(lambda: is_serving_at(address, HEALTH_SERVICE_NAMES["tenant"]), timeout_seconds=SERVICE_READY_SECONDS)
    return Crowd(size, address, process, admin, list(names.values()), keys, loaded)


def _moved(value: str, names: dict[str, str]) -> str:
    server, slash, name = value.rpartition("/")
    return f"{server}{slash}{names.get(name, name)}" if server.startswith("postgresql:") else value


def _process(command: str, database: str, state: StackState, environment: dict[str, str]) -> ManagedProcess:
    name = f"tenant-{command}-{database}"
    return ManagedProcess(name, [sys.executable, "-m", "services.tenant", command], log_path=state.log_path(name), env=environment)


async def _fill(admin: asyncpg.Connection, tenant_count: int, key_count: int) -> list[str]:
    async with admin.transaction():
        for number, sql in enumerate(FILL):
            await admin.execute(sql, *((tenant_count, PLAN) if number == 0 else ()))
        keys = await _add_keys(admin, key_count)
    await admin.execute("VACUUM (ANALYZE)")
    return keys


async def _add_keys(admin: asyncpg.Connection, key_count: int) -> list[str]:
    owners = [row["tenant_id"] for row in await admin.fetch(SOME_TENANTS, key_count)]
    keys = [(owners[number % len(owners)], new_api_key(PLAN)) for number in range(key_count)]
    scopes = sorted(TENANT_SCOPES)
    await admin.executemany(ADD_KEY, [(owner, key.key_id, key.secret_sha256(), scopes) for owner, key in keys])
    await admin.executemany(ADD_KEY_ENTRY, [(owner, key.key_id) for owner, key in keys])
    return [str(key) for _, key in keys]
