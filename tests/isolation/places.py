"""Tenants' own places as the attackers find them: every table with a row in it, and a replica that has heard of no place at all."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

import asyncpg

from devstack.environment import DATABASE
from devstack.ports import LOOPBACK
from devstack.stack import Stack
from services.kernel.ids import TenantId
from services.kernel.placement import PlaceDirectory, Whereabouts
from services.kernel.silo_pools import SiloPools
from services.kernel.tenant_context import TenantContext
from services.kernel.tenant_database import TenantDatabase
from tests.isolation.fingerprint import own_place, tenant_tables
from tests.isolation.postgres_attacks import Attacked, attacked_rows
from tests.isolation.target import Target

# What a tenant keeps in its own place; the rest are short lists and marks.
CONTENT = frozenset({"prompts", "conversations", "turns", "documents", "chunks"})

# Rows of tables that are empty while nothing is under way: far in the future, so that no sweep and no relay takes them up meanwhile.
TRANSIENT = {
    "metering.call_leases": "INSERT INTO metering.call_leases VALUES ($1, uuidv7(), now() + interval '1 day')",
    "metering.outbox": (
        "INSERT INTO metering.outbox (tenant_id, reservation_id, kind, epoch, tokens, cost_nano_usd, due_time) "
        "VALUES ($1, uuidv7(), 2, 0, 0, 0, now() + interval '1 day')"
    ),
    "metering.usage_pending": (
        "INSERT INTO metering.usage_pending (tenant_id, sign, use_time, provider, model, feature, user_name, prompt_version, tier, "
        "product_unit, state, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, "
        "quantity, first_token_ms, total_ms) VALUES ($1, 1, now(), '', '', '', '', '', '', 'planted', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)"
    ),
    "metering.budget_marks": (
        "INSERT INTO metering.budget_marks (tenant_id, use_quarter, product_unit) VALUES ($1, '2026-01-01T00:00:00Z', 'planted')"
    ),
    "metering.webhook_deliveries": (
        "INSERT INTO metering.webhook_deliveries (tenant_id, delivery_id, endpoint_id, event_id, event_type, data, create_time, due_time) "
        "SELECT $1, uuidv7(), endpoint_id, uuidv7(), 'planted', '{}', now(), now() + interval '1 day' FROM metering.webhook_endpoints "
        "WHERE tenant_id = $1 LIMIT 1"
    ),
    "metering.stripe_customers": "INSERT INTO metering.stripe_customers VALUES ($1, 'cus_planted')",
    "metering.export_outbox": (
        "INSERT INTO metering.export_outbox (tenant_id, sink, usage_id, meter, event_name, source, quantity, use_time, record_time, "
        "due_time) VALUES ($1, 1, uuidv7(), 'planted', 'planted', 3, 1, now(), now(), now() + interval '1 day')"
    ),
    "metering.usage_levels": (
        "INSERT INTO metering.usage_levels (tenant_id, grain, start_time, series, level, feature, user_name, product_unit, event_type, "
        "events) VALUES ($1, 3, now(), uuidv7(), 1, '', 'planted', 'seats', 'screening/seats.open', 1)"
    ),
    "metering.summed_event_months": "INSERT INTO metering.summed_event_months VALUES ($1, '1990-01-01', now(), 1)",
    "metering.refusals": (
        "INSERT INTO metering.refusals (tenant_id, minute, replica, series, reason, rule, model, feature, user_name, tier, refusals) "
        "VALUES ($1, now(), uuidv7(), uuidv7(), 'PLAN_LIMIT', '', '', '', 'planted', '', 1)"
    ),
    "inference.audit_outbox": (
        "INSERT INTO inference.audit_outbox (tenant_id, audit_id, action, call_id, occur_time, user_name, document_ids, detail, "
        "peer_address, context_token, due_time) "
        "VALUES ($1, uuidv7(), 'CALL_ENDED', uuidv7(), now(), '', '{}', '{}', '', '', now() + interval '1 day')"
    ),
    "inference.audit_set_aside": (
        "INSERT INTO inference.audit_set_aside (tenant_id, audit_id, cause, entry) VALUES ($1, uuidv7(), 'planted', '{}')"
    ),
    "inference.inference_sealing": "INSERT INTO inference.inference_sealing VALUES ($1, 1)",
    "retrieval.retrieval_sealing": "INSERT INTO retrieval.retrieval_sealing VALUES ($1, 1)",
    # On their way elsewhere and still here: who was away would be refused.
    "inference.inference_placed_tenants": "INSERT INTO inference.inference_placed_tenants VALUES ($1, 'silo', 'MOVING')",
    "retrieval.retrieval_placed_tenants": "INSERT INTO retrieval.retrieval_placed_tenants VALUES ($1, 'silo', 'MOVING')",
    "tenant.unrecorded_keys": "INSERT INTO tenant.unrecorded_keys VALUES ($1, now() + interval '1 day')",
    "tenant.placements": "INSERT INTO tenant.placements (tenant_id, kind) VALUES ($1, 'pool')",
    "tenant.move_directory": "INSERT INTO tenant.move_directory VALUES ($1, now() + interval '1 day')",
    "tenant.erasure_receipts": (
        "INSERT INTO tenant.erasure_receipts (tenant_id, request_id, body, signature, key_id) "
        "VALUES ($1, uuidv7(), '{}', decode(repeat('00', 64), 'hex'), 'none')"
    ),
    "tenant.purges": "INSERT INTO tenant.purges VALUES ($1, now() + interval '1 day')",
    "retrieval.removed_documents": "INSERT INTO retrieval.removed_documents VALUES ($1, uuidv7(), now() + interval '1 day')",
    # Last: what is planted after a tombstone is refused.
    "inference.erased_tenants": "INSERT INTO inference.erased_tenants VALUES ($1)",
    "metering.erased_tenants": "INSERT INTO metering.erased_tenants VALUES ($1)",
    "retrieval.erased_tenants": "INSERT INTO retrieval.erased_tenants VALUES ($1)",
}
# The locks that whoever folds, and whoever looks at budgets, takes.
HOLD_FOLDS = "SELECT pg_advisory_lock(7405, 0), pg_advisory_lock(7405, 1)"
LET_FOLDS_GO = "SELECT pg_advisory_unlock(7405, 0), pg_advisory_unlock(7405, 1)"


class Everywhere:
    """Answers where tenants are: all of them at the same place."""

    def __init__(self, whereabouts: Whereabouts) -> None:
        self._whereabouts = whereabouts

    async def fetch(self, tenant_id: TenantId, context: TenantContext | None) -> Whereabouts:
        """Returns it to whoever asks."""
        return self._whereabouts


@asynccontextmanager
async def transient_rows(admin: asyncpg.Connection, planting: Mapping[str, str], tenant_ids: Sequence[UUID]) -> AsyncIterator[None]:
    """Plants a row of each tenant in each of these tables and takes them away again; nobody folds or looks at budgets meanwhile."""
    await admin.execute(HOLD_FOLDS)
    try:
        for sql in planting.values():
            for tenant_id in tenant_ids:
                # A row that an earlier attack on its own tenant left behind does as well.
                await admin.execute(f"{sql} ON CONFLICT DO NOTHING", tenant_id)
        yield
    finally:
        # The last first: tombstones keep nothing else from going.
        for table in reversed(list(planting)):
            await admin.execute(f"DELETE FROM {table} WHERE tenant_id = ANY($1)", list(tenant_ids))
        await admin.execute(LET_FOLDS_GO)


@asynccontextmanager
async def full(stack: Stack, target: Target, attacker: Target) -> AsyncIterator[tuple[asyncpg.Connection, list[Attacked]]]:
    """A superuser in the database of a placed tenant, every table of whose place holds a row of it. Raises: AssertionError otherwise."""
    database, schemas = await own_place(stack, TenantId(target.tenant_id))
    admin = await asyncpg.connect(stack.postgres.dsn(database))
    try:
        tables = await tenant_tables(admin, schemas)
        planting = {table: TRANSIENT[home].replace(home, table) for table in tables if (home := home_name(table)) in TRANSIENT}
        async with transient_rows(admin, planting, [target.tenant_id, attacker.tenant_id]):
            yield admin, await attacked_rows(admin, tables, target.tenant_id)
    finally:
        await admin.close()


def home_name(table: str) -> str:
    """What a table of a tenant's own place is called in the shared database."""
    name = table.partition(".")[2]
    return next((home for home in TRANSIENT if home.partition(".")[2] == name and home.startswith(("inference.", "retrieval."))), table)


