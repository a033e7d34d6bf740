"""Callers that are who they say and may not do what they ask: wrong services, wrong tenants, tenants as operators, narrow keys."""

import asyncpg

from devstack.mesh_client import credentials
from devstack.state import SERVICES
from services.kernel.ids import TenantId
from services.kernel.rpc.policy import NONE, OPERATOR, REQUIRED
from tests.isolation.attack_cases import aimed_at
from tests.isolation.credentials_forged import Inside, bearer
from tests.isolation.fingerprint import fingerprint, superuser
from tests.isolation.rounds import MTLS, PLAIN, over
from tests.isolation.surface import Answer, Metadata, Rpc, Surface
from tests.isolation.target import Target, plant
from tests.support.mesh import Mesh

NOT_ALLOWED = ("PERMISSION_DENIED", "CALLER_NOT_ALLOWED")
MISMATCH = ("PERMISSION_DENIED", "TENANT_MISMATCH")
SCOPE_MISSING = ("PERMISSION_DENIED", "SCOPE_MISSING")
REASON_MISSING = ("PERMISSION_DENIED", "OPERATOR_REASON_MISSING")
NOT_TAKEN = ("INVALID_ARGUMENT", "TENANT_NOT_TAKEN")
AUDITED = "SELECT reason, subject, target FROM tenant.audit WHERE tenant_id = $1 AND action = 'OPERATOR_ACCESS'"
NIL_TENANT = "00000000-0000-0000-0000-000000000000"


class Attempts:
    """Attacks made and those that were answered otherwise than they must be."""

    def __init__(self, surface: Surface, victim: Target) -> None:
        self._surface = surface
        self._victim = victim
        self.count = 0
        self.wrong: list[str] = []

    async def expect(self, refused_as: tuple[str, str], rpc: Rpc, metadata: Metadata, note: str = "") -> Answer:
        """Attacks once."""
        answer = await self._surface.call(rpc, aimed_at(rpc, self._victim.ids), metadata)
        self.count += 1
        if answer.refused_as != refused_as:
            self.wrong.append(f"{rpc} {note}: {answer}, not {refused_as}")
        return answer


async def test_outsiders_cannot_use_what_is_for_services(mesh: Mesh, surface: Surface, inside: Inside, victim: Target) -> None:
    """A tenant's own key, an operator's key, and a key beside a service's name: CALLER_NOT_ALLOWED at every service-only rpc."""
    before = await fingerprint(mesh.stack, TenantId(victim.tenant_id))
    attempts = Attempts(surface, victim)
    for rpc in surface.rpcs:
        if not rpc.is_external:
            own = victim.metadata
            await attempts.expect(NOT_ALLOWED, rpc, own, "with a tenant's key")
            await attempts.expect(NOT_ALLOWED, rpc, [*own, *inside.as_service("inference")], "with a key beside a service's bearer")
            await attempts.expect(NOT_ALLOWED, rpc, inside.as_operator("curious", tenant_id=victim.tenant_id), "as operator")
    assert not attempts.wrong, "\n".join(attempts.wrong)
    assert attempts.count > 60
    assert await fingerprint(mesh.stack, TenantId(victim.tenant_id)) == before


async def test_a_service_cannot_use_what_is_for_others(mesh: Mesh, surface: Surface, inside: Inside, victim: Target) -> None:
    """Each service, with a tenant's real token or without, is CALLER_NOT_ALLOWED at every rpc that does not list it."""
    before = await fingerprint(mesh.stack, TenantId(victim.tenant_id))
    context, attempts = await inside.context_of(victim.tenant.api_key), Attempts(surface, victim)
    for rpc in surface.rpcs:
        for service in SERVICES:
            if service not in rpc.callers:
                with_token = inside.as_service(service, context=context, tenant_id=victim.tenant_id)
                await attempts.expect(NOT_ALLOWED, rpc, with_token, f"as {service} with a token")
                await attempts.expect(NOT_ALLOWED, rpc, inside.as_service(service), f"as {service}")
    assert not attempts.wrong, "\n".join(attempts.wrong)
    assert attempts.count > 300
    assert await fingerprint(mesh.stack, TenantId(victim.tenant_id)) == before


