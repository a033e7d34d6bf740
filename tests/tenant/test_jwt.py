"""JWTs of registered issuers, with real keys fetched over HTTP: taken when everything fits, refused in the same words otherwise."""

import asyncio
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import grpc
import pytest
import structlog
from cryptography.hazmat.primitives import serialization

from mesh.common.v1 import error_reason_pb2, lifecycle_service_pb2
from mesh.tenant.v1 import api_key_service_pb2, domain_service_pb2, tenant_service_pb2
from services.kernel.telemetry.logging import configure_logging
from services.tenant.context_minting import ContextMinter, Grant, new_signing_seed, read_signing_key
from tests.support.jwks import SigningKey, claims_of, running_jwks, unsigned
from tests.tenant.harness import Harness, as_service, call, refusal, with_key
from tests.tenant.token_bench import ALGORITHMS, AUDIENCE, INVALID, Bench, bench, proven, register, wish


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_token_of_a_registered_issuer_speaks_for_its_tenant(harness: Harness, algorithm: str) -> None:
    """With each algorithm: the tenant, the subject by issuer, and only scopes that were asked for, granted and a tenant's."""
    async with bench(harness, algorithm) as b:
        context = await proven(harness, b.token(scope="tenant:read usage:read operator:tenants made:up"))
        assert str(context.tenant_id) == b.tenant_id
        assert context.subject == f"jwt:{b.issuer.issuer_id}:user-1"
        assert (context.scopes, context.operator) == (frozenset({"tenant:read"}), False)
        answer = await call(harness.tenants.GetTenant, tenant_service_pb2.GetTenantRequest(), with_key(b.token()))
        assert answer.tenant.tenant_id == b.tenant_id
        assert len(b.server.requests) == 2


async def test_the_context_ends_with_the_token_and_after_300_seconds_at_the_latest(harness: Harness) -> None:
    """A short token gives a short context; one that has ended, inside the skew that was granted, lives by the issuer's clock."""
    async with bench(harness, clock_skew_seconds=60) as b:
        for seconds, least, most in ((60, 50, 61), (3600, 290, 301), (-30, 20, 31)):
            left = (await harness.authenticate(b.token(seconds=seconds))).expire_time.ToDatetime().timestamp()
            left -= time.time() + time.timezone
            assert least <= left <= most, seconds


Forgery = Callable[[Bench], str]
OTHER = SigningKey("ES256")


def _hs256(b: Bench) -> str:
    # The classic: the public key, which everybody has, taken for a shared secret.
    public = b.key.private.public_key()
    secret = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signed = unsigned({"alg": "HS256", "kid": b.key.kid}, b.claims()).rpartition(".")[0]
    return unsigned({"alg": "HS256", "kid": b.key.kid}, b.claims(), hmac.new(secret, signed.encode(), hashlib.sha256).digest())


