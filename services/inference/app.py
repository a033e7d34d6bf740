"""The inference service put together: builds everything by constructor, closes everything in reverse."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from mesh.common.v1.lifecycle_service_pb2_grpc import add_TenantLifecycleServiceServicer_to_server
from mesh.inference.v1.conversation_service_pb2_grpc import add_ConversationServiceServicer_to_server
from mesh.inference.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from mesh.inference.v1.prompt_service_pb2_grpc import add_PromptServiceServicer_to_server
from services.inference.adapters.anthropic import AnthropicProvider
from services.inference.adapters.anthropic_counter import AnthropicCounter
from services.inference.adapters.metering_client import MeteringLedger
from services.inference.adapters.metering_prices_client import MeteringPrices
from services.inference.adapters.postgres import PostgresMemory
from services.inference.adapters.postgres_audit import PostgresAuditOutbox, PostgresAuditRelay
from services.inference.adapters.postgres_sealing import PostgresSealedRows
from services.inference.adapters.provider_keys_client import TenantProviderKeys
from services.inference.adapters.ratelimit_client import RatelimitLimits
from services.inference.adapters.retrieval_client import RetrievalDocuments
from services.inference.adapters.traced_provider import TracedProvider
from services.inference.admission import AdmissionGate
from services.inference.audit_relay import AuditRelay
from services.inference.call_audit import CallAudit
from services.inference.finishing import Finishing
from services.inference.gathering import Gathering
from services.inference.input_counting import InputCounting
from services.inference.lease_keeper import LeaseKeeper
from services.inference.overrun import StreamGuard
from services.inference.pipeline import AnswerPipeline
from services.inference.ports import Ledger, Limits, TokenCounter
from services.inference.refusal_tally import RefusalTally
from services.inference.servicers.conversation_service import ConversationService
from services.inference.servicers.inference_service import InferenceService
from services.inference.servicers.lifecycle import LifecycleServicer
from services.inference.servicers.prompt_service import PromptService
from services.inference.set_aside import SetAsideCount
from services.inference.settings import InferenceSettings
from services.inference.settlement import Settlement
from services.inference.stream_bound import spare_tokens
from services.inference.token_density import TokenDensities
from services.kernel.audit_client import AuditClient
from services.kernel.background import BackgroundTasks
from services.kernel.change_feed import ChangeFeed
from services.kernel.credential_resolver import remote_trust
from services.kernel.migrate import migrate, migrate_all_places
from services.kernel.place_making import PlaceMaker
from services.kernel.placement import PlaceDirectory, RemotePlaces
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import MeshServer, Registration
from services.kernel.silo_pools import SiloPools
from services.kernel.table_copying import TenantTable
from services.kernel.tenant_cipher import RemoteDataKeys, TenantCipher
from services.kernel.tenant_config import TenantConfigCache
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.kernel.tenant_moving import TenantMover

MIGRATIONS = Path(__file__).parent / "migrations"
# Of what the tenant service tells, what ends a remembered key.
KEY_CHANGES = frozenset({"DATA_KEY", "STATE"})
PLACE_CHANGES = frozenset({"PLACEMENT", "STATE"})
SCHEMA = "inference"
# Parents first.
TENANT_TABLES = (
    TenantTable("prompts", ("version",)),
    TenantTable("conversations", ("conversation_id",)),
    TenantTable("turns", ("conversation_id", "sequence")),
    TenantTable("inference_sealing", ("tenant_id",)),
)


@dataclass(frozen=True, slots=True)
class InferenceApp:
    """The running parts."""

    server: MeshServer
    leases: LeaseKeeper
    gate: AdmissionGate
    closing: AsyncExitStack

    async def close(self) -> None:
        """Lets settlements finish, then closes clients and pools."""
        await self.closing.aclose()


async def build(settings: InferenceSettings) -> InferenceApp:
    """Builds the service. Stores and peers may be down: calls answer Unavailable until they are back."""
    async with AsyncExitStack() as stack:
        database, jobs = await _databases(stack, settings)
        to_tenant = _channel(stack, settings, settings.tenant_address, "tenant")
        feed = ChangeFeed(to_tenant)
        places, mover = _follow_placements(stack, settings, database, to_tenant, feed)
        cipher, provider_keys = TenantCipher(RemoteDataKeys(to_tenant)), TenantProviderKeys(to_tenant)
        feed.forget_on(KEY_CHANGES, cipher.forget)
        feed.forget_on(KEY_CHANGES, provider_keys.forget)
        memory = PostgresMemory(database, cipher)
        to_metering = _channel(stack, settings, settings.metering_address, "metering")
        ledger = _ledger(stack, to_metering)
        limits = RatelimitLimits(_channel(stack, settings, settings.ratelimit_address, "ratelimit"))
        stack.push_async_callback(limits.close)
        provider = _provider(stack, settings, provider_keys)
        leases, background = LeaseKeeper(limits, ledger), BackgroundTasks()
        stack.push_async_callback(background.close)
        audit = _start_loops(stack, background, leases, feed, database, jobs, AuditClient(to_tenant))
        # Closed before everything it settles with.
        finishing = Finishing()
        stack.push_async_callback(finishing.close)
        gate = AdmissionGate(settings.max_concurrent_provider_calls, settings.max_waiting_calls)
        gathering = Gathering(RetrievalDocuments(_channel(stack, settings, settings.retrieval_address, "retrieval")), memory)
        counting, guard = _counters(settings, AnthropicCounter(provider.clients), gathering, limits, ledger)
        pipeline = AnswerPipeline(
            ledger=ledger,
            gathering=gathering,
            counting=counting,
            provider=TracedProvider(provider),
            guard=guard,
            gate=gate,
            leases=leases,
            settlement=Settlement(ledger, limits, memory, leases, finishing, audit),
            audit=audit,
            refusals=_count_refusals(stack, background, ledger),
            spare_tokens=spare_tokens(settings.provider_in_flight_tokens),
        )
        configs = TenantConfigCache(to_tenant, feed=feed)
        lifecycle = LifecycleServicer(memory, configs, places, mover, PostgresSealedRows(database, cipher))
        prices, deadline_seconds = MeteringPrices(to_metering), settings.default_call_deadline_seconds
        inference = InferenceService(pipeline, configs, provider_keys, prices, deadline_seconds, settings.provider_account)
        resolver, verifier = remote_trust(to_tenant, feed=feed, outage_seconds=settings.credential_outage_seconds)
        server = MeshServer(settings, servicers=_registrations(inference, memory, lifecycle), resolver=resolver, verifier=verifier)
        return InferenceApp(server, leases, gate, stack.pop_all())


def _counters(
    settings: InferenceSettings, counter: TokenCounter, gathering: Gathering, limits: Limits, ledger: Ledger
) -> tuple[InputCounting, StreamGuard]:
    # Questions and answers differ in density: each learns by itself.
    guard = StreamGuard(limits, ledger, counter, TokenDensities(), settings.provider_in_flight_tokens)
    return InputCounting(gathering, counter, TokenDensities()), guard


def _start_loops(
    stack: AsyncExitStack,
    background: BackgroundTasks,
    leases: LeaseKeeper,
    feed: ChangeFeed,
    database: TenantDatabase,
    jobs: JobsDatabase,
    log: AuditClient,
) -> CallAudit:
    set_aside = SetAsideCount()
    audit = CallAudit(PostgresAuditOutbox(database), set_aside)
    background.start("lease_keeper", leases.run)
    background.start("change_feed", feed.run)
    background.start("call_audit", audit.run)
    background.start("audit_relay", AuditRelay(PostgresAuditRelay(jobs), log.record, set_aside).run)
    stack.push_async_callback(audit.close)
    return audit


def _ledger(stack: AsyncExitStack, to_metering: MeshChannel) -> MeteringLedger:
    ledger = MeteringLedger(to_metering)
    stack.push_async_callback(ledger.close)
    return ledger


def _count_refusals(stack: AsyncExitStack, background: BackgroundTasks, ledger: MeteringLedger) -> RefusalTally:
    refusals = RefusalTally(ledger)
    background.start("refusal_tally", refusals.run)
    stack.push_async_callback(refusals.close)
    return refusals


async def _databases(stack: AsyncExitStack, settings: InferenceSettings) -> tuple[TenantDatabase, JobsDatabase]:
    pooling = settings.postgres_transaction_pooling
    dsn, jobs_dsn = settings.postgres_dsn.get_secret_value(), settings.postgres_jobs_dsn.get_secret_value()
    database = await TenantDatabase.open(
        dsn, max_size=settings.postgres_pool_size, application_name="inference", transaction_pooling=pooling
    )
    stack.push_async_callback(database.close)
    jobs = await JobsDatabase.open(jobs_dsn, max_size=2, application_name="inference-jobs", transaction_pooling=pooling)
    stack.push_async_callback(jobs.close)
    return database, jobs


def _provider(stack: AsyncExitStack, settings: InferenceSettings, provider_keys: TenantProviderKeys) -> AnthropicProvider:
    provider = AnthropicProvider(
        base_url=settings.provider_base_url,
        api_key=settings.anthropic_api_key.get_secret_value(),
        call_id_header=settings.provider_call_id_header,
        max_connections=settings.max_concurrent_provider_calls,
        own_key_refused=provider_keys.forget,
    )
    stack.push_async_callback(provider.close)
    return provider


def _follow_placements(
    stack: AsyncExitStack, settings: InferenceSettings, database: TenantDatabase, to_tenant: MeshChannel, feed: ChangeFeed
) -> tuple[PlaceMaker, TenantMover]:
    remote = RemotePlaces(to_tenant)
    silos = SiloPools(settings.max_silo_pools, application_name="inference")
    stack.push_async_callback(silos.close)
    directory = PlaceDirectory(remote)
    feed.forget_on(PLACE_CHANGES, directory.forget)
    database.follow(SCHEMA, directory, silos)
    maker = PlaceMaker(database, remote, SCHEMA, MIGRATIONS, settings.postgres_placement_dsn)
    return maker, TenantMover(database, remote, maker, SCHEMA, TENANT_TABLES)


def _registrations(inference: InferenceService, memory: PostgresMemory, lifecycle: LifecycleServicer) -> list[Registration]:
    return [
        (add_InferenceServiceServicer_to_server, inference, "mesh.inference.v1.InferenceService"),
        (add_PromptServiceServicer_to_server, PromptService(memory), "mesh.inference.v1.PromptService"),
        (add_ConversationServiceServicer_to_server, ConversationService(memory), "mesh.inference.v1.ConversationService"),
        (add_TenantLifecycleServiceServicer_to_server, lifecycle, "mesh.common.v1.TenantLifecycleService"),
    ]


async def migrate_schema(settings: InferenceSettings) -> None:
    """Brings the schema forward."""
    admin_dsn = settings.postgres_admin_dsn.get_secret_value()
    roles = {
        "service": settings.postgres_dsn.get_secret_value(),
        "placement": settings.postgres_placement_dsn.get_secret_value(),
        "jobs": settings.postgres_jobs_dsn.get_secret_value(),
    }
    await migrate(admin_dsn, SCHEMA, MIGRATIONS, roles)
    await migrate_all_places(admin_dsn, settings.silo_migration_dsn.get_secret_value(), SCHEMA, MIGRATIONS)


def _channel(stack: AsyncExitStack, settings: InferenceSettings, address: str, service: str) -> MeshChannel:
    channel = MeshChannel(address, settings=settings, target_service=service)
    stack.push_async_callback(channel.close)
    return channel
