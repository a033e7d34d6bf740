"""Issuers of a tenant's: registered and removed by operators, and granting what the tenant's own credentials hold and hand out."""

from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest

from mesh.common.v1 import error_reason_pb2
from mesh.tenant.v1 import issuer_service_pb2 as pb
from tests.support.jwks import SigningKey, running_jwks
from tests.tenant.harness import Harness, Metadata, call, refusal, taken_apart, with_key
from tests.tenant.test_api_keys import make_key
from tests.tenant.token_bench import AUDIENCE, INVALID, Bench, bench, proven, register, wish


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("jwks_uri", {"jwks_uri": "http://login.example/keys"}),
        ("jwks_uri", {"jwks_uri": "http://localhost.example/keys"}),
        ("jwks_uri", {"jwks_uri": "file:///etc/passwd"}),
        ("jwks_uri", {"jwks_uri": "https://user:pw@login.example/keys"}),
        ("jwks_uri", {"jwks_uri": "https://login.example/keys#x"}),
        ("jwks_uri", {"jwks_uri": "https://login.example:99999/"}),
        ("jwks_uri", {"jwks_uri": "https://l\u00f6gin.example/"}),
        ("scopes", {"scopes": ["operator:tenants"]}),
        ("algorithms[0]", {"algorithms": [0]}),
        ("algorithms[0]", {"algorithms": [99]}),
        ("algorithms", {"algorithms": []}),
        ("clock_skew_seconds", {"clock_skew_seconds": 61}),
        ("issuer", {"issuer": ""}),
        ("audience", {"audience": "a\nb"}),
    ],
)
async def test_a_bad_registration_is_refused_by_its_field(harness: Harness, field: str, changes: dict[str, Any]) -> None:
    """Plain http beyond loopback, other schemes, users, an operator's scope, none as algorithm: INVALID_ARGUMENT names the field."""
    created, key = await harness.create(), SigningKey()
    async with running_jwks(key) as server:
        error = await refusal(register(harness, created.tenant.tenant_id, wish(server, key, **changes)))
        assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        assert server.requests == []


async def test_an_operator_registers_no_issuer_that_spends_a_tenants_money(harness: Harness) -> None:
    """inference:generate is no operator's to hand out: such a registration is SCOPE_MISSING, and nothing is fetched or written."""
    created, key = await harness.create(), SigningKey()
    async with running_jwks(key) as server:
        request = wish(server, key, scopes=["tenant:read", "inference:generate"])
        error = await refusal(register(harness, created.tenant.tenant_id, request))
        assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, error_reason_pb2.ERROR_REASON_SCOPE_MISSING)
        assert error.metadata["scope"] == "inference:generate"
        assert "SetIssuerScopes" in error.message
        assert server.requests == []
        listed = await call(harness.issuers.ListIssuers, pb.ListIssuersRequest(), harness.as_operator(created.tenant.tenant_id))
        assert list(listed.issuers) == []


async def grant(b: Bench, metadata: Metadata, *scopes: str, issuer_id: str = "") -> pb.Issuer:
    """Sets what the bench's issuer may grant."""
    request = pb.SetIssuerScopesRequest(issuer_id=issuer_id or b.issuer.issuer_id, scopes=scopes)
    return (await call(b.harness.issuers.SetIssuerScopes, request, metadata)).issuer


async def announced(b: Bench) -> int:
    """How often a change of the tenant's issuers was announced."""
    count = "SELECT count(*) FROM tenant.changes WHERE tenant_id = $1 AND kind = 'ISSUER'"
    return int(await b.harness.value(count, UUID(b.tenant_id)))


async def test_a_tenants_own_key_lets_its_tokens_call_inference_and_takes_it_back(harness: Harness) -> None:
    """inference:generate is in a token's context after the tenant granted it to the issuer, not before, and not after it took it back."""
    async with bench(harness) as b:
        token = b.token(scope="tenant:read inference:generate")
        assert (await proven(harness, token)).scopes == {"tenant:read"}
        issuer = await grant(b, with_key(b.api_key), "tenant:read", "inference:generate")
        b.issuer.scopes[:] = ["inference:generate", "tenant:read"]
        assert issuer == b.issuer
        assert (await proven(harness, token)).scopes == {"tenant:read", "inference:generate"}
        assert (await proven(harness, b.token(scope="tenant:read"))).scopes == {"tenant:read"}
        await grant(b, with_key(b.api_key), "tenant:read")
        assert (await proven(harness, token)).scopes == {"tenant:read"}
        await grant(b, with_key(b.api_key))
        assert (await proven(harness, token)).scopes == frozenset()


