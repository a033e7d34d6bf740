"""Hosts and paths as names: whose they are, what never matches, and what a claim to another tenant beside a credential is worth."""

import secrets
from typing import Any
from uuid import UUID

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.common.v1 import error_reason_pb2, lifecycle_service_pb2
from mesh.tenant.v1 import authentication_service_pb2, tenant_service_pb2
from mesh.tenant.v1 import domain_service_pb2 as pb
from services.kernel.errors import InvalidRequest
from services.tenant.domain_name import NameClaim, read_base_domains, read_claim, read_domain
from services.tenant.settings import TenantSettings
from tests.tenant.harness import BASE_DOMAIN, Harness, Metadata, as_service, call, refusal, taken_apart, with_key

MISMATCH = error_reason_pb2.ERROR_REASON_TENANT_MISMATCH
READ = tenant_service_pb2.GetTenantRequest()


async def add(harness: Harness, tenant_id: str, domain: str) -> str:
    """Gives a tenant a domain as the operator and returns it as it is kept."""
    answer = await call(harness.domains.AddDomain, pb.AddDomainRequest(domain=domain), harness.as_operator(tenant_id))
    return answer.domain.domain


async def resolve(harness: Harness, host: str = "", path: str = "", metadata: Metadata | None = None) -> Any:
    """Asks whose a name is, as a front end."""
    request = authentication_service_pb2.ResolveTenantRequest(host=host, path=path)
    return await call(harness.authentication.ResolveTenant, request, harness.as_front() if metadata is None else metadata)


async def named(harness: Harness) -> tuple[Any, str]:
    """A tenant with a custom domain."""
    created = await harness.create()
    return created, await add(harness, created.tenant.tenant_id, f"app-{secrets.token_hex(6)}.example.org")


async def test_a_tenant_is_found_by_subdomain_custom_domain_and_path(harness: Harness) -> None:
    """Case, port and a final dot of a host do not matter; the answer says what a front end needs to show the page."""
    created, domain = await named(harness)
    slug = created.tenant.slug
    for host, path in (
        (f"{slug}.{BASE_DOMAIN}", ""),
        (f"{slug.upper()}.{BASE_DOMAIN.upper()}:8443", "/anything"),
        (f"{slug}.{BASE_DOMAIN}.", "/"),
        (domain, ""),
        (f"{domain.upper()}.:443", f"/t/{slug}/page"),
        ("", f"/t/{slug}"),
        (BASE_DOMAIN, f"/t/{slug}/deep/page?x=/t/other"),
        ("unknown.example.net", f"/t/{slug}/"),
        (f"{slug}.{BASE_DOMAIN}", f"/t/{slug}/"),
    ):
        answer = await resolve(harness, host, path)
        assert answer.tenant_id == created.tenant.tenant_id, (host, path)
    assert (answer.slug, answer.display_name, answer.region) == (slug, created.tenant.display_name, created.tenant.region)
    assert answer.state == tenant_service_pb2.TENANT_STATE_ACTIVE


async def test_what_names_nobody_is_not_found(harness: Harness) -> None:
    """Unknown names, the base domain itself, look-alikes and odd spellings are NOT_FOUND, which says what to look at."""
    created, domain = await named(harness)
    slug = created.tenant.slug
    for host, path in (
        (BASE_DOMAIN, "/"),
        (f"nobody-{slug}.{BASE_DOMAIN}", ""),
        (f"x.{slug}.{BASE_DOMAIN}", ""),
        (f"{slug}.{BASE_DOMAIN}.evil.example", ""),
        (f"{slug}x{BASE_DOMAIN}", ""),
        (f"{slug}.{BASE_DOMAIN}@evil.example", ""),
        (f"sub.{domain}", ""),
        (domain.partition(".")[2], ""),
        (slug.replace("a", "\u0430", 1) + f".{BASE_DOMAIN}", ""),
        (slug.replace("e", "\uff45", 1) + f".{BASE_DOMAIN}", ""),
        (f"{slug}.{BASE_DOMAIN}".replace("n", "\uff4e", 1), ""),
        (f"{slug}\u3002{BASE_DOMAIN}", ""),
        (f"{slug}%2e{BASE_DOMAIN}", ""),
        (domain.replace("o", "\u043e", 1), ""),
        ("", f"/t/{slug.upper()}"),
        ("", f"/t/{slug.replace('a', '%61', 1)}"),
        ("", slug.replace("a", "\u0430", 1).join(("/t/", "/"))),
        ("", f"/T/{slug}"),
        ("", f"t/{slug}"),
        ("", f"/x/t/{slug}"),
        ("", f"/t//{slug}"),
        (domain, "/t/nobody-at-all"),
    ):
        error = await refusal(resolve(harness, host, path))
        assert (error.code, error.metadata) == (grpc.StatusCode.NOT_FOUND, {"resource": "tenant"}), (host, path)
        assert "no tenant has this host or path" in error.message
        assert "your credential" not in error.message


