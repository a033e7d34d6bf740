"""The durable steps of a tenant's creation: one transaction each, every one safe to repeat and to run twice at once."""

import json
from uuid import UUID

from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection, TenantDatabase
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_audit import append_audit
from services.tenant.adapters.postgres_changes import announce
from services.tenant.adapters.postgres_events import append_events
from services.tenant.adapters.saga_steps import end_saga, mark_done, mark_undone, require_lease
from services.tenant.api_key import ApiKeyText
from services.tenant.change_hub import ChangeKind
from services.tenant.provisioning import Recorded, RecordOutcome, Step
from services.tenant.tenant_wish import TenantWish

RECORD_TENANT = """
SELECT outcome, tenant_id, content_digest FROM tenant.record_tenant($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
"""
REQUEST_IS_KNOWN = "SELECT tenant_id FROM tenant.request_directory WHERE request_id = $1"
INSERT_SAGA = """
INSERT INTO tenant.sagas (tenant_id, kind, request_id, content_digest, content, subject, reason, due_time)
VALUES ($1, 'PROVISION', $2, $3, $4::text::jsonb, $5, $6, clock_timestamp() + interval '2 seconds')
ON CONFLICT DO NOTHING
"""
INSERT_KEY_NOTE = "INSERT INTO tenant.unrecorded_keys (tenant_id) VALUES ($1) ON CONFLICT DO NOTHING"
DELETE_KEY_NOTE = "DELETE FROM tenant.unrecorded_keys WHERE tenant_id = $1 RETURNING tenant_id"
# Only ever raised: a slower run of the same request must not take a finished step back.
COUNT_STEPS = """
UPDATE tenant.provisioning p SET update_time = now(), steps_done = greatest(p.steps_done, (
    SELECT count(*) FROM tenant.saga_steps s WHERE s.tenant_id = $1 AND s.kind = 'PROVISION' AND s.state = 'DONE'))
WHERE p.tenant_id = $1
"""
LOCK_SAGA = "SELECT state FROM tenant.sagas WHERE tenant_id = $1 AND kind = 'PROVISION' FOR UPDATE"
INSERT_SETTINGS = "INSERT INTO tenant.tenant_settings (tenant_id, assistant_name) VALUES ($1, $2) ON CONFLICT DO NOTHING"
LOCK_PROVISIONING = "SELECT first_key_id FROM tenant.provisioning WHERE tenant_id = $1 FOR UPDATE"
INSERT_OWNER = """
INSERT INTO tenant.users (tenant_id, email, role) SELECT $1, $2, 'OWNER'
WHERE NOT EXISTS (SELECT FROM tenant.users WHERE tenant_id = $1 AND role = 'OWNER')
"""
# A first key is made without end and networks: one that has them was taken in hand, and one in its place would undo that.
REVOKE_UNUSED_KEY = """
UPDATE tenant.api_keys SET revoke_time = clock_timestamp()
WHERE tenant_id = $1 AND key_id = $2 AND revoke_time IS NULL AND last_use_time IS NULL AND expire_time IS NULL AND allowed_cidrs = '{}'
RETURNING key_id
"""
INSERT_DIRECTORY = "INSERT INTO tenant.api_key_directory (tenant_id, key_id) VALUES ($1, $2)"
INSERT_KEY = "INSERT INTO tenant.api_keys (tenant_id, key_id, secret_sha256, display_name, scopes) VALUES ($1, $2, $3, $4, $5)"
SET_FIRST_KEY = "UPDATE tenant.provisioning SET first_key_id = $2, update_time = now() WHERE tenant_id = $1"
ACTIVATE = """
UPDATE tenant.tenants SET state = 'ACTIVE' WHERE tenant_id = $1 AND state = 'PROVISIONING' RETURNING slug, plan, region, placement
"""
ANNOUNCE_STATE = "SELECT tenant.announce($1, 'STATE')"
DELETE_OWNER = "DELETE FROM tenant.users WHERE tenant_id = $1"
DELETE_SETTINGS = "DELETE FROM tenant.tenant_settings WHERE tenant_id = $1"
DELETE_PLACEMENT = "DELETE FROM tenant.placements WHERE tenant_id = $1"
FORGET_FIRST_KEY = "UPDATE tenant.provisioning SET first_key_id = NULL WHERE tenant_id = $1"
DELETE_KEY_NAMES = "DELETE FROM tenant.api_key_directory WHERE tenant_id = $1"
DELETE_KEYS = "DELETE FROM tenant.api_keys WHERE tenant_id = $1"
RELEASE_SLUG = "DELETE FROM tenant.slug_directory WHERE tenant_id = $1"
GIVE_UP = "UPDATE tenant.tenants SET state = 'FAILED' WHERE tenant_id = $1 AND state = 'PROVISIONING'"
# What a step wrote here. Nobody can have used any of it: the tenant was never ACTIVE.
UNDO = {
    Step.PLACEMENT: (DELETE_PLACEMENT,),
    Step.DEFAULTS: (DELETE_SETTINGS,),
    Step.OWNER: (DELETE_OWNER,),
    Step.FIRST_KEY: (FORGET_FIRST_KEY, DELETE_KEY_NAMES, DELETE_KEYS),
}
_KIND = "PROVISION"