async def test_nobody_grants_an_issuer_what_they_do_not_hold(harness: Harness) -> None:
    """An operator who acts for the tenant, and a key without the scope, are SCOPE_MISSING by its name; nothing is changed or announced."""
    async with bench(harness) as b:
        narrow = (await make_key(harness, b.api_key, scopes=["tenant:admin", "tenant:read"])).api_key
        before = await announced(b)
        for metadata, scope in (
            (harness.as_operator(b.tenant_id), "inference:generate"),
            (harness.as_operator(b.tenant_id), "operator:tenants"),
            (with_key(narrow), "inference:generate"),
            (with_key(narrow), "usage:read"),
            (with_key(b.api_key), "operator:tenants"),
            (with_key(b.api_key), "made:up"),
        ):
            error = await refusal(grant(b, metadata, "tenant:read", scope))
            assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, error_reason_pb2.ERROR_REASON_SCOPE_MISSING)
            assert error.metadata["scope"] == scope
        listed = await call(harness.issuers.ListIssuers, pb.ListIssuersRequest(), with_key(b.api_key))
        assert (list(listed.issuers), await announced(b)) == ([b.issuer], before)


async def test_a_token_grants_its_own_issuer_no_more_than_the_token_holds(harness: Harness) -> None:
    """Whoever has the key of an issuer with tenant:admin cannot make it spend; only who may change the tenant may change its issuers."""
    async with bench(harness, scopes=["tenant:admin", "tenant:read"]) as b:
        token = b.token(scope="tenant:admin inference:generate")
        error = await refusal(grant(b, with_key(token), "tenant:admin", "inference:generate"))
        assert (error.reason, error.metadata["scope"]) == (error_reason_pb2.ERROR_REASON_SCOPE_MISSING, "inference:generate")
        error = await refusal(grant(b, with_key(b.token(scope="tenant:read")), "tenant:read"))
        assert (error.reason, error.metadata["scope"]) == (error_reason_pb2.ERROR_REASON_SCOPE_MISSING, "tenant:admin")
        assert list((await grant(b, with_key(b.token(scope="tenant:admin")), "tenant:admin")).scopes) == ["tenant:admin"]


async def test_what_an_issuer_has_is_kept_and_taken_by_who_does_not_hold_it(harness: Harness) -> None:
    """An operator changes the rest beside a scope that the tenant granted, takes that one away, and cannot give it back."""
    async with bench(harness) as b:
        operator = harness.as_operator(b.tenant_id)
        await grant(b, with_key(b.api_key), "inference:generate")
        assert list((await grant(b, operator, "inference:generate", "usage:read")).scopes) == ["inference:generate", "usage:read"]
        assert list((await grant(b, operator, "usage:read")).scopes) == ["usage:read"]
        error = await refusal(grant(b, operator, "inference:generate", "usage:read"))
        assert error.reason == error_reason_pb2.ERROR_REASON_SCOPE_MISSING


async def test_a_change_of_an_issuers_scopes_is_recorded_and_announced_and_a_repetition_is_not(harness: Harness) -> None:
    """The record says who added and removed what, an operator's why; the same set again leaves no trace."""
    async with bench(harness) as b:
        before = await announced(b)
        for _ in range(2):
            await grant(b, with_key(b.api_key), "inference:generate", "tenant:read")
        assert await announced(b) == before + 1
        await grant(b, harness.as_operator(b.tenant_id), "tenant:read")
        assert await announced(b) == before + 2
        records = await harness.audit(b.tenant_id, "ISSUER_SCOPES_CHANGED")
        by_action = {record["detail"]: record for record in records}
        first = by_action.pop('{"added": ["inference:generate"], "removed": ["documents:read"]}')
        second = by_action.pop('{"added": [], "removed": ["inference:generate"]}')
        assert not by_action
        assert first["subject"] == f"key:{taken_apart(b.api_key).key_id}"
        assert (second["subject"].startswith("operator:"), second["reason"]) == (True, "customer call 4711")
        assert {first["target"], second["target"]} == {f"issuer:{b.issuer.issuer_id}"}


async def test_another_tenants_issuer_is_as_absent_as_one_that_never_was(harness: Harness) -> None:
    """NOT_FOUND in the same words for both, whatever is granted; the issuer stays as it was, and is in its own tenant's list alone."""
    stranger = await harness.create()
    async with bench(harness) as b:
        metadata, errors = with_key(stranger.api_key), []
        for issuer_id in (b.issuer.issuer_id, str(uuid4())):
            for scope in ("inference:generate", "operator:tenants"):
                errors.append(await refusal(grant(b, metadata, scope, issuer_id=issuer_id)))
        assert {error.code for error in errors} == {grpc.StatusCode.NOT_FOUND}
        assert len({(error.message, tuple(sorted(error.metadata.items()))) for error in errors}) == 1
        listed = await call(harness.issuers.ListIssuers, pb.ListIssuersRequest(), metadata)
        assert list(listed.issuers) == []
        listed = await call(harness.issuers.ListIssuers, pb.ListIssuersRequest(), with_key(b.api_key))
        assert list(listed.issuers) == [b.issuer]