FORGERIES: dict[str, Forgery] = {
    "alg none": lambda b: unsigned({"alg": "none", "kid": b.key.kid}, b.claims()),
    "alg none with a signature": lambda b: unsigned({"alg": "none", "kid": b.key.kid}, b.claims(), b"x"),
    "alg None": lambda b: unsigned({"alg": "NoNe", "kid": b.key.kid}, b.claims(), b"x"),
    "no alg": lambda b: unsigned({"kid": b.key.kid}, b.claims(), b"x"),
    "HS256 with the public key as secret": _hs256,
    "another algorithm than registered": lambda b: SigningKey("EdDSA", b.key.kid).sign(b.claims()),
    "signed by another key under this kid": lambda b: SigningKey("ES256", b.key.kid).sign(b.claims()),
    "claims changed after signing": lambda b: _swapped(b.token(), b.token(sub="admin")),
    "signature cut off": lambda b: b.token().rpartition(".")[0] + ".",
    "signature of zeros": lambda b: unsigned({"alg": "ES256", "kid": b.key.kid}, b.claims(), bytes(64)),
    "kid unknown": lambda b: OTHER.sign(b.claims()),
    "kid missing": lambda b: unsigned({"alg": "ES256"}, b.claims(), b"x"),
    "its own key in the header": lambda b: SigningKey("ES256", b.key.kid).sign(b.claims(), jwk=OTHER.public_jwk()),
    "crit": lambda b: b.key.sign(b.claims(), crit=["exp"]),
    "wrong issuer": lambda b: b.token(iss="https://login.example/nobody"),
    "an issuer of half a character": lambda b: b.key.sign_text(json.dumps(b.claims() | {"iss": "\ud800"}).encode()),
    "no issuer": lambda b: b.token(iss=None),
    "wrong audience": lambda b: b.token(aud="another-api"),
    "no audience": lambda b: b.token(aud=None),
    "audience as part of a text": lambda b: b.token(aud=f"x {AUDIENCE}"),
    "no exp": lambda b: b.token(exp=None),
    "exp as text": lambda b: b.token(exp="9999999999"),
    "exp as true": lambda b: b.token(exp=True),
    "exp beyond all calendars": lambda b: b.token(exp=10**30),
    "nbf in the future": lambda b: b.token(nbf=int(time.time()) + 120),
    "iat in the future": lambda b: b.token(iat=int(time.time()) + 120),
    "no sub": lambda b: b.token(sub=None),
    "empty sub": lambda b: b.token(sub=""),
    "sub too long": lambda b: b.token(sub="s" * 201),
    "sub with a line break": lambda b: b.token(sub="a\nb"),
    "scope as a list": lambda b: b.token(scope=["tenant:read"]),
    "claims are no object": lambda b: unsigned({"alg": "ES256", "kid": b.key.kid}, ["x"], b"x"),
    "claims nested too deep": lambda b: unsigned({"alg": "ES256", "kid": b.key.kid}, b"[" * 2500, b"x"),
    "a name twice": lambda b: b.key.sign_text(json.dumps(b.claims()).replace("{", '{"sub": "somebody else", ', 1).encode()),
    "no JSON": lambda b: b.key.sign_text(json.dumps(b.claims() | {"x": float("nan")}).encode()),
    "too long": lambda b: b.token(padding="p" * 4096),
    "four parts": lambda b: f"{b.token()}.x",
}


def _swapped(real: str, other: str) -> str:
    return ".".join((*other.split(".")[:2], real.split(".")[2]))


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_forged_token_is_refused_as_any_bad_credential(harness: Harness, forgery: str) -> None:
    """Whatever is wrong with it, the answer is the one of a malformed key: nothing tells which check failed."""
    async with bench(harness) as b:
        token = FORGERIES[forgery](b)
        error, plain = await b.refused(token if len(token) <= 4096 else token[:4096]), await b.refused("no-credential")
        assert (error.code, error.reason, error.message, error.metadata) == (plain.code, INVALID, plain.message, plain.metadata)
        assert (await harness.authenticate(b.token())).context_token


async def test_an_ended_token_says_when_it_ended(harness: Harness) -> None:
    """Only a rightly signed token learns that it is CREDENTIAL_EXPIRED; skew is what was granted and no more."""
    async with bench(harness, clock_skew_seconds=10) as b:
        error = await b.refused(b.token(seconds=-20))
        assert error.reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_EXPIRED
        assert error.metadata["expire_time"].endswith("Z")
        assert (await b.refused(SigningKey("ES256", b.key.kid).sign(b.claims(seconds=-20)))).reason == INVALID
        assert (await harness.authenticate(b.token(nbf=int(time.time()) + 5))).context_token


async def test_a_refused_token_is_audited_without_a_word_of_its_own(harness: Harness) -> None:
    """The tenant's log names the issuer and the address; the subject was never proven and is not in it."""
    async with bench(harness) as b:
        await b.refused(SigningKey("ES256", b.key.kid).sign(b.claims(sub="forged-name")))
        [record] = await harness.audit(b.tenant_id, "CREDENTIAL_REFUSED")
        assert (record["subject"], record["peer_address"]) == (f"jwt:{b.issuer.issuer_id}", "192.0.2.7")


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("RS256", {"alg": "PS256"}),
        ("ES256", {"use": "enc"}),
        ("ES256", {"key_ops": ["sign"]}),
        ("ES256", {"kty": "oct", "k": "c2VjcmV0"}),
        ("EdDSA", {"crv": "Ed448"}),
        ("RS256", {"d": "AQAB"}),
        ("ES256", {"x": 5}),
        ("ES256", {"kid": 7}),
    ],
)
async def test_a_key_is_used_for_nothing_but_what_it_is_for(harness: Harness, algorithm: str, changes: dict[str, Any]) -> None:
    """A key of another use, type or algorithm, and one that shows its private half, is none: registration is refused."""
    created, key = await harness.create(), SigningKey(algorithm)
    async with running_jwks(key) as server:
        server.keys = [key.public_jwk(**changes)]
        error = await refusal(register(harness, created.tenant.tenant_id, wish(server, key)))
        assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "jwks_uri")


