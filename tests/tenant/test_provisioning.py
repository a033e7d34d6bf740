"""Making tenants: every step may be interrupted, and repeating the request finishes the one tenant it began."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import grpc
import pytest

from mesh.common.v1 import error_reason_pb2
from mesh.tenant.v1 import api_key_service_pb2, tenant_service_pb2
from services.kernel.errors import MeshError
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_placements import PostgresPlacements
from services.tenant.adapters.postgres_provisioning import PostgresProvisioning
from services.tenant.adapters.schema_maker import PostgresSchemaMaker
from services.tenant.adapters.silo_maker import PostgresSiloMaker
from services.tenant.adapters.store_probe import StoreProbe
from services.tenant.app.parts import build_parts
from services.tenant.placement import Placements
from services.tenant.provisioning import ORDER, ProvisioningPlan, Step, TenantProvisioning
from services.tenant.saga import SagaEngine, SagaKind
from services.tenant.tenant_wish import TenantWish
from services.tenant.wish_seal import WishSeal
from tests.tenant.harness import PEERS, Harness, as_service, call, refusal, taken_apart, wish, with_key
from tests.tenant.test_key_changes import change

ACTOR = Actor("operator:test", "test", "")
TENANTS_OF_REQUEST = "SELECT count(*) FROM tenant.provisioning WHERE request_id = $1"
STEPS_DONE = "SELECT steps_done FROM tenant.provisioning WHERE request_id = $1"
LIVE_KEYS = "SELECT count(*) FROM tenant.api_keys WHERE tenant_id = $1 AND revoke_time IS NULL"
OWNERS = "SELECT count(*) FROM tenant.users WHERE tenant_id = $1 AND role = 'OWNER'"
SLUGS = "SELECT count(*) FROM tenant.slug_directory WHERE slug = $1"


async def assert_whole(harness: Harness, request_id: str, answer: tenant_service_pb2.CreateTenantResponse) -> None:
    """Exactly one tenant, one owner, one live first key, and the key works."""
    tenant_id = UUID(answer.tenant.tenant_id)
    assert answer.tenant.state == tenant_service_pb2.TENANT_STATE_ACTIVE
    assert await harness.value(TENANTS_OF_REQUEST, UUID(request_id)) == 1
    assert await harness.value("SELECT count(*) FROM tenant.tenants WHERE slug = $1", answer.tenant.slug) == 1
    assert await harness.value(OWNERS, tenant_id) == 1
    assert await harness.value(LIVE_KEYS, tenant_id) == 1
    assert await harness.value("SELECT count(*) FROM tenant.tenant_settings WHERE tenant_id = $1", tenant_id) == 1
    got = await call(harness.tenants.GetTenant, tenant_service_pb2.GetTenantRequest(), with_key(answer.api_key))
    assert got.tenant == answer.tenant


async def test_a_tenant_is_made_everywhere_and_ready_when_answered(harness: Harness) -> None:
    """One call claims the slug, makes a place in all four services and answers an ACTIVE tenant with a working key."""
    request = wish()
    answer = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    tenant_id = UUID(answer.tenant.tenant_id)
    assert tenant_id.version == 7
    assert (answer.tenant.slug, answer.tenant.plan, answer.tenant.region) == (request.slug, "professional", "local")
    assert {name: peer.tenants for name, peer in harness.peers.items()} == {name: [tenant_id] for name in PEERS}
    assert taken_apart(answer.api_key).tier == "professional"
    await assert_whole(harness, request.request_id, answer)
    [record] = await harness.audit(answer.tenant.tenant_id, "TENANT_CREATED")
    assert record["reason"] == "customer call 4711"


async def test_inference_can_read_the_configuration_while_the_tenant_is_being_made(harness: Harness) -> None:
    """A service asked to make a place for a tenant may ask for its name and its assistant's name with the token it was given."""
    seen: list[tenant_service_pb2.TenantConfig] = []

    async def ask_back(token: str) -> None:
        answer = await call(harness.tenants.GetTenantConfig, tenant_service_pb2.GetTenantConfigRequest(), as_service("inference", token))
        seen.append(answer.config)

    harness.peers["inference"].before_answer = ask_back
    answer = await harness.create(display_name="Acme Corporation", assistant_name="Ada")
    [config] = seen
    assert (config.tenant_id, config.display_name, config.ai.assistant_name) == (answer.tenant.tenant_id, "Acme Corporation", "Ada")
    # The tenant's first configuration, under the third version of the plans.
    assert config.version == 1 + 3


