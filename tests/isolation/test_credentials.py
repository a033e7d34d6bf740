"""Strangers at every rpc: no credential, bad ones, dead ones, and forged or replayed context tokens."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from devstack.environment import BASE_DOMAIN
from devstack.mesh_client import credentials
from services.kernel.ids import TenantId
from services.kernel.rpc.policy import REQUIRED
from tests.isolation.attack_cases import aimed_at
from tests.isolation.canaries import written_down
from tests.isolation.credentials_forged import Inside, bad_credentials, bearer, forged_contexts, forged_jwts
from tests.isolation.fingerprint import fingerprint
from tests.isolation.surface import Answer, Metadata, Rpc, Surface
from tests.isolation.target import Target, in_seconds
from tests.support.jwks import JwksServer, SigningKey, claims_of, running_jwks
from tests.support.mesh import Mesh

MISSING = ("UNAUTHENTICATED", "CREDENTIAL_MISSING")
INVALID = ("UNAUTHENTICATED", "CREDENTIAL_INVALID")
EXPIRED = ("UNAUTHENTICATED", "CREDENTIAL_EXPIRED")
FORGED = ("UNAUTHENTICATED", "CONTEXT_INVALID")
LATE = ("UNAVAILABLE", "DEPENDENCY_UNAVAILABLE")
AT_ONCE = 8


async def at_every_rpc(surface: Surface, victim: Target, metadata: Metadata) -> list[tuple[Rpc, Answer]]:
    """Attacks every rpc with one set of metadata."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def attack(rpc: Rpc) -> tuple[Rpc, Answer]:
        async with slots:
            answer = await surface.call(rpc, aimed_at(rpc, victim.ids), metadata)
            for _ in range(3):
                # On a busy machine whoever judges may be late, and says so: that judges nothing, and is to be asked again.
                if answer.refused_as != LATE:
                    break
                await asyncio.sleep(0.5)
                answer = await surface.call(rpc, aimed_at(rpc, victim.ids), metadata)
            return rpc, answer

    async with asyncio.TaskGroup() as group:
        attacks = [group.create_task(attack(rpc)) for rpc in surface.rpcs]
    return [attack.result() for attack in attacks]


def not_refused_as(expected: tuple[str, str], answers: list[tuple[Rpc, Answer]]) -> list[str]:
    """Names every answer that is another than the expected refusal."""
    return [f"{rpc}: {answer}" for rpc, answer in answers if answer.refused_as != expected]


async def _key(surface: Surface, owner: Target, **fields: object) -> tuple[str, str]:
    rpc = surface.find("tenant", "ApiKeyService/CreateApiKey")
    request = rpc.request_type(display_name="attacked", scopes=["tenant:read", "tenant:admin"], **fields)
    answer = await surface.call(rpc, request, owner.metadata)
    made = answer.messages[0]
    return made.key.key_id, made.api_key  # type: ignore[attr-defined] # a class of the reflected pool


async def test_without_a_credential_no_rpc_answers(surface: Surface, victim: Target) -> None:
    """No metadata at all, a tenant's bare id, or an operator's reason alone: CREDENTIAL_MISSING everywhere."""
    for metadata in ([], [("x-tenant-id", str(victim.tenant_id))], [("x-operator-reason", "curious")]):
        assert not_refused_as(MISSING, await at_every_rpc(surface, victim, metadata)) == []


async def test_every_bad_credential_is_refused_in_the_same_words(mesh: Mesh, surface: Surface, victim: Target, attacker: Target) -> None:
    """Malformed, guessed, unknown and revoked credentials are CREDENTIAL_INVALID at every rpc; nothing tells which was wrong."""
    before = await fingerprint(mesh.stack, TenantId(victim.tenant_id))
    key_id, revoked = await _key(surface, attacker)
    # Used before it is revoked: one that never was is refused by its first use as well. The tenant service keeps no answer to it.
    read = surface.find("tenant", "TenantService/GetTenant")
    assert (await surface.call(read, read.request_type(), bearer(revoked))).code == "OK"
    revoke = surface.find("tenant", "ApiKeyService/RevokeApiKey")
    assert (await surface.call(revoke, revoke.request_type(key_id=key_id), attacker.metadata)).code == "OK"
    words: set[str] = set()
    for name, metadata in bad_credentials(victim.tenant.api_key, revoked).items():
        answers = await at_every_rpc(surface, victim, metadata)
        # On TLS a service's name and bearer are read by nobody: such a caller has shown nothing at all.
        expected = MISSING if surface.tls and "x-mesh-service" in dict(metadata) else INVALID
        assert not_refused_as(expected, answers) == [], name
        if name in ("wrong checksum", "wrong secret", "unknown key id", "revoked", "not a key", "unknown operator"):
            words |= {repr((answer.text, answer.metadata)) for _, answer in answers}
    assert len(words) == 1, words
    assert await fingerprint(mesh.stack, TenantId(victim.tenant_id)) == before