async def test_a_key_proves_with_the_registered_algorithm_alone(harness: Harness) -> None:
    """A published key that names no algorithm could verify several: a token it signed with one that is not registered proves nothing."""
    created, key = await harness.create(), SigningKey("RS256")
    async with running_jwks(key) as server:
        server.keys = [{name: value for name, value in key.public_jwk().items() if name != "alg"}]
        issuer = await register(harness, created.tenant.tenant_id, wish(server, key))
        claims = claims_of(issuer.issuer, AUDIENCE)
        assert (await harness.authenticate(key.sign(claims))).context_token
        key.algorithm = "PS256"
        assert (await refusal(harness.authenticate(key.sign(claims)))).reason == INVALID


async def test_a_new_key_is_found_and_an_old_one_dies_with_its_place_in_the_set(harness: Harness) -> None:
    """After the issuer rotates, tokens of the new key are taken and tokens of the removed key are refused."""
    async with bench(harness) as b:
        old, b.key = b.key, SigningKey("ES256")
        b.server.keys = [b.key.public_jwk()]
        assert (await harness.authenticate(b.token())).context_token
        assert (await b.refused(old.sign(b.claims()))).reason == INVALID


async def test_made_up_kids_cause_no_flood_of_fetches(harness: Harness) -> None:
    """Fifty unknown names at once cost the issuer one request in five seconds."""
    async with bench(harness) as b:
        await harness.authenticate(b.token())
        fetched = len(b.server.requests)
        async with asyncio.TaskGroup() as group:
            for _ in range(50):
                group.create_task(b.refused(unsigned({"alg": "ES256", "kid": secrets.token_hex(8)}, b.claims(), b"x")))
        assert len(b.server.requests) - fetched <= 1


DAMAGE: dict[str, dict[str, Any]] = {
    "down": {"status": 503},
    "gone": {"status": 404},
    "redirect": {"status": 302, "headers": {"location": "/elsewhere"}},
    "huge": {"body": b'{"keys": [' + b" " * 70_000 + b"]}"},
    "no json": {"body": b"<html>"},
    "no set": {"body": b'{"keys": 5}'},
    "compressed": {"headers": {"content-encoding": "gzip"}},
    "two of one name": {"keys": [OTHER.public_jwk(), OTHER.public_jwk()]},
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_an_issuer_whose_keys_cannot_be_had_is_not_registered(harness: Harness, damage: str) -> None:
    """Down is UNAVAILABLE, anything that is no key set INVALID_ARGUMENT; a redirect is not followed; nothing is written."""
    created, key = await harness.create(), SigningKey()
    async with running_jwks(key) as server:
        for name, value in DAMAGE[damage].items():
            setattr(server, name, value)
        request = wish(server, key)
        error = await refusal(register(harness, created.tenant.tenant_id, request))
        if damage == "down":
            assert (error.code, error.metadata["dependency"]) == (grpc.StatusCode.UNAVAILABLE, "jwks")
        else:
            assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "jwks_uri")
        assert server.requests == ["/keys"]
        for table in ("issuers", "issuer_directory"):
            assert await harness.value(f"SELECT count(*) FROM tenant.{table} WHERE issuer = $1", request.issuer) == 0


@pytest.mark.parametrize("damage", ["down", "redirect", "huge", "no json"])
async def test_keys_that_cannot_be_had_make_a_first_token_unavailable(harness: Harness, damage: str) -> None:
    """Where nobody can tell who signed, the caller is told to come back and not that the token is bad; known keys are used meanwhile."""
    async with bench(harness) as b:
        for name, value in DAMAGE[damage].items():
            setattr(b.server, name, value)
        error = await b.refused(b.token())
        assert (error.code, error.metadata["dependency"]) == (grpc.StatusCode.UNAVAILABLE, "jwks")
        assert error.retry_after_seconds
        assert len(b.server.requests) == 2
    async with bench(harness) as b:
        await harness.authenticate(b.token())
        for name, value in DAMAGE[damage].items():
            setattr(b.server, name, value)
        assert (await harness.authenticate(b.token())).context_token