@pytest.mark.parametrize("name", PEERS)
async def test_a_service_that_is_away_stops_the_creation_which_a_repeat_finishes(harness: Harness, name: str) -> None:
    """UNAVAILABLE names the service and asks for a repeat; until then the tenant is nobody's; the repeat finishes the same tenant."""
    request = wish()
    harness.peers[name].failures = [grpc.StatusCode.UNAVAILABLE] * 3
    error = await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
    assert (error.code, error.metadata["dependency"]) == (grpc.StatusCode.UNAVAILABLE, name)
    assert error.retry_after_seconds is not None
    assert await harness.value("SELECT state FROM tenant.tenants WHERE slug = $1", request.slug) == "PROVISIONING"
    before = PEERS[: PEERS.index(name)]
    assert all(len(harness.peers[peer].tenants) == 1 for peer in before)
    answer = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    # What was finished is not done again.
    assert all(len(peer.tenants) == 1 for peer in harness.peers.values())
    await assert_whole(harness, request.request_id, answer)


async def test_a_service_that_refuses_oddly_is_told_as_unavailable(harness: Harness) -> None:
    """Whatever a service answers, the operator is told to repeat and never sees the service's own words."""
    harness.peers["retrieval"].failures = [grpc.StatusCode.PERMISSION_DENIED]
    error = await refusal(harness.create())
    assert (error.code, error.metadata) == (grpc.StatusCode.UNAVAILABLE, {"dependency": "retrieval"})
    assert "scripted" not in error.message


@pytest.mark.parametrize("name", PEERS)
async def test_a_cancelled_creation_is_finished_by_a_repeat(harness: Harness, name: str) -> None:
    """A caller that hangs up while a service works leaves a tenant that a repeat finishes."""
    request, peer = wish(), harness.peers[name]
    peer.gate = asyncio.Event()
    under_way = harness.tenants.CreateTenant(request, metadata=harness.as_operator(), timeout=10)
    await peer.entered.wait()
    under_way.cancel()
    with pytest.raises(asyncio.CancelledError):
        await under_way
    peer.gate.set()
    peer.gate = None
    answer = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    await assert_whole(harness, request.request_id, answer)


class Crash(Exception):
    """Stands for the end of the process."""


class CrashingStore(PostgresProvisioning):
    """The real store in a process that dies after one of its steps became durable."""

    crash_after: Step | None = None

    def _maybe_die(self, step: Step) -> None:
        if step is self.crash_after:
            raise Crash

    async def record(self, *args: Any) -> Any:
        recorded = await super().record(*args)
        self._maybe_die(Step.RECORDED)
        return recorded

    async def write_defaults(self, tenant_id: Any, assistant_name: str, step: Step, lease: UUID) -> None:
        await super().write_defaults(tenant_id, assistant_name, step, lease)
        self._maybe_die(step)

    async def finish_step(self, tenant_id: Any, step: Step, lease: UUID) -> None:
        await super().finish_step(tenant_id, step, lease)
        self._maybe_die(step)

    async def write_owner(self, tenant_id: Any, email: str, step: Step, lease: UUID) -> None:
        await super().write_owner(tenant_id, email, step, lease)
        self._maybe_die(step)

    async def issue_first_key(self, *args: Any) -> bool:
        issued = await super().issue_first_key(*args)
        self._maybe_die(Step.FIRST_KEY)
        return issued

    async def activate(self, tenant_id: Any, step: Step, lease: UUID) -> None:
        await super().activate(tenant_id, step, lease)
        self._maybe_die(step)