async def test_an_expired_key_is_refused_everywhere(surface: Surface, victim: Target, attacker: Target) -> None:
    """A key whose end has passed is CREDENTIAL_EXPIRED at every rpc, also where it had just been accepted."""
    _, api_key = await _key(surface, attacker, expire_time=in_seconds(0.6))
    read = surface.find("tenant", "TenantService/GetTenant")
    assert (await surface.call(read, read.request_type(), credentials(api_key))).code == "OK"
    while (await surface.call(read, read.request_type(), credentials(api_key))).refused_as != EXPIRED:
        continue
    assert not_refused_as(EXPIRED, await at_every_rpc(surface, victim, bearer(api_key))) == []


async def test_a_forged_context_convinces_no_rpc(surface: Surface, inside: Inside, victim: Target, attacker: Target) -> None:
    """Even from a service that may call: a token forged, altered, expired, too long-lived or cut is CONTEXT_INVALID at every rpc."""
    real = await inside.context_of(attacker.tenant.api_key)
    for name, token in forged_contexts(inside.signing_key, victim.tenant_id, real).items():
        for service, tenant_id in (("tenant", ""), ("inference", victim.tenant_id)):
            metadata = inside.as_service(service, context=token, tenant_id=tenant_id)
            assert not_refused_as(FORGED, await at_every_rpc(surface, victim, metadata)) == [], name


async def test_a_real_context_is_worth_nothing_outside(surface: Surface, inside: Inside, victim: Target, attacker: Target) -> None:
    """A tenant's genuine token, replayed from outside alone or beside another tenant's key, is refused at every rpc."""
    stolen = ("x-tenant-context", await inside.context_of(victim.tenant.api_key))
    own = bearer(attacker.tenant.api_key)
    named = ("x-tenant-id", str(victim.tenant_id))
    for metadata in ([stolen], [stolen, named], [*own, stolen], [*own, stolen, named], [*bearer(stolen[1]), stolen]):
        assert not_refused_as(FORGED, await at_every_rpc(surface, victim, metadata)) == []
    assert not_refused_as(INVALID, await at_every_rpc(surface, victim, bearer(stolen[1]))) == []


@asynccontextmanager
async def issuer_of(surface: Surface, inside: Inside, owner: Target) -> AsyncIterator[tuple[SigningKey, JwksServer, dict[str, Any]]]:
    """A registered issuer of a tenant's: its key, its address, and claims of a token that would be taken."""
    key, issuer = SigningKey(), f"https://{secrets.token_hex(8)}.example"
    async with running_jwks(key) as server:
        rpc = surface.find("tenant", "IssuerService/AddIssuer")
        request = rpc.request_type(
            issuer=issuer, audience="mesh", jwks_uri=server.uri, algorithms=[3], scopes=["tenant:read", "tenant:admin", "usage:read"]
        )
        added = await surface.call(rpc, request, inside.as_operator("an issuer", tenant_id=owner.tenant_id))
        assert added.code == "OK", added
        yield key, server, claims_of(issuer, "mesh", scope="tenant:read tenant:admin usage:read")


async def test_a_forged_jwt_convinces_no_rpc(mesh: Mesh, surface: Surface, inside: Inside, victim: Target, attacker: Target) -> None:
    """Unsigned, signed by another or a shared secret, for another audience or issuer: CREDENTIAL_INVALID at every rpc, never logged."""
    async with (
        issuer_of(surface, inside, victim) as (key, server, claims),
        issuer_of(surface, inside, attacker) as (own_key, _, own_claims),
    ):
        read = surface.find("metering", "UsageService/ListCalls")
        assert (await surface.call(read, read.request_type(), bearer(key.sign(claims)))).code == "OK"
        forged = forged_jwts(key, own_key, claims, own_claims)
        before = await fingerprint(mesh.stack, TenantId(victim.tenant_id))
        for name, token in forged.items():
            assert not_refused_as(INVALID, await at_every_rpc(surface, victim, bearer(token))) == [], name
        assert await fingerprint(mesh.stack, TenantId(victim.tenant_id)) == before
        parts = {f"{name} {place}": part for name, token in forged.items() for place, part in enumerate(token.split(".")) if len(part) > 8}
        parts["real"] = key.sign(claims).split(".")[1]
        assert written_down(mesh.stack, parts) == []
        ended = claims_of(claims["iss"], "mesh", seconds=-5)
        assert not_refused_as(EXPIRED, await at_every_rpc(surface, victim, bearer(key.sign(ended)))) == []
        # Refusals of unknown kids fetch the set again, at most once in five seconds.
        assert len(server.requests) < 60


