"""The tenant service is killed at every step of a creation and an erasure, right before and after its commit, and started again."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import grpc
import pytest
from pydantic import SecretStr

from devstack.ports import answers, free_port
from mesh.tenant.v1 import placement_service_pb2, placement_service_pb2_grpc, tenant_service_pb2
from services.kernel.errors import MeshError
from services.kernel.ids import TenantId
from services.tenant.api_key import new_operator_key
from services.tenant.app import migrate_schema
from services.tenant.context_minting import PROVISIONING_SUBJECT, ContextMinter, Grant, read_signing_key
from services.tenant.erasure import ERASE_ORDER, EraseStep
from services.tenant.provisioning import ORDER, Step
from services.tenant.settings import TenantSettings
from services.tenant.tenant_record import TenantFacts, TenantState
from tests.support.stores import PostgresStore
from tests.support.waiting import eventually
from tests.tenant.harness import PEERS, Harness, as_service, call, running_peer, settings_for, taken_apart, wish, with_key

SAGA_STATE = "SELECT state FROM tenant.sagas WHERE request_id = $1"
PATIENCE_SECONDS = 40.0


@dataclass
class Mortal:
    """A tenant service in a process of its own, and everything to look at what it left."""

    harness: Harness
    environment: dict[str, str]
    death_wish: Path
    port: int
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Starts the process and returns when it listens."""
        if self.process is not None and self.process.returncode is None:
            return
        log = (self.death_wish.parent / "tenant.log").open("ab")
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.dying_tenant", env=self.environment, stdout=log, stderr=log
        )
        log.close()

        async def listens() -> bool:
            return await asyncio.to_thread(answers, self.port)

        await eventually(listens, within_seconds=PATIENCE_SECONDS)

    async def dies(self) -> None:
        """Returns when the process has died as it was told to."""
        assert self.process is not None
        assert await asyncio.wait_for(self.process.wait(), PATIENCE_SECONDS) == -signal.SIGKILL
        assert not self.death_wish.exists()

    async def falls_asleep(self) -> None:
        """Returns when the process has stopped where it was told to."""

        async def sleeps() -> bool:
            return not self.death_wish.exists()

        await eventually(sleeps, within_seconds=PATIENCE_SECONDS)

    def wake(self) -> None:
        """Lets the process go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def replica(self) -> Mortal:
        """Another process on the same database, which never dies by itself."""
        port = free_port()
        environment = self.environment | {
            "TENANTRY_LISTEN_ADDRESS": f"127.0.0.1:{port}",
            "DEATH_WISH": str(self.death_wish.with_name("no wish")),
        }
        return replace(self, environment=environment, port=port, process=None)

    async def stop(self) -> None:
        """Ends the process."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def saga_is(self, request_id: str, state: str) -> None:
        """Returns once the saga of a request has the state."""

        async def there() -> bool:
            return bool(await self.harness.value(SAGA_STATE, UUID(request_id)) == state)

        await eventually(there, within_seconds=PATIENCE_SECONDS)


@pytest.fixture(scope="module")
async def mortal(postgres: PostgresStore, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mortal]:
    """A migrated database, scripted peers, and the process."""
    async with running_peer() as retrieval, running_peer() as inference, running_peer() as ratelimit, running_peer() as metering:
        peers = dict(zip(PEERS, (retrieval, inference, ratelimit, metering), strict=True))
        admin_dsn = await postgres.fresh_database()
        service_dsn = postgres.dsn(urlsplit(admin_dsn).path.lstrip("/"), "tenant_service", "service-password")
        operator, front, port = new_operator_key(), new_operator_key(), free_port()
        settings = settings_for(admin_dsn, service_dsn, operator, {name: peer.address for name, peer in peers.items()}, front)
        settings = settings.model_copy(update={"listen_address": f"127.0.0.1:{port}", "saga_lease_seconds": 1.0, "saga_poll_seconds": 0.2})
        await migrate_schema(settings)
        death_wish = tmp_path_factory.mktemp("mortal") / "wish"
        channel = grpc.aio.insecure_channel(
            settings.listen_address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 300)]
        )
        # The process is another one: what is looked at here is its database and its answers.
        harness = Harness(None, settings, channel, admin_dsn, operator, front, peers)  # type: ignore[arg-type]
        found = Mortal(harness, environment_of(settings) | {"DEATH_WISH": str(death_wish)}, death_wish, port)
        yield found
        await found.stop()
        await channel.close()


def environment_of(settings: TenantSettings) -> dict[str, str]:
    """The settings as variables."""
    values = {name: getattr(settings, name) for name in TenantSettings.model_fields}
    plain = {name: value.get_secret_value() if isinstance(value, SecretStr) else str(value) for name, value in values.items()}
    return dict(os.environ) | {f"TENANTRY_{name.upper()}": value for name, value in plain.items()}