@over(PLAIN)
async def test_a_services_bearer_speaks_for_no_other_service(surface: Surface, inside: Inside, victim: Target) -> None:
    """One service's bearer under another's name is CREDENTIAL_INVALID at every rpc."""
    context, attempts = await inside.context_of(victim.tenant.api_key), Attempts(surface, victim)
    tokens = inside.state.secrets.service_tokens
    for rpc in surface.rpcs:
        for name in sorted(rpc.callers - {"external"}):
            other = next(service for service in SERVICES if service not in rpc.callers)
            metadata = [("x-mesh-service", name), ("x-mesh-service-token", tokens[other]), ("x-tenant-context", context)]
            await attempts.expect(("UNAUTHENTICATED", "CREDENTIAL_INVALID"), rpc, metadata, f"{other} as {name}")
    assert not attempts.wrong, "\n".join(attempts.wrong)


@over(MTLS)
async def test_on_tls_a_services_bearer_is_worth_nothing(surface: Surface, inside: Inside, victim: Target) -> None:
    """The right bearer of a service that may call, shown over the client's leaf, proves nothing; over another service's, nothing more."""
    context, attempts = await inside.context_of(victim.tenant.api_key), Attempts(surface, victim)
    for rpc in surface.rpcs:
        for name in sorted(rpc.callers - {"external"}):
            with_token = [*inside.bearer_of(name), ("x-tenant-context", context)]
            await attempts.expect(("UNAUTHENTICATED", "CREDENTIAL_MISSING"), rpc, inside.bearer_of(name), f"bearer of {name}")
            await attempts.expect(("UNAUTHENTICATED", "CONTEXT_INVALID"), rpc, with_token, f"bearer of {name} with a token")
            other = next(service for service in SERVICES if service not in rpc.callers)
            await attempts.expect(NOT_ALLOWED, rpc, [*inside.as_service(other), *with_token], f"bearer of {name} over the leaf of {other}")
    assert not attempts.wrong, "\n".join(attempts.wrong)
    assert attempts.count > 60


async def test_a_token_of_another_tenant_than_named_is_refused(surface: Surface, inside: Inside, victim: Target, attacker: Target) -> None:
    """From the right service too, `x-tenant-id` and the token must name one tenant, in either order: TENANT_MISMATCH."""
    attempts = Attempts(surface, victim)
    contexts = {target.tenant_id: await inside.context_of(target.tenant.api_key) for target in (victim, attacker)}
    for rpc in surface.rpcs:
        for service in SERVICES:
            for named, proven in ((victim, attacker), (attacker, victim)):
                metadata = inside.as_service(service, context=contexts[proven.tenant_id], tenant_id=named.tenant_id)
                await attempts.expect(MISMATCH, rpc, metadata, f"as {service}")
    assert not attempts.wrong, "\n".join(attempts.wrong)


async def test_batch_methods_take_no_tenant_of_their_own(surface: Surface, inside: Inside, victim: Target) -> None:
    """A method without a tenant refuses tenant metadata from a service, proven or not: TENANT_NOT_TAKEN."""
    context, attempts = await inside.context_of(victim.tenant.api_key), Attempts(surface, victim)
    for rpc in surface.rpcs:
        for service in sorted(rpc.callers - {"external"}):
            if rpc.tenant == NONE:
                await attempts.expect(NOT_TAKEN, rpc, inside.as_service(service, tenant_id=victim.tenant_id), "with x-tenant-id")
                await attempts.expect(NOT_TAKEN, rpc, inside.as_service(service, context=context), "with a token")
    assert not attempts.wrong, "\n".join(attempts.wrong)
    assert attempts.count >= 16