async def test_asking_for_no_name_is_a_bad_request(harness: Harness) -> None:
    """Neither host nor path is INVALID_ARGUMENT, and says what to send."""
    error = await refusal(resolve(harness, "", ""))
    assert (error.reason_name, error.metadata) == ("INVALID_REQUEST", {"field": "host"})
    assert "send the host" in error.message


async def test_host_and_path_of_two_tenants_are_refused(harness: Harness) -> None:
    """A host of one and a path of another tenant name nobody: TENANT_MISMATCH, by subdomain and by custom domain."""
    (one, domain), other = await named(harness), await harness.create()
    for host in (f"{one.tenant.slug}.{BASE_DOMAIN}", domain):
        error = await refusal(resolve(harness, host, f"/t/{other.tenant.slug}/"))
        assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, MISMATCH)


async def test_slugs_that_look_alike_are_different_tenants(harness: Harness) -> None:
    """`a-b` and `ab` are two, `a_b` is nobody's: no name is cleaned into another."""
    unique = secrets.token_hex(4)
    dashed, plain = await harness.create(slug=f"a-b{unique}"), await harness.create(slug=f"ab{unique}")
    assert (await resolve(harness, f"a-b{unique}.{BASE_DOMAIN}")).tenant_id == dashed.tenant.tenant_id
    assert (await resolve(harness, f"ab{unique}.{BASE_DOMAIN}")).tenant_id == plain.tenant.tenant_id
    for slug in (f"a_b{unique}", f"a--b{unique}", f"a.b{unique}", f"a b{unique}", f"a\u2010b{unique}", f"a\u00adb{unique}"):
        assert (await refusal(resolve(harness, f"{slug}.{BASE_DOMAIN}"))).code is grpc.StatusCode.NOT_FOUND
        error = await refusal(harness.authenticate(dashed.api_key, host=f"{slug}.{BASE_DOMAIN}"))
        assert error.reason == MISMATCH, slug


async def test_names_are_told_to_front_ends_operators_and_services_only(harness: Harness) -> None:
    """A tenant's own key cannot read other tenants' names, and a front end's key opens nothing else."""
    created = await harness.create()
    host = f"{created.tenant.slug}.{BASE_DOMAIN}"
    for metadata in (harness.as_front(), harness.as_operator(), as_service("inference")):
        assert (await resolve(harness, host, metadata=metadata)).tenant_id == created.tenant.tenant_id
    error = await refusal(resolve(harness, host, metadata=with_key(created.api_key)))
    assert (error.reason, error.metadata) == (error_reason_pb2.ERROR_REASON_SCOPE_MISSING, {"scope": "operator:resolve"})
    assert (await refusal(resolve(harness, host, metadata=[]))).reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_MISSING
    front = [*harness.as_front(), ("x-operator-reason", "curious")]
    error = await refusal(call(harness.tenants.ListTenants, tenant_service_pb2.ListTenantsRequest(), front))
    assert error.reason == error_reason_pb2.ERROR_REASON_SCOPE_MISSING
    error = await refusal(call(harness.tenants.GetTenant, READ, [*front, ("x-tenant-id", created.tenant.tenant_id)]))
    assert error.reason == MISMATCH
    error = await refusal(call(harness.tenants.GetTenant, READ, front))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_name_beside_a_credential_must_be_its_own_tenants(harness: Harness) -> None:
    """Another tenant's host, domain or path, and a slug nobody has, are TENANT_MISMATCH, on record in the credential's own log."""
    (own, own_domain), (other, domain) = await named(harness), await named(harness)
    for host, path in (
        (f"{other.tenant.slug}.{BASE_DOMAIN}", ""),
        (domain, ""),
        ("", f"/t/{other.tenant.slug}/page"),
        (f"nobody.{BASE_DOMAIN}", ""),
        ("", "/t/nobody-at-all"),
        (own_domain, f"/t/{other.tenant.slug}"),
        (f"{other.tenant.slug}.{BASE_DOMAIN}", f"/t/{own.tenant.slug}"),
    ):
        error = await refusal(harness.authenticate(own.api_key, host=host, path=path))
        assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, MISMATCH), (host, path)
        metadata = [*with_key(own.api_key), *([("x-tenant-host", host)] if host else []), *([("x-tenant-path", path)] if path else [])]
        assert (await refusal(call(harness.tenants.GetTenant, READ, metadata))).reason == MISMATCH, (host, path)
    records = await harness.audit(own.tenant.tenant_id, "TENANT_MISMATCH")
    assert {record["target"] for record in records} == {f"tenant:{other.tenant.tenant_id}", "tenant:unknown"}
    assert {record["subject"] for record in records} == {f"key:{taken_apart(own.api_key).key_id}"}
    assert await harness.audit(other.tenant.tenant_id, "TENANT_MISMATCH") == []


