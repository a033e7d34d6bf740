"""The composition root: builds everything by constructor and closes it in reverse order."""

from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog

from mesh.common.v1 import lifecycle_service_pb2_grpc
from mesh.tenant.v1 import (
    api_key_service_pb2_grpc,
    audit_service_pb2_grpc,
    authentication_service_pb2_grpc,
    configuration_service_pb2_grpc,
    data_key_service_pb2_grpc,
    domain_service_pb2_grpc,
    flag_service_pb2_grpc,
    issuer_service_pb2_grpc,
    plan_service_pb2_grpc,
    secret_service_pb2_grpc,
    tenant_service_pb2_grpc,
    user_service_pb2_grpc,
)
from services.kernel.background import BackgroundTasks
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.errors import Unavailable
from services.kernel.migrate import migrate
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import MeshServer, Registration
from services.kernel.tenant_context import TenantContext
from services.kernel.tenant_database import TenantDatabase
from services.tenant.adapters.environment_master_keys import EnvironmentMasterKeys
from services.tenant.adapters.http_jwks import HttpJwksSource
from services.tenant.adapters.lifecycle_client import GrpcLifecyclePeer
from services.tenant.adapters.plan_loader import load_plans, read_plan_file
from services.tenant.adapters.postgres_audit import PostgresAuditLog
from services.tenant.adapters.postgres_changes import ChangeListener, PostgresChanges
from services.tenant.adapters.postgres_configuration import PostgresConfiguration
from services.tenant.adapters.postgres_credentials import PostgresCredentials
from services.tenant.adapters.postgres_data_keys import PostgresDataKeys
from services.tenant.adapters.postgres_domains import PostgresDomains
from services.tenant.adapters.postgres_flags import PostgresFlags
from services.tenant.adapters.postgres_issuers import PostgresIssuers
from services.tenant.adapters.postgres_keys import PostgresKeys
from services.tenant.adapters.postgres_provisioning import PostgresProvisioning
from services.tenant.adapters.postgres_remains import PostgresRemains
from services.tenant.adapters.postgres_secrets import PostgresSecrets
from services.tenant.adapters.postgres_tenants import PostgresTenants
from services.tenant.adapters.postgres_users import PostgresUsers
from services.tenant.audit_head import HeadSigner
from services.tenant.audit_log import AuditLog
from services.tenant.authentication import Authenticator
from services.tenant.change_hub import ChangeHub
from services.tenant.configuration import TenantConfiguration
from services.tenant.context_minting import (
    ContextMinter,
    new_signing_seed,
    public_key_id,
    public_key_text,
    read_public_keys,
    read_signing_key,
)
from services.tenant.data_keys import DataKeyVault
from services.tenant.domain import DomainRegistry
from services.tenant.flag_keeping import FlagKeeping
from services.tenant.flag_set_cache import FlagSetCache
from services.tenant.issuer import IssuerRegistry
from services.tenant.jwks_cache import JwksCache, JwksSource
from services.tenant.jwt_proof import JwtProof
from services.tenant.key_management import parse_master_keys
from services.tenant.key_ring import KeyRing
from services.tenant.key_rotation import KeyRotation
from services.tenant.local_credential_resolver import LocalCredentialResolver
from services.tenant.name_resolution import NameResolution
from services.tenant.provider_keys import ProviderKeys
from services.tenant.provisioning import Step, TenantProvisioning
from services.tenant.secret_box import SecretBox
from services.tenant.servicers.api_key import ApiKeyServicer
from services.tenant.servicers.audit import AuditServicer
from services.tenant.servicers.authentication import AuthenticationServicer
from services.tenant.servicers.configuration import ConfigurationServicer
from services.tenant.servicers.data_key import DataKeyServicer
from services.tenant.servicers.domain import DomainServicer
from services.tenant.servicers.flag import FlagServicer
from services.tenant.servicers.issuer import IssuerServicer
from services.tenant.servicers.lifecycle import LifecycleServicer
from services.tenant.servicers.plan import PlanServicer
from services.tenant.servicers.secret import SecretServicer
from services.tenant.servicers.tenant import TenantServicer
from services.tenant.servicers.user import UserServicer
from services.tenant.settings import TenantSettings
from services.tenant.tenant_remains import TenantRemains
from services.tenant.usage_trail import UsageTrailBuffer
from services.tenant.user import UserDirectory

log = structlog.get_logger(__name__)

SCHEMA = "tenant"
MIGRATIONS = Path(__file__).parent / "migrations"
# What began in a token's life may end after it.
LONGEST_CALL = timedelta(hours=1)
KEY_STORE_SCHEMA = "tenant_keys"
KEY_STORE_MIGRATIONS = Path(__file__).parent / "key_store_migrations"
PLAN_FILE = Path(__file__).parent / "plans.yaml"


class TenantApp:
    """The running parts of the service."""

    def __init__(self, server: MeshServer, trail: UsageTrailBuffer, resources: AsyncExitStack) -> None:
        self.server = server
        self.trail = trail
        self._resources = resources

    async def close(self) -> None:
        """Writes what the trail still holds, then closes loops, channels and pool."""
        await self._resources.aclose()


