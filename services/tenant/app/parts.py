"""What several rooms of the service are built from: stores, keys, loops and peers. Built once, closed in reverse order."""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from services.kernel.background import BackgroundTasks
from services.kernel.context_token import SigningKey
from services.kernel.errors import Unavailable
from services.kernel.rpc.channel import MeshChannel
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.tenant.adapters.environment_master_keys import EnvironmentMasterKeys
from services.tenant.adapters.lifecycle_client import GrpcLifecyclePeer
from services.tenant.adapters.postgres_credentials import PostgresCredentials
from services.tenant.adapters.postgres_data_keys import PostgresDataKeys
from services.tenant.adapters.postgres_events import PostgresOutbox
from services.tenant.adapters.postgres_sagas import PostgresSagas
from services.tenant.adapters.postgres_secrets import PostgresSecrets
from services.tenant.adapters.postgres_tenants import PostgresTenants
from services.tenant.context_minting import ContextMinter, read_public_keys, read_signing_key
from services.tenant.data_keys import DataKeyVault
from services.tenant.key_management import parse_master_keys
from services.tenant.secret_box import SecretBox
from services.tenant.settings import TenantSettings
from services.tenant.usage_trail import UsageTrailBuffer

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the rooms share."""

    settings: TenantSettings
    stack: AsyncExitStack
    background: BackgroundTasks
    database: TenantDatabase
    jobs: JobsDatabase
    credentials: PostgresCredentials
    trail: UsageTrailBuffer
    signing_key: SigningKey
    minter: ContextMinter
    peers: Mapping[str, GrpcLifecyclePeer]
    tenants: PostgresTenants
    sagas: PostgresSagas
    outbox: PostgresOutbox
    secrets: PostgresSecrets
    vault: DataKeyVault
    box: SecretBox


async def build_parts(settings: TenantSettings, stack: AsyncExitStack) -> Parts:
    """Opens what the rooms share; stores that are away are tried again by each call."""
    pooling = settings.postgres_transaction_pooling
    database = await TenantDatabase.open(
        settings.postgres_dsn.get_secret_value(), application_name="tenantry-tenant", transaction_pooling=pooling
    )
    stack.push_async_callback(database.close)
    jobs = await JobsDatabase.open(
        settings.postgres_jobs_dsn.get_secret_value(), max_size=3, application_name="tenantry-tenant-jobs", transaction_pooling=pooling
    )
    stack.push_async_callback(jobs.close)
    key_store = await TenantDatabase.open(
        settings.key_store_dsn.get_secret_value(), max_size=4, application_name="tenantry-tenant-keys", transaction_pooling=pooling
    )
    stack.push_async_callback(key_store.close)
    credentials = PostgresCredentials(database)
    trail = UsageTrailBuffer(credentials)
    stack.push_async_callback(_write_rest, trail)
    background = BackgroundTasks()
    stack.push_async_callback(background.close)
    background.start("usage_trail", trail.run)
    signing_key = read_signing_key(settings.context_signing_key.get_secret_value())
    others = read_public_keys(settings.context_additional_public_keys)
    vault = DataKeyVault(PostgresDataKeys(key_store), master_keys(settings), trail)
    return Parts(
        settings=settings,
        stack=stack,
        background=background,
        database=database,
        jobs=jobs,
        credentials=credentials,
        trail=trail,
        signing_key=signing_key,
        minter=ContextMinter(signing_key, others, region=settings.region, clock=now),
        peers=_peers(settings, stack),
        tenants=PostgresTenants(database),
        sagas=PostgresSagas(database),
        outbox=PostgresOutbox(jobs),
        secrets=PostgresSecrets(database),
        vault=vault,
        box=SecretBox(vault, trail),
    )


def master_keys(settings: TenantSettings) -> EnvironmentMasterKeys:
    """Builds the master keys from the environment."""
    return EnvironmentMasterKeys(parse_master_keys(settings.master_keys.get_secret_value()))


def now() -> datetime:
    """The service's clock."""
    return datetime.now(UTC)


def _peers(settings: TenantSettings, stack: AsyncExitStack) -> dict[str, GrpcLifecyclePeer]:
    addresses = {
        "inference": settings.inference_address,
        "retrieval": settings.retrieval_address,
        "metering": settings.metering_address,
        "ratelimit": settings.ratelimit_address,
    }
    peers: dict[str, GrpcLifecyclePeer] = {}
    for name, address in addresses.items():
        channel = MeshChannel(address, settings=settings, target_service=name)
        stack.push_async_callback(channel.close)
        peers[name] = GrpcLifecyclePeer(channel)
    return peers


async def _write_rest(trail: UsageTrailBuffer) -> None:
    try:
        await trail.flush(everything=True)
    except Unavailable as error:
        log.warning("usage_trail_lost", reason=error.reason_name)
