"""A tenant's billing books in Postgres, as the service role: read in one snapshot, and added to under the tenant's lock."""

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from uuid import UUID

from services.kernel.errors import ContentConflict, InvalidRequest, NotFound, WrongState
from services.kernel.ids import TenantId
from services.kernel.placement import HOME
from services.kernel.tenant_database import Connection, TenantDatabase
from services.metering.adapters.postgres_billing_reader import PostgresBillingReader, credit_of, hold_months, subscription_of
from services.metering.billing.books import BillingReader, CreditGrant, StoredInvoice
from services.metering.billing.credits import Credit
from services.metering.billing.making import anchor_day as current_anchor_day
from services.metering.billing.proration import Subscription

# Statements of their own, before any clock is read: see 0003 and 0009. What is checked against closings excludes them meanwhile.
LOCK_SHARED = "SELECT pg_advisory_xact_lock_shared(metering.tenant_lock($1))"
LOCK_EXCLUSIVE = "SELECT pg_advisory_xact_lock(metering.tenant_lock($1))"
SELECT_ERASED = "SELECT EXISTS (SELECT FROM metering.erased_tenants WHERE tenant_id = $1)"
SELECT_PLAN = "SELECT EXISTS (SELECT FROM metering.billing_plan_versions WHERE plan = $1)"
_SUBSCRIPTION = "SELECT number, plan, effective_time, anchor_day FROM metering.subscriptions"
SELECT_SUBSCRIPTION = _SUBSCRIPTION + " WHERE tenant_id = $1 AND subscription_id = $2"
# A sum of events is in one span: none may begin within it. Also of a month that is about to be dropped.
SELECT_CUTS_A_SUM = """
SELECT EXISTS (SELECT FROM metering.event_sums
               WHERE tenant_id = $1 AND use_time < $2 AND use_time >= date_trunc('hour', $2::timestamptz, 'UTC'))
"""
INSERT_SUBSCRIPTION = """
INSERT INTO metering.subscriptions (tenant_id, number, subscription_id, plan, effective_time, anchor_day, record_time)
VALUES ($1, $2, $3, $4, coalesce($5::timestamptz, date_trunc('second', clock_timestamp())), $6, clock_timestamp())
RETURNING number, plan, effective_time, anchor_day
"""
SELECT_CREDIT = """
SELECT credit_id, amount_nano_usd, priority, effective_time, expire_time, reason, record_time, digest FROM metering.credits
WHERE tenant_id = $1 AND credit_id = $2
"""
INSERT_CREDIT = """
INSERT INTO metering.credits (tenant_id, credit_id, amount_nano_usd, priority, effective_time, expire_time, reason, digest, record_time)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, clock_timestamp()) ON CONFLICT DO NOTHING
"""
SELECT_NOTE_DIGEST = "SELECT digest FROM metering.credit_notes WHERE tenant_id = $1 AND credit_note_id = $2"
INSERT_NOTE = """
INSERT INTO metering.credit_notes (tenant_id, credit_note_id, number, amount_nano_usd, reason, digest, issue_time)
VALUES ($1, $2, $3, $4, $5, $6, clock_timestamp())
"""