@asynccontextmanager
async def second_process(harness: Harness) -> AsyncIterator[tuple[TenantProvisioning, CrashingStore]]:
    """Another process's provisioning on the same database and peers."""
    async with AsyncExitStack() as stack:
        parts = await build_parts(harness.settings, stack)
        store, peers = CrashingStore(parts.database), {Step[name.upper()]: (name, parts.peers[name]) for name in PEERS}
        places = Placements(PostgresPlacements(parts.database, parts.box), PostgresSchemaMaker("", 0), PostgresSiloMaker(""), StoreProbe())
        seal = WishSeal(store, parts.box, parts.vault)
        plan = ProvisioningPlan(store, parts.tenants, peers, places, seal, parts.vault, parts.minter)
        engine = SagaEngine(parts.sagas, {SagaKind.PROVISION: plan}, lease_seconds=10.0, max_attempts=20)
        yield TenantProvisioning(store, parts.sagas, plan, engine, parts.tenants, parts.tenants, places, seal, region="local"), store


def content_of(request: tenant_service_pb2.CreateTenantRequest) -> TenantWish:
    """The request as the noun takes it."""
    return TenantWish(request.slug, request.display_name, request.plan, request.owner_email, request.assistant_name)


@pytest.mark.parametrize("step", list(Step))
async def test_a_process_that_dies_after_any_step_leaves_a_tenant_that_a_repeat_finishes(harness: Harness, step: Step) -> None:
    """After each durable step the process may end: the repeated request goes on and ends with one tenant, one owner, one live key."""
    request = wish()
    async with second_process(harness) as (provisioning, store):
        store.crash_after = step
        with pytest.raises(Crash):
            await provisioning.create(UUID(request.request_id), content_of(request), ACTOR)
    assert await harness.value(STEPS_DONE, UUID(request.request_id)) >= ORDER.index(step) + 1
    answer = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    await assert_whole(harness, request.request_id, answer)


async def test_the_same_request_at_once_is_one_creation_with_one_answer(harness: Harness) -> None:
    """Eight concurrent calls of one request get the same tenant and the same working key, and each service is asked once."""
    request = wish()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call(harness.tenants.CreateTenant, request, harness.as_operator())) for _ in range(8)]
    answers = [task.result() for task in tasks]
    assert len({answer.tenant.tenant_id for answer in answers}) == 1
    await assert_whole(harness, request.request_id, max(answers, key=lambda answer: len(answer.api_key)))


async def test_the_same_request_in_two_processes_makes_one_tenant_with_one_live_key(harness: Harness) -> None:
    """Two replicas that run one request at the same time end with one tenant, one owner and one live first key."""
    request = wish()
    async with second_process(harness) as (one, _), second_process(harness) as (two, _), asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(process.create(UUID(request.request_id), content_of(request), ACTOR)) for process in (one, two, one, two)
        ]
    created = [task.result() for task in tasks]
    [tenant_id] = {answer.tenant.tenant_id for answer in created}
    assert await harness.value(LIVE_KEYS, tenant_id) == 1
    assert await harness.value(OWNERS, tenant_id) == 1
    live = await harness.value("SELECT key_id FROM tenant.api_keys WHERE tenant_id = $1 AND revoke_time IS NULL", tenant_id)
    assert live in {taken_apart(answer.api_key).key_id for answer in created}