class PostgresProvisioning:
    """The provisioning store on the service's own role."""

    def __init__(self, database: TenantDatabase, *, with_mail: bool = False) -> None:
        self._database = database
        self._sinks = ("webhook", "mail") if with_mail else ("webhook",)

    async def record(
        self, tenant_id: TenantId, request_id: UUID, wish: TenantWish, sealed_stores: str, region: str, actor: Actor
    ) -> Recorded:
        """Claims request id and slug and writes the tenant with its saga, or answers what the request recorded before."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(
                RECORD_TENANT,
                tenant_id,
                request_id,
                wish.digest(),
                wish.slug,
                wish.display_name,
                wish.plan,
                region,
                actor.subject,
                actor.reason,
                actor.peer_address,
            )
            outcome = RecordOutcome(row["outcome"])
            if outcome is RecordOutcome.RECORDED:
                if sealed_stores and await connection.fetchval(DELETE_KEY_NOTE, tenant_id) is None:
                    # Swept meanwhile, and the key with it: what was sealed cannot be opened.
                    raise Unavailable("tenant", "the creation took too long to begin; repeat the call with the same request id")
                await _begin(connection, tenant_id, request_id, wish, sealed_stores, actor)
            return Recorded(outcome, row["tenant_id"], row["content_digest"])

    async def take_up(self, tenant_id: TenantId, request_id: UUID, wish: TenantWish, sealed_stores: str, actor: Actor) -> None:
        """Begins the saga of a tenant that was recorded without one."""
        async with self._database.transaction(tenant_id) as connection:
            await _begin(connection, tenant_id, request_id, wish, sealed_stores, actor)

    async def note_key(self, tenant_id: TenantId) -> None:
        """Notes that a data key is made next for a tenant that is not recorded yet."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(INSERT_KEY_NOTE, tenant_id)

    async def forget_key(self, tenant_id: TenantId) -> None:
        """Removes the note of a key that is destroyed."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(DELETE_KEY_NOTE, tenant_id)

    async def is_known(self, request_id: UUID) -> bool:
        """Tells whether the request was recorded before; the directory is read before any tenant is known."""
        return bool(await self._database.call(None, REQUEST_IS_KNOWN, request_id))

    async def write_defaults(self, tenant_id: TenantId, assistant_name: str, step: Step, lease: UUID) -> None:
        """Writes the settings unless they are there."""
        async with self._database.transaction(tenant_id) as connection:
            await require_lease(connection, tenant_id, _KIND, lease)
            await connection.execute(INSERT_SETTINGS, tenant_id, assistant_name)
            await _finish(connection, tenant_id, step)

    async def write_owner(self, tenant_id: TenantId, email: str, step: Step, lease: UUID) -> None:
        """Writes the owner unless there is one; the lock keeps two runs from both finding none."""
        async with self._database.transaction(tenant_id) as connection:
            await require_lease(connection, tenant_id, _KIND, lease)
            await connection.execute(LOCK_PROVISIONING, tenant_id)
            await connection.execute(INSERT_OWNER, tenant_id, email)
            await _finish(connection, tenant_id, step)

    async def hold(self, tenant_id: TenantId, lease: UUID) -> None:
        """Asks whether the lease still is the saga's."""
        async with self._database.transaction(tenant_id) as connection:
            await require_lease(connection, tenant_id, _KIND, lease)

    async def finish_step(self, tenant_id: TenantId, step: Step, lease: UUID) -> None:
        """Notes that the step is done."""
        async with self._database.transaction(tenant_id) as connection:
            await require_lease(connection, tenant_id, _KIND, lease)
            await _finish(connection, tenant_id, step)

    async def issue_first_key(
        self,
        tenant_id: TenantId,
        key: ApiKeyText,
        display_name: str,
        scopes: frozenset[str],
        actor: Actor,
        step: Step,
        lease: UUID | None,
    ) -> bool:
        """Stores the key as the first one, in place of an earlier first key that was never used; False when that one stays."""
        async with self._database.transaction(tenant_id) as connection:
            if lease is not None:
                await require_lease(connection, tenant_id, _KIND, lease)
            earlier = await connection.fetchval(LOCK_PROVISIONING, tenant_id)
            if earlier is not None and not await _revoke_unused(connection, tenant_id, earlier, actor):
                await _finish(connection, tenant_id, step)
                return False
            await connection.execute(INSERT_DIRECTORY, tenant_id, key.key_id)
            await connection.execute(INSERT_KEY, tenant_id, key.key_id, key.secret_sha256(), display_name, sorted(scopes))
            await connection.execute(SET_FIRST_KEY, tenant_id, key.key_id)
            await append_audit(connection, tenant_id, "KEY_CREATED", f"key:{key.key_id}", actor)
            await _finish(connection, tenant_id, step)
            if earlier is not None:
                await announce(connection, tenant_id, ChangeKind.KEY)
            return True

    async def activate(self, tenant_id: TenantId, step: Step, lease: UUID) -> None:
        """Lets the tenant be used, tells of it and ends the saga, unless it was turned back."""
        async with self._database.transaction(tenant_id) as connection:
            await require_lease(connection, tenant_id, _KIND, lease)
            if await connection.fetchval(LOCK_SAGA, tenant_id) != "RUNNING":
                return
            row = await connection.fetchrow(ACTIVATE, tenant_id)
            if row is not None:
                await append_events(connection, tenant_id, "tenant.provisioned", dict(row), self._sinks)
                await connection.execute(ANNOUNCE_STATE, tenant_id)
            await _finish(connection, tenant_id, step)
            await end_saga(connection, tenant_id, _KIND, "DONE")

    async def undo_step(self, tenant_id: TenantId, step: Step, lease: UUID) -> None:
        """Removes what the step wrote here, if anything, and notes that it is undone."""
        async with self._database.transaction(tenant_id) as connection:
            await require_lease(connection, tenant_id, _KIND, lease)
            for statement in UNDO.get(step, ()):
                await connection.execute(statement, tenant_id)
            await mark_undone(connection, tenant_id, _KIND, step)

    async def give_up(self, tenant_id: TenantId, step: Step, actor: Actor, lease: UUID) -> None:
        """Makes the tenant FAILED, lets its slug go and ends the saga; the request id stays spent."""
        async with self._database.transaction(tenant_id) as connection:
            await require_lease(connection, tenant_id, _KIND, lease)
            if not await end_saga(connection, tenant_id, _KIND, "FAILED"):
                return
            await connection.execute(RELEASE_SLUG, tenant_id)
            await connection.execute(GIVE_UP, tenant_id)
            await append_audit(connection, tenant_id, "TENANT_FAILED", f"tenant:{tenant_id}", actor)
            await mark_undone(connection, tenant_id, _KIND, step)
            await connection.execute(ANNOUNCE_STATE, tenant_id)


async def _begin(connection: Connection, tenant_id: TenantId, request_id: UUID, wish: TenantWish, sealed_stores: str, actor: Actor) -> None:
    content = json.dumps(wish.content(sealed_stores))
    await connection.execute(INSERT_SAGA, tenant_id, request_id, wish.digest(), content, actor.subject, actor.reason)
    await _finish(connection, tenant_id, Step.RECORDED)


async def _finish(connection: Connection, tenant_id: TenantId, step: Step) -> None:
    await mark_done(connection, tenant_id, _KIND, step)
    await connection.execute(COUNT_STEPS, tenant_id)


async def _revoke_unused(connection: Connection, tenant_id: TenantId, key_id: str, actor: Actor) -> bool:
    if await connection.fetchval(REVOKE_UNUSED_KEY, tenant_id, key_id) is None:
        return False
    await append_audit(connection, tenant_id, "KEY_REVOKED", f"key:{key_id}", actor)
    return True