class PostgresBilling:
    """Works in transactions of the tenant; invoices themselves are written elsewhere."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    @asynccontextmanager
    async def reading(self, tenant_id: TenantId) -> AsyncIterator[BillingReader]:
        """Begins a transaction of one snapshot."""
        async with self._database.transaction_at(HOME, tenant_id, snapshot=True) as connection:
            await hold_months(connection)
            yield PostgresBillingReader(connection, tenant_id)

    async def subscribe(
        self, tenant_id: TenantId, subscription_id: UUID, plan: str, effective_time: datetime | None, anchor_day: int
    ) -> Subscription:
        """Adds a subscription, once for its id; no time: from now on; anchor day 0: as before."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_EXCLUSIVE, tenant_id)
            known = await connection.fetchrow(SELECT_SUBSCRIPTION, tenant_id, subscription_id)
            if known is not None:
                return _same_subscription(subscription_of(known), plan, effective_time, anchor_day)
            await _refuse_erased(connection, tenant_id)
            if not await connection.fetchval(SELECT_PLAN, plan):
                raise NotFound("billing_plan", f"no terms are loaded for the plan {plan}; billing_plans.yaml has those that are")
            reader = PostgresBillingReader(connection, tenant_id)
            subscriptions, closings = await reader.subscriptions(), await reader.closings()
            anchor = anchor_day or current_anchor_day(subscriptions)
            if closings and effective_time is not None and effective_time < closings[-1].period.end_time:
                end = closings[-1].period.end_time.isoformat()
                raise WrongState("billing_period", "CLOSED", f"everything before {end} is closed: let the plan begin then or later")
            if closings and anchor != current_anchor_day(subscriptions):
                raise WrongState("billing_period", "CLOSED", "the day that periods begin on cannot change once an invoice is closed")
            if await connection.fetchval(SELECT_CUTS_A_SUM, tenant_id, effective_time):
                why = "events of that hour are kept as their sum alone: let the plan begin with a whole hour"
                raise WrongState("billing_period", "CLOSED", why)
            number = len(subscriptions) + 1
            row = await connection.fetchrow(INSERT_SUBSCRIPTION, tenant_id, number, subscription_id, plan, effective_time, anchor)
        return subscription_of(row)

    async def grant(self, tenant_id: TenantId, grant: CreditGrant) -> Credit:
        """Adds a credit, once for its id; returns what is stored."""
        expiry = "" if grant.expire_time is None else grant.expire_time.isoformat()
        said = _digest(grant.amount_nano_usd, grant.priority, grant.effective_time.isoformat(), expiry, grant.reason)
        terms = (grant.amount_nano_usd, grant.priority, grant.effective_time, grant.expire_time, grant.reason)
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_SHARED, tenant_id)
            row = await connection.fetchrow(SELECT_CREDIT, tenant_id, grant.credit_id)
            if row is None:
                await _refuse_erased(connection, tenant_id)
                await connection.execute(INSERT_CREDIT, tenant_id, grant.credit_id, *terms, said)
                row = await connection.fetchrow(SELECT_CREDIT, tenant_id, grant.credit_id)
        _refuse_other("credit", row["digest"], said)
        return credit_of(row)

    async def note(self, tenant_id: TenantId, invoice_id: UUID, credit_note_id: UUID, amount: int, reason: str) -> StoredInvoice:
        """Adds a credit note, once for its id; all notes of an invoice together are at most what it asks for."""
        said = _digest(str(invoice_id), amount, reason)
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_EXCLUSIVE, tenant_id)
            reader = PostgresBillingReader(connection, tenant_id)
            known = await connection.fetchval(SELECT_NOTE_DIGEST, tenant_id, credit_note_id)
            stored = await _invoice(reader, invoice_id)
            if known is not None:
                _refuse_other("credit_note", known, said)
                return stored
            left = stored.invoice.content.due_nano_usd - sum(item.amount_nano_usd for item in stored.notes)
            if amount > left:
                raise InvalidRequest("amount", f"the invoice asks for {left} nano-USD after its other notes; credit at most that")
            number = stored.invoice.closing.number
            await connection.execute(INSERT_NOTE, tenant_id, credit_note_id, number, amount, reason, said)
            return await _invoice(reader, invoice_id)


async def _refuse_erased(connection: Connection, tenant_id: TenantId) -> None:
    if await connection.fetchval(SELECT_ERASED, tenant_id):
        raise WrongState(
            "tenant", "ERASED", "it is billed to its end, and nothing new is added: credit notes take back what it should not pay"
        )


async def _invoice(reader: PostgresBillingReader, invoice_id: UUID) -> StoredInvoice:
    stored = await reader.invoice(invoice_id)
    if stored is None:
        raise NotFound("invoice")
    return stored


def _same_subscription(stored: Subscription, plan: str, effective_time: datetime | None, anchor_day: int) -> Subscription:
    # What was left to the ledger the first time may be left to it again.
    wanted = (plan, effective_time or stored.effective_time, anchor_day or stored.anchor_day)
    held = (stored.plan, stored.effective_time, stored.anchor_day)
    _refuse_other("subscription", *(_digest(name, time.isoformat(), day) for name, time, day in (held, wanted)))
    return stored


def _refuse_other(resource: str, stored: bytes, wanted: bytes) -> None:
    if stored != wanted:
        raise ContentConflict(
            resource,
            f"this {resource} id was used before with other content: use a new id for another {resource}",
            stored_digest=stored.hex(),
            request_digest=wanted.hex(),
        )


def _digest(*content: object) -> bytes:
    return hashlib.sha256(json.dumps(content).encode()).digest()