async def test_one_slug_is_won_by_one_of_many_requests(harness: Harness) -> None:
    """Of eight requests for one slug one wins; the others get ALREADY_EXISTS and leave nothing behind."""
    slug = wish().slug
    requests = [wish(slug=slug) for _ in range(8)]

    async def attempt(request: tenant_service_pb2.CreateTenantRequest) -> object:
        try:
            return await call(harness.tenants.CreateTenant, request, harness.as_operator())
        except MeshError as error:
            return error

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(attempt(request)) for request in requests]
    outcomes = [task.result() for task in tasks]
    refused = [outcome for outcome in outcomes if isinstance(outcome, MeshError)]
    assert len(refused) == 7
    for error in refused:
        assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, error_reason_pb2.ERROR_REASON_ALREADY_EXISTS)
        assert error.metadata == {"resource": "tenant", "field": "slug"}
    assert await harness.value("SELECT count(*) FROM tenant.tenants WHERE slug = $1", slug) == 1
    ids = [UUID(request.request_id) for request in requests]
    assert await harness.value("SELECT count(*) FROM tenant.request_directory WHERE request_id = ANY ($1)", ids) == 1


async def test_a_taken_slug_writes_nothing(harness: Harness) -> None:
    """A refused creation changes no table, and its request id may be used again with another slug."""
    taken = await harness.create()
    before = await row_counts(harness)
    request = wish(slug=taken.tenant.slug)
    await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
    after = await row_counts(harness)
    # The operator's own access is recorded in any case.
    assert after.pop("audit") == before.pop("audit") + 1
    assert after == before
    request.slug = wish().slug
    await call(harness.tenants.CreateTenant, request, harness.as_operator())


async def row_counts(harness: Harness) -> dict[str, int]:
    """How many rows each table of the schema has."""
    async with harness.superuser() as connection:
        names = [row[0] for row in await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'tenant'")]
        return {name: await connection.fetchval(f"SELECT count(*) FROM tenant.{name}") for name in names}


@pytest.mark.parametrize("field", ["slug", "display_name", "plan", "owner_email", "assistant_name"])
async def test_a_request_id_with_other_content_is_a_conflict(harness: Harness, field: str) -> None:
    """A request id stands for its content: with any field changed it is refused."""
    request = wish()
    await call(harness.tenants.CreateTenant, request, harness.as_operator())
    setattr(request, field, {"plan": "free", "owner_email": "other@example.com", "slug": wish().slug}.get(field, "Other"))
    error = await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
    assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, error_reason_pb2.ERROR_REASON_CONTENT_CONFLICT)


async def test_a_repeat_replaces_a_first_key_that_was_never_used(harness: Harness) -> None:
    """A lost answer is healed by repeating: the same tenant, a new key, the lost one dead."""
    request = wish()
    first = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    second = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    assert second.tenant == first.tenant
    assert second.api_key not in ("", first.api_key)
    assert (await refusal(harness.authenticate(first.api_key))).reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID
    await assert_whole(harness, request.request_id, second)
    # Looking at the first key again is an earlier step: it must not take the finished creation back to it.
    assert await harness.value(STEPS_DONE, UUID(request.request_id)) == len(ORDER)


async def test_a_repeat_keeps_a_first_key_that_was_used(harness: Harness) -> None:
    """Once the key was used, repeating answers the tenant without a key and the key goes on working."""
    request = wish()
    first = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    await harness.authenticate(first.api_key)
    again = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    assert (again.tenant, again.api_key) == (first.tenant, "")
    await assert_whole(harness, request.request_id, first)


async def test_a_revoked_first_key_is_not_replaced_by_a_repeat(harness: Harness) -> None:
    """What a tenant revoked stays revoked: repeating the creation makes no new key in its place."""
    request = wish()
    first = await call(harness.tenants.CreateTenant, request, harness.as_operator())
    key_id = taken_apart(first.api_key).key_id
    operator = harness.as_operator(first.tenant.tenant_id)
    await call(harness.keys.RevokeApiKey, api_key_service_pb2.RevokeApiKeyRequest(key_id=key_id), operator)
    assert (await call(harness.tenants.CreateTenant, request, harness.as_operator())).api_key == ""
    assert await harness.value(LIVE_KEYS, UUID(first.tenant.tenant_id)) == 0


