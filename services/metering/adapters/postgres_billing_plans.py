"""Versions of billing plans in Postgres: written by `migrate` as the owner, and never changed."""

import json
from collections.abc import Sequence

from services.kernel.tenant_database import Connection, JobsDatabase
from services.metering.billing.plan_file import PlanChange, changes_to_load
from services.metering.billing.terms import PlanVersion, terms_form

BECOME_OWNER = "SET LOCAL ROLE metering_owner"
# Two processes that migrate at once take turns; the lock ends with the transaction.
LOCK_VERSIONS = "LOCK TABLE metering.billing_plan_versions IN SHARE ROW EXCLUSIVE MODE"
SELECT_DIGESTS = "SELECT plan, version, digest FROM metering.billing_plan_versions"
INSERT_VERSION = """
INSERT INTO metering.billing_plan_versions (plan, version, effective_time, terms, digest) VALUES ($1, $2, $3, $4::jsonb, $5)
"""


async def load_billing_plans(admin: JobsDatabase, versions: Sequence[PlanVersion]) -> Sequence[PlanChange]:
    """Stores versions that are not stored yet, all or nothing, and returns them. Idempotent. Raises: BillingPlansRefused."""
    async with admin.transaction() as connection:
        await connection.execute(BECOME_OWNER)
        await connection.execute(LOCK_VERSIONS)
        changes = await _changes(connection, versions)
        for change in changes:
            item = change.version
            terms = json.dumps(terms_form(item.terms))
            await connection.execute(INSERT_VERSION, item.plan, item.version, item.effective_time, terms, item.digest)
    return changes


async def billing_plan_changes(admin: JobsDatabase, versions: Sequence[PlanVersion]) -> Sequence[PlanChange]:
    """Returns what loading would add, and adds nothing. Raises: BillingPlansRefused."""
    async with admin.transaction() as connection:
        return await _changes(connection, versions)


async def _changes(connection: Connection, versions: Sequence[PlanVersion]) -> Sequence[PlanChange]:
    stored = {(row["plan"], row["version"]): bytes(row["digest"]) for row in await connection.fetch(SELECT_DIGESTS)}
    return changes_to_load(versions, stored, await connection.fetchval("SELECT clock_timestamp()"))