@asynccontextmanager
async def following(stack: Stack, service: str, whereabouts: Whereabouts) -> AsyncIterator[TenantDatabase]:
    """A service's own database code on a single connection, told that every tenant that is not at home is there."""
    password = stack.state.secrets.role_passwords[service]
    port = stack.ports.pgbouncer if stack.wiring.pgbouncer else stack.ports.postgres
    dsn = f"postgresql://{service}_service:{password}@{LOOPBACK}:{port}/{DATABASE}"
    database = await TenantDatabase.open(dsn, max_size=1, application_name="following", transaction_pooling=stack.wiring.pgbouncer)
    silos = SiloPools(1)
    database.follow(service, PlaceDirectory(Everywhere(whereabouts)), silos)
    try:
        yield database
    finally:
        await silos.close()
        await database.close()


async def filled_tables(stack: Stack, target: Target) -> set[str]:
    """The tables of a tenant's own place that hold rows of it, without their schemas."""
    database, schemas = await own_place(stack, TenantId(target.tenant_id))
    admin = await asyncpg.connect(stack.postgres.dsn(database))
    try:
        tables = await tenant_tables(admin, schemas)
        return {
            table.partition(".")[2]
            for table in tables
            if await admin.fetchval(f"SELECT true FROM {table} WHERE tenant_id = $1 LIMIT 1", target.tenant_id)
        }
    finally:
        await admin.close()