async def test_a_first_key_that_was_given_an_end_or_networks_is_not_replaced_by_a_repeat(harness: Harness) -> None:
    """What was narrowed stays narrow, and what ended stays dead: repeating the creation hands nobody a key without end and networks."""
    for narrowed in ({"expire_time": datetime.now(UTC) + timedelta(hours=1)}, {"allowed_cidrs": ["10.0.0.0/8"]}):
        request = wish()
        first = await call(harness.tenants.CreateTenant, request, harness.as_operator())
        tenant_id = first.tenant.tenant_id
        await change(harness, harness.as_operator(tenant_id), taken_apart(first.api_key).key_id, **narrowed)
        again = await call(harness.tenants.CreateTenant, request, harness.as_operator())
        assert (again.tenant, again.api_key) == (first.tenant, "")
        assert await harness.value("SELECT count(*) FROM tenant.api_keys WHERE tenant_id = $1", UUID(tenant_id)) == 1


async def test_an_unknown_plan_is_not_found_and_writes_nothing(harness: Harness) -> None:
    """A plan that is not on offer is NOT_FOUND; slug and request id stay free."""
    request = wish(plan="platinum")
    error = await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
    assert (error.code, error.metadata) == (grpc.StatusCode.NOT_FOUND, {"resource": "plan"})
    assert "ListPlans" in error.message
    assert "credential" not in error.message
    assert await harness.value(SLUGS, request.slug) == 0
    request.plan = "free"
    await call(harness.tenants.CreateTenant, request, harness.as_operator())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slug", "a"),
        ("slug", "Acme"),
        ("slug", "acme--corp"),
        ("slug", "-acme"),
        ("slug", "acme-"),
        ("slug", "аcme"),  # noqa: RUF001 - a Cyrillic letter that looks like a Latin one
        ("slug", "acme\u200b"),
        ("slug", "a" * 64),
        ("slug", "a" + "-a" * 32),
        ("display_name", ""),
        ("display_name", "n" * 201),
        ("display_name", "line\nbreak"),
        ("display_name", "nul\x00"),
        ("plan", ""),
        ("plan", "free\x00"),
        ("owner_email", "nobody"),
        ("owner_email", "a@b@c"),
        ("owner_email", ""),
        ("assistant_name", "a" * 101),
        ("assistant_name", "bell\x07"),
        ("request_id", "not-a-uuid"),
        ("request_id", ""),
    ],
)
async def test_a_bad_wish_is_refused_before_anything_is_written(harness: Harness, field: str, value: str) -> None:
    """Bad slugs, names, plans, mail addresses and request ids are invalid requests that leave nothing behind."""
    request = wish(**{field: value})
    error = await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT, error
    assert await harness.value(SLUGS, request.slug.replace("\x00", "")) == 0


async def test_names_of_200_characters_are_taken_as_they_are(harness: Harness) -> None:
    """The longest name, in any script, comes back unchanged; a tenant without an assistant name gets the default."""
    name = "名" * 199 + "🦉"
    answer = await harness.create(display_name=name, assistant_name="")
    config = await call(harness.tenants.GetTenantConfig, tenant_service_pb2.GetTenantConfigRequest(), with_key(answer.api_key))
    assert (config.config.display_name, config.config.ai.assistant_name) == (name, "Assistant")


async def test_only_an_operator_with_a_reason_makes_tenants(harness: Harness) -> None:
    """A tenant's key is refused, and so is an operator who does not say why."""
    created = await harness.create()
    error = await refusal(call(harness.tenants.CreateTenant, wish(), with_key(created.api_key)))
    assert error.code is grpc.StatusCode.PERMISSION_DENIED
    error = await refusal(call(harness.tenants.CreateTenant, wish(), harness.as_operator(reason=None)))
    assert error.reason == error_reason_pb2.ERROR_REASON_OPERATOR_REASON_MISSING