async def until_answered(mortal: Mortal, method: object, request: object) -> object:
    """Repeats a call while the service is coming back, as a caller would."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            try:
                return await call(method, request, mortal.harness.as_operator())  # type: ignore[arg-type]
            except MeshError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", ORDER, ids=lambda step: step.name)
async def test_a_creation_killed_at_any_step_ends_by_itself(mortal: Mortal, step: Step, moment: str) -> None:
    """Whenever the service dies, the next one ends the creation without its caller, whose repeat gets the one tenant and a working key."""
    await mortal.start()
    request, harness = wish(), mortal.harness
    mortal.death_wish.write_text(f"PROVISION {step.name} {moment}")
    with pytest.raises(MeshError):
        await call(harness.tenants.CreateTenant, request, harness.as_operator(), timeout_seconds=PATIENCE_SECONDS)
    await mortal.dies()
    await mortal.start()
    if (step, moment) != (Step.RECORDED, "before"):
        await mortal.saga_is(request.request_id, "DONE")
    answer = await until_answered(mortal, harness.tenants.CreateTenant, request)
    assert isinstance(answer, tenant_service_pb2.CreateTenantResponse)
    tenant_id = UUID(answer.tenant.tenant_id)
    assert answer.tenant.state == tenant_service_pb2.TENANT_STATE_ACTIVE
    for table in ("tenants", "users", "tenant_settings", "provisioning", "slug_directory", "sagas", "events"):
        assert await harness.value(f"SELECT count(*) FROM tenant.{table} WHERE tenant_id = $1", tenant_id) == 1, table
    assert await harness.value("SELECT count(*) FROM tenant.tenants WHERE slug = $1", request.slug) == 1
    live = "SELECT count(*) FROM tenant.api_keys WHERE tenant_id = $1 AND revoke_time IS NULL"
    assert await harness.value(live, tenant_id) == 1
    assert await harness.value("SELECT content::text FROM tenant.sagas WHERE tenant_id = $1", tenant_id) == "{}"
    assert all(tenant_id in peer.tenants for peer in harness.peers.values())
    got = await call(harness.tenants.GetTenant, tenant_service_pb2.GetTenantRequest(), with_key(answer.api_key))
    assert got.tenant == answer.tenant


@pytest.mark.slow
@pytest.mark.parametrize(("step", "moment"), [(Step.RECORDED, "after"), (Step.PLACEMENT, "before")], ids=["unplaced", "placing"])
async def test_a_killed_creation_goes_on_with_the_addresses_it_was_given(mortal: Mortal, step: Step, moment: str) -> None:
    """What a silo's addresses were is known after the death, to whoever has the tenant's key: in plain words they stand in no table."""
    await mortal.start()
    request, harness = wish(plan="enterprise", isolation=placement_service_pb2.ISOLATION_SILO), mortal.harness
    request.silo.CopyFrom(await harness.own_database())
    password = urlsplit(request.silo.postgres_owner_dsn).password or ""
    mortal.death_wish.write_text(f"PROVISION {step.name} {moment}")
    with pytest.raises(MeshError):
        await call(harness.tenants.CreateTenant, request, harness.as_operator(), timeout_seconds=PATIENCE_SECONDS)
    await mortal.dies()
    sealed = "SELECT content ->> 'sealed_stores' FROM tenant.sagas WHERE request_id = $1"
    assert await harness.value(sealed, UUID(request.request_id))
    assert await rows_with(harness, password) == {}
    await mortal.start()
    await mortal.saga_is(request.request_id, "DONE")
    answer = await until_answered(mortal, harness.tenants.CreateTenant, request)
    assert isinstance(answer, tenant_service_pb2.CreateTenantResponse)
    assert answer.tenant.state == tenant_service_pb2.TENANT_STATE_ACTIVE
    assert await rows_with(harness, password) == {}
    assert await harness.value("SELECT count(*) FROM tenant_keys.data_keys WHERE tenant_id = $1", UUID(answer.tenant.tenant_id)) == 1
    # As the tenant service itself acts: a call in the tenant's own name is not told what tables are made with.
    signing_key = read_signing_key(harness.settings.context_signing_key.get_secret_value())
    facts = TenantFacts(TenantState.ACTIVE, "enterprise", "local", 1, "silo", encrypt_content=True)
    minter = ContextMinter(signing_key, [], region="local", clock=lambda: datetime.now(UTC))
    token = minter.mint(Grant(TenantId(UUID(answer.tenant.tenant_id)), facts, PROVISIONING_SUBJECT, frozenset())).token
    places = placement_service_pb2_grpc.PlacementServiceStub(harness.channel)
    asked = placement_service_pb2.GetPlacementRequest(for_tables=True)
    found = await call(places.GetPlacement, asked, as_service("inference", token, answer.tenant.tenant_id))
    assert (found.place.isolation, found.place.postgres_dsn) == (placement_service_pb2.ISOLATION_SILO, request.silo.inference_postgres_dsn)
    assert found.migration_dsn == request.silo.postgres_owner_dsn


async def rows_with(harness: Harness, text: str) -> dict[str, int]:
    """Every table of the database that has the text somewhere, as it is, in base64 or as bytes, with its count of such rows."""
    # Of base64 the middle of the three alignments: the ends depend on the neighbours.
    encoded = [base64.b64encode(b" " * shift + text.encode()).decode()[4:-4] for shift in range(3)]
    needles = [f"%{needle}%" for needle in (text, text.encode().hex(), *encoded)]
    async with harness.superuser() as connection:
        tables = await connection.fetch(
            "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        )
        counts = {
            table: await connection.fetchval(f"SELECT count(*) FROM {table} r WHERE r::text LIKE ANY ($1)", needles) for [table] in tables
        }
    return {table: count for table, count in counts.items() if count}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", ERASE_ORDER, ids=lambda step: step.name)
async def test_an_erasure_killed_at_any_step_ends_by_itself(mortal: Mortal, step: EraseStep, moment: str) -> None:
    """Whenever the service dies, the next one ends the erasure without its caller, whose repeat gets the receipt; nothing is left."""
    await mortal.start()
    harness = mortal.harness
    created = await until_answered(mortal, harness.tenants.CreateTenant, wish())
    assert isinstance(created, tenant_service_pb2.CreateTenantResponse)
    request = tenant_service_pb2.EraseTenantRequest(
        request_id=str(uuid4()), tenant_id=created.tenant.tenant_id, confirm_slug=created.tenant.slug, canaries=["canary-of-this"]
    )
    mortal.death_wish.write_text(f"ERASE {step.name} {moment}")
    with pytest.raises(MeshError):
        await call(harness.tenants.EraseTenant, request, harness.as_operator(), timeout_seconds=PATIENCE_SECONDS)
    await mortal.dies()
    await mortal.start()
    if (step, moment) != (EraseStep.CLOSED, "before"):
        await mortal.saga_is(request.request_id, "DONE")
    answer = await until_answered(mortal, harness.tenants.EraseTenant, request)
    assert isinstance(answer, tenant_service_pb2.EraseTenantResponse)
    assert answer.receipt.verified
    statement = json.loads(answer.receipt.body_json)
    assert {item["store"] for item in statement["removed"]} >= {"scripted:tenants", "postgres:tenant.tenants", "postgres:tenant.users"}
    tenant_id = UUID(created.tenant.tenant_id)
    for table in ("tenants", "users", "tenant_settings", "provisioning", "slug_directory", "api_keys", "api_key_directory", "purges"):
        assert await harness.value(f"SELECT count(*) FROM tenant.{table} WHERE tenant_id = $1", tenant_id) == 0, table
    assert await harness.value("SELECT count(*) FROM tenant.events WHERE tenant_id = $1 AND event_type = 'tenant.erased'", tenant_id) == 1
    assert not any(tenant_id in peer.tenants for peer in harness.peers.values())
    assert taken_apart(created.api_key).key_id not in json.dumps(statement)
    again = replace(mortal, process=None).harness
    receipt = tenant_service_pb2.GetErasureReceiptRequest(tenant_id=created.tenant.tenant_id)
    assert (await call(again.tenants.GetErasureReceipt, receipt, again.as_operator())).receipt == answer.receipt


@pytest.fixture
async def pair(mortal: Mortal) -> AsyncIterator[tuple[Mortal, Mortal]]:
    """The process, and a replica that is alive when it sleeps."""
    await mortal.start()
    other = mortal.replica()
    yield mortal, other
    await other.stop()


@pytest.mark.slow
async def test_a_replica_that_slept_through_its_lease_changes_nothing(pair: tuple[Mortal, Mortal]) -> None:
    """While it slept another undid the creation; awake again it writes no row, asks no service, and tells its caller what became of it."""
    sleeper, other = pair
    harness, request = sleeper.harness, wish()
    sleeper.death_wish.write_text("PROVISION DEFAULTS asleep")
    creating = asyncio.ensure_future(
        call(harness.tenants.CreateTenant, request, harness.as_operator(), timeout_seconds=4 * PATIENCE_SECONDS)
    )
    await sleeper.falls_asleep()
    harness.peers["retrieval"].failures = [grpc.StatusCode.INVALID_ARGUMENT]
    await other.start()
    await sleeper.saga_is(request.request_id, "FAILED")
    asked = {name: (list(peer.tenants), list(peer.erased)) for name, peer in harness.peers.items()}
    sleeper.wake()
    with pytest.raises(MeshError) as refused:
        await creating
    assert (refused.value.code, refused.value.metadata["state"]) == (grpc.StatusCode.FAILED_PRECONDITION, "FAILED")
    tenant_id = await harness.value("SELECT tenant_id FROM tenant.sagas WHERE request_id = $1", UUID(request.request_id))
    for table in ("tenant_settings", "users", "api_keys", "placements"):
        assert await harness.value(f"SELECT count(*) FROM tenant.{table} WHERE tenant_id = $1", tenant_id) == 0, table
    states = "SELECT array_agg(DISTINCT state) FROM tenant.saga_steps WHERE tenant_id = $1"
    assert await harness.value(states, tenant_id) == ["UNDONE"]
    assert {name: (peer.tenants, peer.erased) for name, peer in harness.peers.items()} == asked


@pytest.mark.slow
async def test_an_erasure_that_another_ended_is_not_written_again(pair: tuple[Mortal, Mortal]) -> None:
    """A replica that wakes in an erasure which has ended meanwhile records no step and answers the one receipt."""
    sleeper, other = pair
    harness = sleeper.harness
    created = await until_answered(sleeper, harness.tenants.CreateTenant, wish())
    assert isinstance(created, tenant_service_pb2.CreateTenantResponse)
    request = tenant_service_pb2.EraseTenantRequest(
        request_id=str(uuid4()), tenant_id=created.tenant.tenant_id, confirm_slug=created.tenant.slug
    )
    sleeper.death_wish.write_text("ERASE OWN_RECORDS asleep")
    erasing = asyncio.ensure_future(call(harness.tenants.EraseTenant, request, harness.as_operator(), timeout_seconds=4 * PATIENCE_SECONDS))
    await sleeper.falls_asleep()
    await other.start()
    await sleeper.saga_is(request.request_id, "DONE")
    books = "SELECT jsonb_agg(to_jsonb(s) ORDER BY step)::text FROM tenant.saga_steps s WHERE tenant_id = $1"
    tenant_id = UUID(created.tenant.tenant_id)
    written, feed = await harness.value(books, tenant_id), "SELECT count(*) FROM tenant.changes WHERE tenant_id = $1"
    told = await harness.value(feed, tenant_id)
    sleeper.wake()
    answer = await erasing
    assert answer.receipt.verified
    assert (await harness.value(books, tenant_id), await harness.value(feed, tenant_id)) == (written, told)
    kept = await harness.value("SELECT body FROM tenant.erasure_receipts WHERE tenant_id = $1", tenant_id)
    assert kept == answer.receipt.body_json


@pytest.mark.slow
async def test_a_key_whose_tenant_was_never_recorded_is_destroyed(mortal: Mortal) -> None:
    """Killed between sealing a silo's addresses and recording the tenant, the service leaves a note of the key, and sweeps it."""
    await mortal.stop()
    poll = {"TENANTRY_RETENTION_POLL_SECONDS": "0.2"}
    mortal.environment.update(poll)
    await mortal.start()
    harness, request = mortal.harness, wish(plan="enterprise", isolation=placement_service_pb2.ISOLATION_SILO)
    request.silo.CopyFrom(await harness.own_database())
    mortal.death_wish.write_text("PROVISION RECORDED before")
    with pytest.raises(MeshError):
        await call(harness.tenants.CreateTenant, request, harness.as_operator(), timeout_seconds=PATIENCE_SECONDS)
    await mortal.dies()
    [tenant_id] = [row["tenant_id"] for row in await rows(harness, "SELECT tenant_id FROM tenant.unrecorded_keys")]
    keys = "SELECT count(*) FROM tenant_keys.data_keys WHERE tenant_id = $1"
    assert await harness.value(keys, tenant_id) == 1
    assert await harness.value("SELECT count(*) FROM tenant.tenants WHERE tenant_id = $1", tenant_id) == 0
    await mortal.start()
    await harness.execute("UPDATE tenant.unrecorded_keys SET create_time = now() - interval '1 hour'")

    async def is_swept() -> bool:
        return not await harness.value("SELECT count(*) FROM tenant.unrecorded_keys")

    await eventually(is_swept, within_seconds=PATIENCE_SECONDS)
    assert await harness.value(keys, tenant_id) == 0
    answer = await until_answered(mortal, harness.tenants.CreateTenant, request)
    assert isinstance(answer, tenant_service_pb2.CreateTenantResponse)
    assert await harness.value(keys, UUID(answer.tenant.tenant_id)) == 1


async def rows(harness: Harness, sql: str) -> list[asyncpg.Record]:
    """Reads past every policy."""
    async with harness.superuser() as connection:
        return list(await connection.fetch(sql))