async def test_names_that_agree_or_claim_nothing_change_nothing(harness: Harness) -> None:
    """A front end's own host, an unknown domain and an ordinary path claim no tenant."""
    created, domain = await named(harness)
    for host, path in (
        (f"{created.tenant.slug}.{BASE_DOMAIN}:443", f"/t/{created.tenant.slug}/x"),
        (domain, "/"),
        (BASE_DOMAIN, "/"),
        ("gateway.example.net", "/v1/generate"),
        ("10.1.2.3:8080", ""),
        ("[2001:db8::1]:8080", ""),
        ("\u0430.example", "/"),
    ):
        assert (await harness.authenticate(created.api_key, host=host, path=path)).context_token, (host, path)


async def test_an_operator_is_held_to_the_names_as_well(harness: Harness) -> None:
    """An operator who names one tenant by id and another by host, or one by host alone, is refused; what nobody owns is on record."""
    one, other = await harness.create(), await harness.create()
    host = f"{other.tenant.slug}.{BASE_DOMAIN}"
    for claimed in (UUID(one.tenant.tenant_id).bytes, b""):
        error = await refusal(harness.authenticate(str(harness.operator), claimed=claimed, reason="ticket 9", host=host))
        assert error.reason == MISMATCH
    assert len(await harness.audit(one.tenant.tenant_id, "TENANT_MISMATCH")) == 1
    records = await harness.audit(str(UUID(int=0)), "TENANT_MISMATCH")
    assert f"tenant:{other.tenant.tenant_id}" in {record["target"] for record in records}


@pytest.mark.parametrize(
    "domain",
    [
        "*.example.org",
        "192.0.2.1",
        "[2001:db8::1]",
        "2001:db8::1",
        "\uff11\uff12\uff17.0.0.1",
        "example.0x7f",
        "app.example.org:443",
        "https://app.example.org",
        "app.example.org/path",
        "user@example.org",
        "localhost",
        "a_b.example.org",
        "-a.example.org",
        "a..example.org",
        ".example.org",
        "app.example.org..",
        f"{'a' * 64}.example.org",
        f"{'a.' * 126}example.org",
        "xn--zzzzzz99.example.org",
        "a\u200db.example.org",
        "app example.org",
        "app.example.org\n",
        BASE_DOMAIN,
        f"acme.{BASE_DOMAIN}",
        f"deep.acme.{BASE_DOMAIN.upper()}",
        f"acme.{BASE_DOMAIN}".replace("n", "\uff4e", 1),
        "'; DROP TABLE tenant.domains; --.example",
    ],
)
async def test_what_is_no_domain_of_ones_own_is_refused(harness: Harness, domain: str) -> None:
    """Wildcards, addresses, ports, single labels, malformed names and hosts under the base domain: INVALID_ARGUMENT on `domain`."""
    created = await harness.create()
    error = await refusal(add(harness, created.tenant.tenant_id, domain))
    assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "domain")


async def test_a_domain_is_one_tenants_in_every_spelling(harness: Harness) -> None:
    """Case, final dot, Unicode and its ASCII form are one domain: ALREADY_EXISTS for others, the same again for its owner."""
    created, other = await harness.create(), await harness.create()
    unique = secrets.token_hex(5)
    kept = await add(harness, created.tenant.tenant_id, f"M\u00fcnchen-{unique}.Example.ORG.")
    assert kept == f"m\u00fcnchen-{unique}.example.org".encode("idna").decode()
    for spelling in (kept, kept.upper(), f"m\u00fcnchen-{unique}.example.org", f"{kept}."):
        error = await refusal(add(harness, other.tenant.tenant_id, spelling))
        assert (error.code, error.metadata["field"]) == (grpc.StatusCode.ALREADY_EXISTS, "domain")
        assert await add(harness, created.tenant.tenant_id, spelling) == kept
    listing = await call(harness.domains.ListDomains, pb.ListDomainsRequest(), harness.as_operator(created.tenant.tenant_id))
    assert [domain.domain for domain in listing.domains] == [kept]
    look_alike = await add(harness, other.tenant.tenant_id, f"munchen-{unique}.example.org")
    assert (await resolve(harness, look_alike)).tenant_id == other.tenant.tenant_id
    assert (await resolve(harness, kept)).tenant_id == created.tenant.tenant_id


