"""Tenants' configurations in Postgres: a change, its history, its audit record and its announcement are one transaction."""

import json
from collections.abc import Sequence
from dataclasses import replace

from services.kernel.errors import WrongState
from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection, TenantDatabase
from services.tenant.actor import Actor
from services.tenant.adapters.configuration_rows import configuration_of, own_rules_form, plan_of
from services.tenant.adapters.postgres_audit import append_audit
from services.tenant.adapters.postgres_tenants import GET_CONFIG, LIST_PLANS
from services.tenant.configuration import (
    PLAN_PATH,
    ConfigurationChange,
    Decide,
    Outcome,
    Pace,
    audited_paths,
    changed_paths,
    values_at,
)
from services.tenant.effective_config import OVERRIDE_NAMES, StoredConfiguration
from services.tenant.limit_changes import is_limit_path
from services.tenant.plan_rules import guard_form

# The tenant's row makes changes take turns, so that each is judged by what the one before it left.
LOCK_TENANT = "SELECT tenant_id FROM tenant.tenants WHERE tenant_id = $1 FOR UPDATE"
UPDATE_SETTINGS = f"""
UPDATE tenant.tenant_settings
SET {", ".join(f"{name} = ${position}" for position, name in enumerate(OVERRIDE_NAMES, start=3))},
    limit_rules = ${len(OVERRIDE_NAMES) + 3}::jsonb, time_zone = ${len(OVERRIDE_NAMES) + 4},
    cycle_anchor_time = ${len(OVERRIDE_NAMES) + 5}, abuse_guard = ${len(OVERRIDE_NAMES) + 6}::jsonb,
    operator_fields = $2, config_version = config_version + 1, update_time = now()
WHERE tenant_id = $1 RETURNING config_version
"""  # noqa: S608 - the names of this service's own columns
UPDATE_PLAN = "UPDATE tenant.tenants SET plan = $2 WHERE tenant_id = $1"
INSERT_CHANGE = """
INSERT INTO tenant.configuration_changes (tenant_id, version, subject, reason, changed_fields, before, after)
VALUES ($1, $2, $3, $4, $5, $6::jsonb, $7::jsonb)
"""
# Versions rise with time, as the tenant's row is locked: the newest are at the end of the key, and of a long history few are read.
OWN_LIMIT_CHANGES = """
SELECT extract(epoch FROM clock_timestamp() - change_time)::float8 FROM (
    SELECT change_time, subject, changed_fields FROM tenant.configuration_changes WHERE tenant_id = $1 ORDER BY version DESC LIMIT 500
) AS newest
WHERE subject NOT LIKE 'operator:%' AND EXISTS (SELECT FROM unnest(changed_fields) AS path WHERE path LIKE 'limit_rules.%')
ORDER BY change_time DESC
"""
ANNOUNCE = "SELECT tenant.announce($1, 'CONFIG')"
LIST_CHANGES = """
SELECT version, change_time, subject, reason, changed_fields, before::text, after::text FROM tenant.configuration_changes
WHERE tenant_id = $1 AND version < $2 ORDER BY version DESC LIMIT $3
"""


class PostgresConfiguration:
    """The configuration store on the service's own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def read(self, tenant_id: TenantId) -> StoredConfiguration | None:
        """Returns the newest configuration in one round trip."""
        row = await self._database.fetch_row(tenant_id, GET_CONFIG, tenant_id)
        return None if row is None else configuration_of(row)

    async def change(
        self, tenant_id: TenantId, decide: Decide, actor: Actor, *, validate_only: bool, pace: Pace | None = None
    ) -> Outcome | None:
        """Writes what is decided; None for no such tenant. Raises: what `decide` and `pace` raise, and then nothing is written."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            row = await connection.fetchrow(GET_CONFIG, tenant_id)
            if row is None:
                return None
            before = configuration_of(row)
            plans = {plan.name: plan for plan in map(plan_of, await connection.fetch(LIST_PLANS))}
            wanted = decide(before, plans)
            paths = changed_paths(before, wanted)
            if not paths:
                return Outcome(before, ())
            after = replace(wanted, version=before.version + 1)
            if pace is not None and any(map(is_limit_path, paths)):
                pace(tenant_id, [row[0] for row in await connection.fetch(OWN_LIMIT_CHANGES, tenant_id)])
            if not validate_only:
                await _write(connection, before, after, paths, actor)
            return Outcome(after, paths)

    async def list_changes(self, tenant_id: TenantId, before_version: int, limit: int) -> Sequence[ConfigurationChange]:
        """Returns changes older than a version, newest first."""
        async with self._database.transaction(tenant_id) as connection:
            rows = await connection.fetch(LIST_CHANGES, tenant_id, before_version, limit)
        return [
            ConfigurationChange(
                row["version"],
                row["change_time"],
                row["subject"],
                row["reason"],
                tuple(row["changed_fields"]),
                row["before"],
                row["after"],
            )
            for row in rows
        ]


async def _write(
    connection: Connection, before: StoredConfiguration, after: StoredConfiguration, paths: Sequence[str], actor: Actor
) -> None:
    tenant_id, overrides = after.tenant_id, after.overrides
    # Kept as text that is never NULL: a name that was taken back is stored empty.
    own: list[object] = [(overrides.value(name) or "") if name == "assistant_name" else overrides.value(name) for name in OVERRIDE_NAMES]
    limits, guard = overrides.own_limits, overrides.own_limits.abuse_guard
    own += [
        own_rules_form(limits.rules),
        limits.time_zone,
        limits.cycle_anchor_time,
        None if guard is None else json.dumps(guard_form(guard)),
    ]
    raised = await connection.fetchval(UPDATE_SETTINGS, tenant_id, sorted(overrides.operator_fields), *own)
    if raised is None:
        raise WrongState("tenant", "PROVISIONING", "the tenant is still being made; repeat the change once it is ready")
    if PLAN_PATH in paths:
        await connection.execute(UPDATE_PLAN, tenant_id, after.plan.name)
    await connection.execute(
        INSERT_CHANGE,
        tenant_id,
        after.version,
        actor.subject,
        actor.reason,
        list(paths),
        json.dumps(values_at(before, paths)),
        json.dumps(values_at(after, paths)),
    )
    await append_audit(connection, tenant_id, "CONFIG_CHANGED", f"config:{','.join(audited_paths(paths))}", actor)
    await connection.execute(ANNOUNCE, tenant_id)
