"""The composition root: builds the service room by room, migrates its stores, and closes everything in reverse order."""

from contextlib import AsyncExitStack
from pathlib import Path

from services.kernel.context_token import ContextTokenVerifier
from services.kernel.migrate import migrate
from services.kernel.rpc.server import MeshServer
from services.tenant.adapters.plan_loader import load_plans, read_plan_file
from services.tenant.adapters.schema_maker import prepare_schema_maker
from services.tenant.app.life import build_life
from services.tenant.app.parts import build_parts
from services.tenant.app.terms import build_terms
from services.tenant.app.trust import build_trust
from services.tenant.context_minting import new_signing_seed, public_key_text
from services.tenant.local_credential_resolver import LocalCredentialResolver
from services.tenant.settings import TenantSettings
from services.tenant.usage_trail import UsageTrailBuffer

HOME = Path(__file__).parent.parent
SCHEMA = "tenant"
MIGRATIONS = HOME / "migrations"
KEY_STORE_SCHEMA = "tenant_keys"
KEY_STORE_MIGRATIONS = HOME / "key_store_migrations"
PLAN_FILE = HOME / "plans.yaml"


class TenantApp:
    """The running parts of the service."""

    def __init__(self, server: MeshServer, trail: UsageTrailBuffer, resources: AsyncExitStack) -> None:
        self.server = server
        self.trail = trail
        self._resources = resources

    async def close(self) -> None:
        """Writes what the trail still holds, then closes loops, channels and pools."""
        await self._resources.aclose()


async def build(settings: TenantSettings) -> TenantApp:
    """Builds the service; it starts while Postgres or the other services are away."""
    async with AsyncExitStack() as stack:
        parts = await build_parts(settings, stack)
        authenticator, changes, trust = await build_trust(parts)
        rotation, terms = build_terms(parts)
        server = MeshServer(
            settings,
            servicers=[*trust, *terms, *build_life(parts, rotation)],
            resolver=LocalCredentialResolver(authenticator),
            verifier=ContextTokenVerifier(parts.minter),
        )
        server.on_drain(changes.close)
        return TenantApp(server, parts.trail, stack.pop_all())


async def migrate_schema(settings: TenantSettings) -> None:
    """Brings the schema, the plans and the key store forward."""
    admin_dsn = settings.postgres_admin_dsn.get_secret_value()
    roles = {"service": settings.postgres_dsn.get_secret_value(), "jobs": settings.postgres_jobs_dsn.get_secret_value()}
    await migrate(admin_dsn, SCHEMA, MIGRATIONS, roles)
    await prepare_schema_maker(admin_dsn, settings.postgres_placement_dsn.get_secret_value())
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