async def test_an_issuer_and_audience_speak_for_one_tenant_only(harness: Harness) -> None:
    """The same pair is ALREADY_EXISTS for whichever tenant; another audience of the issuer is another tenant's to have."""
    other = await harness.create()
    async with bench(harness) as b:
        request = wish(b.server, b.key, issuer=b.issuer.issuer)
        for tenant_id in (other.tenant.tenant_id, b.tenant_id):
            error = await refusal(register(harness, tenant_id, request))
            assert (error.code, error.metadata["field"]) == (grpc.StatusCode.ALREADY_EXISTS, "issuer")
        second = wish(b.server, b.key, issuer=b.issuer.issuer, audience="second")
        await register(harness, other.tenant.tenant_id, second)
        assert str((await proven(harness, b.token())).tenant_id) == b.tenant_id
        assert str((await proven(harness, b.token(aud="second"))).tenant_id) == other.tenant.tenant_id
        assert (await b.refused(b.token(aud=[AUDIENCE, "second"]))).reason == INVALID
        error = await refusal(harness.authenticate(b.token(), claimed=UUID(other.tenant.tenant_id).bytes))
        assert error.reason == error_reason_pb2.ERROR_REASON_TENANT_MISMATCH
        [record] = await harness.audit(b.tenant_id, "TENANT_MISMATCH")
        assert record["subject"] == f"jwt:{b.issuer.issuer_id}:user-1"


async def test_a_registration_is_found_by_issuer_and_audience_together(harness: Harness) -> None:
    """Were no claim compared afterwards, the issuer's name alone, or the audience's, would still find nobody's registration."""
    find = "SELECT count(*) FROM tenant.find_issuer($1, $2::text[])"
    async with bench(harness) as b:
        for issuer, audience, found in (
            (b.issuer.issuer, AUDIENCE, 1),
            (b.issuer.issuer, "another", 0),
            ("https://login.example/nobody", AUDIENCE, 0),
        ):
            assert await harness.value(find, issuer, [audience]) == found


async def test_issuers_are_listed_and_a_removed_one_is_dead_at_the_next_question(harness: Harness) -> None:
    """Removal frees the pair, is recorded and announced; another tenant's issuer is as absent as one that never was."""
    other = await harness.create()
    async with bench(harness) as b:
        await harness.authenticate(b.token())
        listing = await call(harness.issuers.ListIssuers, pb.ListIssuersRequest(), harness.as_operator(b.tenant_id))
        assert list(listing.issuers) == [b.issuer]
        request = pb.RemoveIssuerRequest(issuer_id=b.issuer.issuer_id)
        error = await refusal(call(harness.issuers.RemoveIssuer, request, harness.as_operator(other.tenant.tenant_id)))
        assert error.code is grpc.StatusCode.NOT_FOUND
        await call(harness.issuers.RemoveIssuer, request, harness.as_operator(b.tenant_id))
        assert (await b.refused(b.token())).reason == INVALID
        for action in ("ISSUER_ADDED", "ISSUER_REMOVED"):
            [record] = await harness.audit(b.tenant_id, action)
            assert record["subject"].startswith("operator:")
            assert record["target"] == f"issuer:{b.issuer.issuer_id}"
        kinds = await harness.value("SELECT array_agg(kind ORDER BY change_id) FROM tenant.changes WHERE tenant_id = $1", UUID(b.tenant_id))
        # The first one told that the tenant is there.
        assert kinds == ["STATE", "ISSUER", "ISSUER"]
        await register(harness, other.tenant.tenant_id, wish(b.server, b.key, issuer=b.issuer.issuer))


async def test_a_tenant_has_at_most_twenty_issuers(harness: Harness) -> None:
    """The twenty-first is PLAN_LIMIT."""
    async with bench(harness) as b:
        await harness.execute(
            "INSERT INTO tenant.issuers (tenant_id, issuer, audience, jwks_uri, algorithms, scopes, clock_skew_seconds) "
            "SELECT $1, n::text, 'a', 'https://login.example', '{ES256}', '{tenant:read}', 0 FROM generate_series(1, 19) n",
            UUID(b.tenant_id),
        )
        error = await refusal(register(harness, b.tenant_id, wish(b.server, b.key)))
        assert (error.reason, error.metadata["rule"]) == (error_reason_pb2.ERROR_REASON_PLAN_LIMIT, "issuers")


async def test_only_operators_register_issuers(harness: Harness) -> None:
    """A tenant's key lacks the scope, and an operator names the tenant."""
    created, key = await harness.create(), SigningKey()
    async with running_jwks(key) as server:
        error = await refusal(call(harness.issuers.AddIssuer, wish(server, key), with_key(created.api_key)))
        assert error.reason == error_reason_pb2.ERROR_REASON_SCOPE_MISSING
        error = await refusal(call(harness.issuers.AddIssuer, wish(server, key), harness.as_operator()))
        assert error.metadata == {"key": "x-tenant-id"}