async def build(settings: TenantSettings) -> TenantApp:
    """Builds the service; it starts while Postgres or the other services are away."""
    async with AsyncExitStack() as stack:
        database = await TenantDatabase.open(
            settings.postgres_dsn.get_secret_value(),
            application_name="tenantry-tenant",
            transaction_pooling=settings.postgres_transaction_pooling,
        )
        stack.push_async_callback(database.close)
        credentials = PostgresCredentials(database)
        trail = UsageTrailBuffer(credentials)
        stack.push_async_callback(_write_rest, trail)
        background = BackgroundTasks()
        stack.push_async_callback(background.close)
        background.start("usage_trail", trail.run)
        minter = ContextMinter(
            read_signing_key(settings.context_signing_key.get_secret_value()),
            read_public_keys(settings.context_additional_public_keys),
            region=settings.region,
            clock=_now,
        )
        changes = await _changes(settings, stack, background)
        flags = FlagSetCache(PostgresFlags(database))
        background.start("flag_set", flags.run)
        jwks = HttpJwksSource()
        stack.push_async_callback(jwks.close)
        names = NameResolution(PostgresDomains(database), PostgresTenants(database), settings.base_domain_names())
        authenticator = Authenticator(
            credentials,
            trail,
            minter,
            JwtProof(PostgresIssuers(database), JwksCache(jwks), clock=_now),
            names,
            flags=flags,
            operator_key_hashes=settings.operator_key_hashes(),
            front_key_hashes=settings.front_key_hashes(),
            clock=_now,
        )
        vault = DataKeyVault(await _key_store(settings, stack), _master_keys(settings), trail)
        box = SecretBox(vault, trail)
        server = _server(settings, database, authenticator, names, jwks, minter, _peers(settings, stack), changes, vault, box)
        server.on_drain(changes.close)
        return TenantApp(server, trail, stack.pop_all())


async def _changes(settings: TenantSettings, stack: AsyncExitStack, background: BackgroundTasks) -> ChangeHub:
    dsn, pooled = settings.postgres_dsn.get_secret_value(), settings.postgres_transaction_pooling
    database = await TenantDatabase.open(dsn, max_size=1, application_name="tenantry-tenant-changes", transaction_pooling=pooled)
    stack.push_async_callback(database.close)
    hub = ChangeHub(PostgresChanges(database))
    background.start("change_hub", hub.run)
    background.start("change_trimmer", hub.run_trimmer)
    if not pooled:
        # Through a pooler it would hear nothing, and leave a LISTEN on somebody's connection.
        background.start("change_listener", ChangeListener(dsn, hub.wake).run)
    return hub


async def migrate_schema(settings: TenantSettings) -> None:
    """Brings the schema and the plans forward."""
    admin_dsn = settings.postgres_admin_dsn.get_secret_value()
    await migrate(admin_dsn, SCHEMA, MIGRATIONS, {"service": settings.postgres_dsn.get_secret_value()})
    await load_plans(admin_dsn, read_plan_file(PLAN_FILE))
    key_store = {"service": settings.key_store_dsn.get_secret_value()}
    await migrate(settings.key_store_admin_dsn.get_secret_value(), KEY_STORE_SCHEMA, KEY_STORE_MIGRATIONS, key_store)


def new_context_key(_: TenantSettings) -> str:
    """Makes a signing key and says which settings take it and its public half."""
    seed = new_signing_seed()
    return f"TENANTRY_CONTEXT_SIGNING_KEY={seed}\n# for TENANTRY_CONTEXT_ADDITIONAL_PUBLIC_KEYS: {public_key_text(seed)}"


def context_public_key(settings: TenantSettings) -> str:
    """Returns the public half of the signing key in use: what stays published for 300 s after the next one took over."""
    return public_key_text(settings.context_signing_key.get_secret_value())


def _server(
    settings: TenantSettings,
    database: TenantDatabase,
    authenticator: Authenticator,
    names: NameResolution,
    jwks: JwksSource,
    minter: ContextMinter,
    peers: dict[Step, tuple[str, GrpcLifecyclePeer]],
    changes: ChangeHub,
    vault: DataKeyVault,
    box: SecretBox,
) -> MeshServer:
    tenants, secrets = PostgresTenants(database), PostgresSecrets(database)
    rotation = KeyRotation(vault, box, secrets, [peer for _, peer in peers.values()], tenants, minter)
    provisioning = TenantProvisioning(PostgresProvisioning(database), tenants, dict(peers), minter, region=settings.region)
    return MeshServer(
        settings,
        servicers=[
            (
                authentication_service_pb2_grpc.add_AuthenticationServiceServicer_to_server,
                AuthenticationServicer(authenticator, names, minter, changes),
                "mesh.tenant.v1.AuthenticationService",
            ),
            (
                tenant_service_pb2_grpc.add_TenantServiceServicer_to_server,
                TenantServicer(provisioning, tenants),
                "mesh.tenant.v1.TenantService",
            ),
            (
                api_key_service_pb2_grpc.add_ApiKeyServiceServicer_to_server,
                ApiKeyServicer(KeyRing(PostgresKeys(database), clock=_now)),
                "mesh.tenant.v1.ApiKeyService",
            ),
            (
                audit_service_pb2_grpc.add_AuditServiceServicer_to_server,
                AuditServicer(_audit_log(settings, database, minter)),
                "mesh.tenant.v1.AuditService",
            ),
            (plan_service_pb2_grpc.add_PlanServiceServicer_to_server, PlanServicer(tenants), "mesh.tenant.v1.PlanService"),
            *_settings_servicers(database, tenants),
            (
                lifecycle_service_pb2_grpc.add_TenantLifecycleServiceServicer_to_server,
                LifecycleServicer(TenantRemains(PostgresRemains(database), vault, secrets), rotation),
                "mesh.common.v1.TenantLifecycleService",
            ),
            *_identity_servicers(settings, database, jwks),
            *_key_registrations(vault, rotation, ProviderKeys(secrets, box)),
        ],
        resolver=LocalCredentialResolver(authenticator),
        verifier=ContextTokenVerifier(minter),
    )