async def test_a_removed_domain_names_nobody_and_is_free(harness: Harness) -> None:
    """Removal is recorded and announced; another tenant's domain is as absent as one that never was."""
    (created, domain), other = await named(harness), await harness.create()
    request = pb.RemoveDomainRequest(domain=domain.upper())
    tenant_id = created.tenant.tenant_id
    error = await refusal(call(harness.domains.RemoveDomain, request, harness.as_operator(other.tenant.tenant_id)))
    assert error.code is grpc.StatusCode.NOT_FOUND
    await call(harness.domains.RemoveDomain, request, harness.as_operator(tenant_id))
    assert (await refusal(resolve(harness, domain))).code is grpc.StatusCode.NOT_FOUND
    for action in ("DOMAIN_ADDED", "DOMAIN_REMOVED"):
        assert [record["target"] for record in await harness.audit(tenant_id, action)] == [f"domain:{domain}"]
    kinds = await harness.value("SELECT array_agg(kind ORDER BY change_id) FROM tenant.changes WHERE tenant_id = $1", UUID(tenant_id))
    # The first one told that the tenant is there.
    assert kinds == ["STATE", "DOMAIN", "DOMAIN"]
    assert await add(harness, other.tenant.tenant_id, domain) == domain


async def test_a_tenant_has_at_most_twenty_domains(harness: Harness) -> None:
    """The twenty-first is PLAN_LIMIT; one it has already is answered all the same."""
    created = await harness.create()
    names = [f"d{number}-{secrets.token_hex(4)}.example.org" for number in range(20)]
    for name in names:
        await add(harness, created.tenant.tenant_id, name)
    error = await refusal(add(harness, created.tenant.tenant_id, "one-more.example.org"))
    assert (error.reason, error.metadata["rule"]) == (error_reason_pb2.ERROR_REASON_PLAN_LIMIT, "domains")
    assert await harness.value("SELECT count(*) FROM tenant.domain_directory WHERE domain = 'one-more.example.org'") == 0
    assert await add(harness, created.tenant.tenant_id, names[0]) == names[0]


async def test_only_operators_give_domains(harness: Harness) -> None:
    """A tenant cannot take a host by itself."""
    created = await harness.create()
    request = pb.AddDomainRequest(domain="mine.example.org")
    error = await refusal(call(harness.domains.AddDomain, request, with_key(created.api_key)))
    assert error.reason == error_reason_pb2.ERROR_REASON_SCOPE_MISSING


async def test_an_erased_tenants_domains_are_free(harness: Harness) -> None:
    """Nothing of them stays."""
    created, domain = await named(harness)
    metadata = as_service("tenant", (await harness.authenticate(created.api_key)).context_token)
    erased = await call(harness.lifecycle.EraseTenant, lifecycle_service_pb2.EraseTenantRequest(), metadata)
    counts = {item.kind: item.count for item in erased.erased}
    assert (counts["postgres:tenant.domains"], counts["postgres:tenant.domain_directory"]) == (1, 1)
    assert (await refusal(resolve(harness, domain))).code is grpc.StatusCode.NOT_FOUND


@given(st.text(max_size=40), st.text(max_size=40))
def test_reading_a_claim_never_fails_and_claims_only_what_stands_there(host: str, path: str) -> None:
    """Any text is read; what is claimed is part of the text, and a domain is always lower-case ASCII."""
    claim = read_claim(host, path, ("base.example",))
    assert claim.path_slug is None or path.startswith(f"/t/{claim.path_slug}")
    assert claim.domain is None or (claim.domain.isascii() and claim.domain == claim.domain.lower())
    assert claim.host_slug is None or claim.host_slug.lower() in host.lower()
    assert claim.is_empty == (claim == NameClaim())


@given(st.text(max_size=60))
def test_a_domain_that_is_taken_is_in_its_one_spelling(text: str) -> None:
    """Whatever is accepted is lower-case ASCII and reads as itself again."""
    try:
        name = read_domain(text, "domain")
    except InvalidRequest:
        return
    assert name.isascii()
    assert read_domain(name, "domain") == name == name.lower()


@pytest.mark.parametrize("value", ["localhost", "*.example.org", "a.example,b.a.example", "10.0.0.1", "example.org:443"])
def test_base_domains_that_mean_two_things_are_refused(value: str) -> None:
    """A setting with a single label, a wildcard, an address, a port or one base under another stops the service."""
    with pytest.raises(ValueError, match="TENANTRY_BASE_DOMAINS"):
        TenantSettings(base_domains=value)
    assert read_base_domains(["One.Example", "two.example."]) == ("one.example", "two.example")