def test_an_operators_context_with_the_right_to_spend_is_not_minted() -> None:
    """Whatever leads there, the one place that signs contexts signs none for an operator that holds inference:generate."""
    minter = ContextMinter(read_signing_key(new_signing_seed()), [], region="", clock=lambda: datetime.now(UTC))
    with pytest.raises(ValueError, match="inference:generate"):
        minter.mint(Grant(None, None, "operator:test", frozenset({"operator:tenants", "inference:generate"}), operator=True))


async def test_a_right_token_out_of_its_time_or_place_is_on_record(harness: Harness) -> None:
    """An ended token, a suspended tenant's and one of another region's tenant each leave a record that says what it was refused as."""
    async with bench(harness) as b:
        await b.refused(b.token(seconds=-20))
        await harness.execute("UPDATE tenant.tenants SET state = 'SUSPENDED' WHERE tenant_id = $1", UUID(b.tenant_id))
        await b.refused(b.token())
        await harness.execute("UPDATE tenant.tenants SET state = 'ACTIVE', region = 'eu-west' WHERE tenant_id = $1", UUID(b.tenant_id))
        await b.refused(b.token())
        issuer = f"jwt:{b.issuer.issuer_id}"
        records = await harness.audit(b.tenant_id, "CREDENTIAL_REFUSED")
        assert {(record["subject"], record["target"], record["peer_address"]) for record in records} == {
            (issuer, "refused:CREDENTIAL_EXPIRED", "192.0.2.7"),
            (f"{issuer}:user-1", "refused:TENANT_SUSPENDED", "192.0.2.7"),
            (f"{issuer}:user-1", "refused:WRONG_CELL", "192.0.2.7"),
        }


async def test_a_suspended_tenants_tokens_are_refused(harness: Harness) -> None:
    """A right token of a suspended tenant is told so; a forged one is not."""
    async with bench(harness) as b:
        await harness.execute("UPDATE tenant.tenants SET state = 'SUSPENDED' WHERE tenant_id = $1", UUID(b.tenant_id))
        assert (await b.refused(b.token())).reason == error_reason_pb2.ERROR_REASON_TENANT_SUSPENDED
        assert (await b.refused(SigningKey("ES256", b.key.kid).sign(b.claims()))).reason == INVALID


async def test_an_erased_tenants_issuers_and_domains_go_with_it(harness: Harness) -> None:
    """They are in the export; afterwards nothing of them stays."""
    async with bench(harness) as b:
        metadata = as_service("tenant", (await harness.authenticate(b.api_key)).context_token)
        await call(
            harness.domains.AddDomain,
            domain_service_pb2.AddDomainRequest(domain=f"{secrets.token_hex(8)}.example.org"),
            harness.as_operator(b.tenant_id),
        )
        stream = harness.lifecycle.ExportTenant(lifecycle_service_pb2.ExportTenantRequest(), metadata=metadata, timeout=20)
        assert {item.kind async for item in stream} >= {"postgres:tenant.issuers", "postgres:tenant.domains"}
        erased = await call(harness.lifecycle.EraseTenant, lifecycle_service_pb2.EraseTenantRequest(), metadata)
        counts = {item.kind: item.count for item in erased.erased}
        assert (counts["postgres:tenant.issuers"], counts["postgres:tenant.issuer_directory"]) == (1, 1)
        assert (await b.refused(b.token())).reason == INVALID
        assert len(await harness.audit(b.tenant_id, "ISSUER_REVOKED")) == 1


async def test_no_token_is_in_the_logs(harness: Harness, capfd: pytest.CaptureFixture[str]) -> None:
    """At the most talkative level no part of a token, taken or refused, stands in any line."""
    configure_logging("tenant", "DEBUG")
    try:
        async with bench(harness) as b:
            tokens = [b.token(), *(FORGERIES[name](b) for name in ("alg none with a signature", "kid unknown", "wrong audience"))]
            await harness.authenticate(tokens[0])
            for token in tokens[1:]:
                await b.refused(token)
            b.server.status = 500
            for token in tokens:
                await refusal(call(harness.keys.ListApiKeys, api_key_service_pb2.ListApiKeysRequest(), with_key(token)))
        structlog.get_logger("probe").info("probe_line")
    finally:
        lines = "".join(capfd.readouterr())
        structlog.reset_defaults()
    assert "probe_line" in lines
    parts = [part for token in tokens for part in token.split(".") if len(part) > 8]
    assert [part for part in parts if part in lines] == []
    assert "eyJ" not in lines