async def test_a_key_reaches_only_its_scopes(mesh: Mesh, surface: Surface, victim: Target) -> None:
    """A key of one scope is SCOPE_MISSING at every rpc that asks for another, and cannot hand out what it does not hold."""
    before = await fingerprint(mesh.stack, TenantId(victim.tenant_id))
    create = surface.find("tenant", "ApiKeyService/CreateApiKey")
    made = await surface.call(create, create.request_type(display_name="narrow", scopes=["tenant:admin"]), victim.metadata)
    narrow = credentials(made.messages[0].api_key)  # type: ignore[attr-defined] # a class of the reflected pool
    attempts = Attempts(surface, victim)
    for rpc in surface.rpcs:
        if rpc.is_external and rpc.tenant != OPERATOR and "tenant:admin" not in rpc.scopes:
            await attempts.expect(SCOPE_MISSING, rpc, narrow)
    for scopes in (["documents:read"], ["tenant:admin", "inference:generate"], ["operator:tenants"]):
        answer = await surface.call(create, create.request_type(display_name="wider", scopes=scopes), narrow)
        attempts.wrong += [f"{scopes}: {answer}"] if answer.refused_as != SCOPE_MISSING else []
    assert not attempts.wrong, "\n".join(attempts.wrong)
    after = await fingerprint(mesh.stack, TenantId(victim.tenant_id))
    made_keys = {"tenant.api_keys", "tenant.api_key_directory", "tenant.changes"}
    assert {store for store in after if after[store] != before.get(store)} <= made_keys


async def test_operator_methods_are_for_operators_who_say_why(surface: Surface, inside: Inside, victim: Target) -> None:
    """A tenant's key is CALLER_NOT_ALLOWED, an operator's without a reason OPERATOR_REASON_MISSING, at every rpc open to outsiders."""
    attempts = Attempts(surface, victim)
    for rpc in surface.rpcs:
        if rpc.tenant == OPERATOR:
            await attempts.expect(NOT_ALLOWED, rpc, [*victim.metadata, ("x-operator-reason", "promoted")], "with a tenant's key")
        for reason in ("", " "):
            pairs = [*bearer(inside.state.secrets.operator_key), ("x-tenant-id", str(victim.tenant_id))]
            await attempts.expect(REASON_MISSING, rpc, [*pairs, *([("x-operator-reason", reason)] if reason else [])], "without a reason")
    assert not attempts.wrong, "\n".join(attempts.wrong)


async def test_an_operator_names_its_tenant_and_spends_none_of_its_money(surface: Surface, inside: Inside, victim: Target) -> None:
    """Without a tenant an operator reaches no tenant's rpc; with one it still may not call a model on that tenant's bill."""
    attempts = Attempts(surface, victim)
    for rpc in surface.rpcs:
        if rpc.is_external and rpc.tenant == REQUIRED:
            await attempts.expect(("INVALID_ARGUMENT", "INVALID_METADATA"), rpc, inside.as_operator("curious"), "without a tenant")
        if "inference:generate" in rpc.scopes:
            await attempts.expect(SCOPE_MISSING, rpc, inside.as_operator("curious", tenant_id=victim.tenant_id), "as operator")
    assert not attempts.wrong, "\n".join(attempts.wrong)


async def test_whatever_an_operator_does_is_in_the_tenants_audit_log(mesh: Mesh, surface: Surface, inside: Inside) -> None:
    """At every rpc open to operators, the act, who did it and why are on record under the tenant they acted for."""
    # A tenant for this alone: the operator really moves, suspends and resumes it.
    target = await plant(mesh, surface)
    reasons = {
        rpc: f"ticket {number} of {target.canary}'; DROP TABLE tenant.audit; --"
        for number, rpc in enumerate(surface.rpcs)
        if rpc.is_external
    }
    for rpc, reason in reasons.items():
        metadata = inside.as_operator(reason, tenant_id="" if rpc.tenant == OPERATOR else target.tenant_id)
        answer = await surface.call(rpc, aimed_at(rpc, target.ids), metadata)
        assert answer.reason not in ("INTERNAL", "CREDENTIAL_INVALID"), (rpc, answer)
    connection = await superuser(mesh.stack)
    try:
        own, nobodys = [await _operators(connection, tenant_id) for tenant_id in (target.tenant_id, NIL_TENANT)]
    finally:
        await connection.close()
    for rpc, reason in reasons.items():
        assert reason in (nobodys if rpc.tenant == OPERATOR else own), rpc


async def _operators(connection: asyncpg.Connection, tenant_id: object) -> set[str]:
    rows = await connection.fetch(AUDITED, tenant_id)
    assert all(row["subject"].startswith("operator:") for row in rows)
    return {row["reason"] for row in rows}