def _audit_log(settings: TenantSettings, database: TenantDatabase, minter: ContextMinter) -> AuditLog:
    key = read_signing_key(settings.context_signing_key.get_secret_value())
    others = read_public_keys(settings.context_additional_public_keys)
    public_keys = {public_key_id(public): public for public in (key.private_key.public_key(), *others)}
    verifier = ContextTokenVerifier(minter)

    async def prove(token: str, moment: datetime) -> TenantContext:
        return await verifier.verify_as_of(token, moment, grace=LONGEST_CALL)

    return AuditLog(PostgresAuditLog(database), HeadSigner(key, public_keys, _now), prove)


def _identity_servicers(settings: TenantSettings, database: TenantDatabase, jwks: JwksSource) -> list[Registration]:
    return [
        (
            issuer_service_pb2_grpc.add_IssuerServiceServicer_to_server,
            IssuerServicer(IssuerRegistry(PostgresIssuers(database), jwks)),
            "mesh.tenant.v1.IssuerService",
        ),
        (
            domain_service_pb2_grpc.add_DomainServiceServicer_to_server,
            DomainServicer(DomainRegistry(PostgresDomains(database), settings.base_domain_names())),
            "mesh.tenant.v1.DomainService",
        ),
        (
            user_service_pb2_grpc.add_UserServiceServicer_to_server,
            UserServicer(UserDirectory(PostgresUsers(database))),
            "mesh.tenant.v1.UserService",
        ),
    ]


def _settings_servicers(database: TenantDatabase, tenants: PostgresTenants) -> list[Registration]:
    return [
        (
            configuration_service_pb2_grpc.add_ConfigurationServiceServicer_to_server,
            ConfigurationServicer(TenantConfiguration(PostgresConfiguration(database))),
            "mesh.tenant.v1.ConfigurationService",
        ),
        (
            flag_service_pb2_grpc.add_FlagServiceServicer_to_server,
            FlagServicer(FlagKeeping(PostgresFlags(database), tenants)),
            "mesh.tenant.v1.FlagService",
        ),
    ]


def _key_registrations(vault: DataKeyVault, rotation: KeyRotation, provider_keys: ProviderKeys) -> list[Registration]:
    return [
        (
            data_key_service_pb2_grpc.add_DataKeyServiceServicer_to_server,
            DataKeyServicer(vault, rotation),
            "mesh.tenant.v1.DataKeyService",
        ),
        (secret_service_pb2_grpc.add_SecretServiceServicer_to_server, SecretServicer(provider_keys), "mesh.tenant.v1.SecretService"),
    ]


async def _key_store(settings: TenantSettings, stack: AsyncExitStack) -> PostgresDataKeys:
    database = await TenantDatabase.open(
        settings.key_store_dsn.get_secret_value(),
        max_size=4,
        application_name="tenantry-tenant-keys",
        transaction_pooling=settings.postgres_transaction_pooling,
    )
    stack.push_async_callback(database.close)
    return PostgresDataKeys(database)


def _master_keys(settings: TenantSettings) -> EnvironmentMasterKeys:
    return EnvironmentMasterKeys(parse_master_keys(settings.master_keys.get_secret_value()))


def _peers(settings: TenantSettings, stack: AsyncExitStack) -> dict[Step, tuple[str, GrpcLifecyclePeer]]:
    addresses = {
        Step.RETRIEVAL: settings.retrieval_address,
        Step.INFERENCE: settings.inference_address,
        Step.RATELIMIT: settings.ratelimit_address,
        Step.METERING: settings.metering_address,
    }
    peers: dict[Step, tuple[str, GrpcLifecyclePeer]] = {}
    for step, address in addresses.items():
        name = step.name.lower()
        channel = MeshChannel(address, settings=settings, target_service=name)
        stack.push_async_callback(channel.close)
        peers[step] = (name, GrpcLifecyclePeer(channel))
    return peers


async def _write_rest(trail: UsageTrailBuffer) -> None:
    try:
        await trail.flush(everything=True)
    except Unavailable as error:
        log.warning("usage_trail_lost", reason=error.reason_name)


def _now() -> datetime:
    return datetime.now(UTC)