async def test_a_jwt_speaks_for_its_issuers_tenant_alone(surface: Surface, inside: Inside, victim: Target, attacker: Target) -> None:
    """A right token beside another tenant's id, host or path is TENANT_MISMATCH at every rpc; of that tenant it reads nothing."""
    domain = [("x-tenant-host", victim.ids.domain)]
    async with issuer_of(surface, inside, attacker) as (key, _, claims):
        token = bearer(key.sign(claims))
        for claim in ([("x-tenant-id", str(victim.tenant_id))], domain, [("x-tenant-path", "/t/nobody-at-all/x")]):
            assert not_refused_as(("PERMISSION_DENIED", "TENANT_MISMATCH"), await at_every_rpc(surface, victim, [*token, *claim])) == []
        for rpc, answer in await at_every_rpc(surface, victim, token):
            assert victim.traces_in(answer, asked_with=victim.ids) == [], rpc


async def test_a_name_of_another_tenant_beside_a_key_is_refused(surface: Surface, victim: Target, attacker: Target) -> None:
    """Another tenant's domain, and a subdomain nobody has, beside a real key: TENANT_MISMATCH at every rpc of every service."""
    for claim in (("x-tenant-host", victim.ids.domain.upper()), ("x-tenant-host", f"nobody-at-all.{BASE_DOMAIN}:443")):
        answers = await at_every_rpc(surface, victim, [*bearer(attacker.tenant.api_key), claim])
        assert not_refused_as(("PERMISSION_DENIED", "TENANT_MISMATCH"), answers) == []


async def test_a_stolen_key_is_a_wrong_key_outside_its_networks(surface: Surface, victim: Target) -> None:
    """A tenant's real key that may be used from elsewhere only is CREDENTIAL_INVALID at every rpc of every service."""
    _, api_key = await _key(surface, victim, allowed_cidrs=["192.0.2.0/24", "2001:db8::/32"])
    assert not_refused_as(INVALID, await at_every_rpc(surface, victim, bearer(api_key))) == []


async def test_metadata_said_twice_is_refused(surface: Surface, inside: Inside, victim: Target, attacker: Target) -> None:
    """Two credentials, tenants or tokens in one call are INVALID_METADATA: nobody chooses which one counts."""
    token = await inside.context_of(attacker.tenant.api_key)
    service = inside.as_service("inference", context=token, tenant_id=attacker.tenant_id)
    for metadata in (
        [*bearer(attacker.tenant.api_key), *bearer(victim.tenant.api_key)],
        [*service, ("x-tenant-id", str(victim.tenant_id))],
        [*service, ("x-tenant-context", await inside.context_of(victim.tenant.api_key))],
        [*service, *inside.bearer_of("inference"), ("x-mesh-service", "tenant")],
        [*bearer(attacker.tenant.api_key), ("x-tenant-host", "a.example"), ("x-tenant-host", "b.example")],
        [*bearer(attacker.tenant.api_key), ("x-tenant-path", "/"), ("x-tenant-path", "/t/a")],
    ):
        assert not_refused_as(("INVALID_ARGUMENT", "INVALID_METADATA"), await at_every_rpc(surface, victim, metadata)) == []


async def test_the_right_service_needs_a_proven_tenant(surface: Surface, inside: Inside, victim: Target) -> None:
    """A service that may call proves the tenant with a token: a bare `x-tenant-id` from it is CREDENTIAL_MISSING."""
    wrong: list[str] = []
    for rpc in surface.rpcs:
        for service in sorted(rpc.callers - {"external"}):
            if rpc.tenant == REQUIRED:
                for tenant_id in ("", victim.tenant_id):
                    answer = await surface.call(rpc, aimed_at(rpc, victim.ids), inside.as_service(service, tenant_id=tenant_id))
                    wrong += not_refused_as(MISSING, [(rpc, answer)])
    assert not wrong, "\n".join(wrong)
