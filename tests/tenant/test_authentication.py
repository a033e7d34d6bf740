"""Credentials: who gets in, who does not, and how little a stranger learns."""

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import grpc
import pytest

from mesh.common.v1 import error_reason_pb2
from mesh.tenant.v1 import api_key_service_pb2, authentication_service_pb2, tenant_service_pb2
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.errors import MeshError
from services.kernel.tenant_context import TenantContext
from services.tenant.adapters.plan_loader import read_plan_file
from services.tenant.api_key import ApiKeyText, new_api_key, new_operator_key
from services.tenant.app import PLAN_FILE
from services.tenant.context_minting import public_key_id, read_signing_key
from services.tenant.scopes import TENANT_SCOPES
from tests.tenant.harness import Harness, as_service, call, refusal, taken_apart, with_key


async def proven(harness: Harness, token: str) -> TenantContext:
    """Verifies a token with the published keys only."""
    published = await call(
        harness.authentication.GetContextKeys, authentication_service_pb2.GetContextKeysRequest(), as_service("metering")
    )
    public = {key.key_id: key.public_key for key in published.keys}
    own = read_signing_key(harness.settings.context_signing_key.get_secret_value()).private_key.public_key()

    class Published:
        async def fetch_keys(self) -> dict[str, object]:
            assert public == {public_key_id(own): own.public_bytes_raw()}
            return {public_key_id(own): own}

    return await ContextTokenVerifier(Published()).verify(token)  # type: ignore[arg-type] # the key type is checked by the assert


async def test_an_operator_reads_the_verifying_keys_and_a_tenant_does_not(harness: Harness) -> None:
    """Who keeps receipts keeps the keys that prove them: operators get what services get; tenants' keys and front ends do not."""
    request = authentication_service_pb2.GetContextKeysRequest()
    to_service = await call(harness.authentication.GetContextKeys, request, as_service("metering"))
    assert await call(harness.authentication.GetContextKeys, request, harness.as_operator()) == to_service
    created = await harness.create()
    for metadata in (with_key(created.api_key), harness.as_front()):
        error = await refusal(call(harness.authentication.GetContextKeys, request, metadata))
        assert (error.reason, error.metadata) == (error_reason_pb2.ERROR_REASON_SCOPE_MISSING, {"scope": "operator:tenants"})
    error = await refusal(call(harness.authentication.GetContextKeys, request, harness.as_operator(reason=None)))
    assert error.reason == error_reason_pb2.ERROR_REASON_OPERATOR_REASON_MISSING


def facts(error: MeshError) -> tuple[object, ...]:
    """Everything of a refusal that reaches a caller."""
    return (
        error.code,
        error.reason,
        error.message,
        dict(error.metadata),
        error.retry_after_seconds,
        error.field_violations,
        error.quota_violations,
    )


async def test_an_api_key_becomes_the_claims_of_its_tenant(harness: Harness) -> None:
    """A live key proves its tenant, tier, region, subject, scopes and configuration version for at most 300 s."""
    created = await harness.create()
    answer = await harness.authenticate(created.api_key)
    context = await proven(harness, answer.context_token)
    assert context.tenant_id == UUID(created.tenant.tenant_id)
    assert (context.tier, context.region, context.operator) == ("professional", "local", False)
    assert context.subject == f"key:{taken_apart(created.api_key).key_id}"
    assert context.scopes == TENANT_SCOPES
    assert context.config_version == read_plan_file(PLAN_FILE).version + 1
    assert timedelta(seconds=290) < context.expire_time - datetime.now(UTC) <= timedelta(seconds=300)
    assert answer.expire_time.ToDatetime(tzinfo=UTC) == context.expire_time


async def test_a_token_never_outlives_its_key(harness: Harness) -> None:
    """A key that ends in a minute gives tokens that end with it."""
    created = await harness.create()
    end = datetime.now(UTC) + timedelta(seconds=60)
    key = await make_key(harness, created.api_key, expire_time=end)
    context = await proven(harness, (await harness.authenticate(key)).context_token)
    assert context.expire_time == end


async def test_refused_keys_look_alike_whatever_is_wrong_with_them(harness: Harness) -> None:
    """Malformed, mistyped, unknown, wrong-secret, revoked and not-yet-active credentials get one answer, equal in every field."""
    created = await harness.create()
    own = taken_apart(created.api_key)
    last = created.api_key[-1]
    revoked = await make_key(harness, created.api_key)
    await call(
        harness.keys.RevokeApiKey,
        api_key_service_pb2.RevokeApiKeyRequest(key_id=taken_apart(revoked).key_id),
        with_key(created.api_key),
    )
    unready = await harness.create()
    await harness.execute("UPDATE tenant.tenants SET state = 'PROVISIONING' WHERE tenant_id = $1", UUID(unready.tenant.tenant_id))
    credentials = {
        "malformed": "not a key",
        "not ascii": created.api_key.replace("ten_", "tén_"),
        "checksum wrong": created.api_key[:-1] + ("0" if last != "0" else "1"),
        "unknown": str(new_api_key("professional")),
        "wrong secret": str(ApiKeyText(own.tier, own.key_id, new_api_key("x").secret)),
        "revoked": revoked,
        "not yet active": unready.api_key,
        "unknown operator": str(new_operator_key()),
    }
    answers = {name: facts(await refusal(harness.authenticate(credential))) for name, credential in credentials.items()}
    assert answers["unknown"][:2] == (grpc.StatusCode.UNAUTHENTICATED, error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID)
    assert {name for name, answer in answers.items() if answer != answers["unknown"]} == set()


async def test_an_unknown_and_a_wrong_secret_key_are_the_same_bytes_on_the_wire(harness: Harness) -> None:
    """Nobody learns which key ids exist: code, text and status details are byte for byte the same."""
    created = await harness.create()
    own = taken_apart(created.api_key)
    seen = []
    for credential in (str(new_api_key(own.tier)), str(ApiKeyText(own.tier, own.key_id, new_api_key("x").secret))):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.authentication.Authenticate(
                authentication_service_pb2.AuthenticateRequest(credential=credential), metadata=as_service("inference"), timeout=5
            )
        details = [value for key, value in caught.value.trailing_metadata() or () if key == "grpc-status-details-bin"]
        seen.append((caught.value.code(), caught.value.details(), details))
    assert seen[0] == seen[1]
    assert seen[0][2]


async def test_an_expired_key_says_so_to_who_holds_its_secret(harness: Harness) -> None:
    """The right secret of an expired key learns when it ended; a wrong secret learns nothing."""
    created = await harness.create()
    key = taken_apart(created.api_key)
    await harness.execute("UPDATE tenant.api_keys SET expire_time = now() - interval '1 second' WHERE key_id = $1", key.key_id)
    error = await refusal(harness.authenticate(created.api_key))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, error_reason_pb2.ERROR_REASON_CREDENTIAL_EXPIRED)
    assert error.metadata["expire_time"].endswith("Z")
    wrong = str(ApiKeyText(key.tier, key.key_id, new_api_key("x").secret))
    assert (await refusal(harness.authenticate(wrong))).reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID


async def test_a_suspended_tenants_keys_are_refused_as_suspended(harness: Harness) -> None:
    """Suspension stops every key of the tenant at the next question."""
    created = await harness.create()
    await harness.authenticate(created.api_key)
    await harness.execute("UPDATE tenant.tenants SET state = 'SUSPENDED' WHERE tenant_id = $1", UUID(created.tenant.tenant_id))
    error = await refusal(harness.authenticate(created.api_key))
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, error_reason_pb2.ERROR_REASON_TENANT_SUSPENDED)


async def test_a_swapped_tenant_claim_is_refused_and_audited(harness: Harness) -> None:
    """A key sent with another tenant's id is refused, and the key's tenant finds it in its audit log."""
    created, other = await harness.create(), await harness.create()
    error = await refusal(harness.authenticate(created.api_key, claimed=UUID(other.tenant.tenant_id).bytes))
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, error_reason_pb2.ERROR_REASON_TENANT_MISMATCH)
    [record] = await harness.audit(created.tenant.tenant_id, "TENANT_MISMATCH")
    assert record["target"] == f"tenant:{other.tenant.tenant_id}"
    assert record["peer_address"] == "192.0.2.7"
    assert await harness.audit(other.tenant.tenant_id, "TENANT_MISMATCH") == []
    await harness.authenticate(created.api_key, claimed=UUID(created.tenant.tenant_id).bytes)


async def test_refusals_of_a_known_key_are_counted_in_the_audit_log(harness: Harness) -> None:
    """Guessing at a key is recorded once with its count, so that a flood of guesses cannot flood the log."""
    created = await harness.create()
    own = taken_apart(created.api_key)
    for _ in range(3):
        await refusal(harness.authenticate(str(ApiKeyText(own.tier, own.key_id, new_api_key("x").secret))))
    records = await harness.audit(created.tenant.tenant_id, "CREDENTIAL_REFUSED")
    assert sum(record["occurrence_count"] for record in records) == 3
    assert {record["subject"] for record in records} == {f"key:{own.key_id}"}


async def test_an_operator_without_a_reason_gets_nothing(harness: Harness) -> None:
    """An operator key needs a reason, and blanks are none."""
    for reason in ("", "   "):
        error = await refusal(harness.authenticate(str(harness.operator), reason=reason))
        assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, error_reason_pb2.ERROR_REASON_OPERATOR_REASON_MISSING)


async def test_an_operators_reason_at_the_door_has_at_most_500_characters(harness: Harness) -> None:
    """A longer reason is refused before anything is recorded."""
    request = tenant_service_pb2.ListTenantsRequest()
    error = await refusal(call(harness.tenants.ListTenants, request, harness.as_operator(reason="r" * 501)))
    assert error.reason == error_reason_pb2.ERROR_REASON_OPERATOR_REASON_MISSING
    assert await harness.value("SELECT count(*) FROM tenant.audit WHERE length(reason) > 500") == 0


async def test_an_operator_acts_for_a_named_tenant_without_spending_its_money(harness: Harness) -> None:
    """Naming a tenant gives every tenant scope but those that cost it something, and leaves a record with the reason."""
    created = await harness.create()
    tenant_id = UUID(created.tenant.tenant_id)
    answer = await harness.authenticate(str(harness.operator), claimed=tenant_id.bytes, reason="ticket 12")
    context = await proven(harness, answer.context_token)
    assert context.operator
    assert context.tenant_id == tenant_id
    assert context.scopes == (TENANT_SCOPES - {"inference:generate", "limits:consume", "usage:write"}) | {
        "operator:tenants",
        "operator:resolve",
    }
    [record] = await harness.audit(created.tenant.tenant_id, "OPERATOR_ACCESS")
    assert (record["subject"], record["reason"]) == (f"operator:{harness.operator.key_id}", "ticket 12")


async def test_an_operator_may_name_no_tenant_and_is_audited_all_the_same(harness: Harness) -> None:
    """Without a tenant an operator holds the operators' own scopes only; the record is kept under the nil tenant."""
    answer = await harness.authenticate(str(harness.operator), reason="weekly review 88")
    context = await proven(harness, answer.context_token)
    assert (context.tenant_id, context.scopes, context.operator) == (None, frozenset({"operator:tenants", "operator:resolve"}), True)
    records = await harness.audit(str(UUID(int=0)), "OPERATOR_ACCESS")
    assert "weekly review 88" in {record["reason"] for record in records}


async def test_an_operator_naming_an_absent_tenant_is_told_and_audited(harness: Harness) -> None:
    """There is no token for a tenant that is not there, but there is a record of the attempt."""
    absent = uuid4()
    error = await refusal(harness.authenticate(str(harness.operator), claimed=absent.bytes, reason="typo"))
    assert error.code is grpc.StatusCode.NOT_FOUND
    records = await harness.audit(str(UUID(int=0)), "OPERATOR_ACCESS")
    assert f"tenant:{absent}" in {record["target"] for record in records}


async def test_a_wrong_operator_key_is_on_record(harness: Harness) -> None:
    """A well-formed operator's key that nobody has is recorded with its address, and not by its id: made-up ids are without end."""
    address = "198.51.100.23"
    for _ in range(3):
        await refusal(harness.authenticate(str(new_operator_key()), reason="guess", peer_address=address))
    records = await harness.audit(str(UUID(int=0)), "CREDENTIAL_REFUSED")
    [record] = [record for record in records if record["peer_address"] == address]
    assert (record["subject"], record["occurrence_count"]) == ("operator:unknown", 3)


async def test_the_use_of_a_front_ends_key_is_on_record(harness: Harness) -> None:
    """A key that only resolves names is recorded when it is used, counted by the minute; so is the tenant it must not name."""
    created = await harness.create()
    for _ in range(2):
        await harness.authenticate(str(harness.front), peer_address="198.51.100.24")
    records = await harness.audit(str(UUID(int=0)), "FRONT_KEY_USED")
    [record] = [record for record in records if record["peer_address"] == "198.51.100.24"]
    assert (record["subject"], record["occurrence_count"]) == (f"front:{harness.front.key_id}", 2)
    claimed = UUID(created.tenant.tenant_id)
    error = await refusal(harness.authenticate(str(harness.front), claimed=claimed.bytes, peer_address="198.51.100.25"))
    assert error.reason == error_reason_pb2.ERROR_REASON_TENANT_MISMATCH
    records = await harness.audit(str(UUID(int=0)), "TENANT_MISMATCH")
    [record] = [record for record in records if record["peer_address"] == "198.51.100.25"]
    assert (record["subject"], record["target"]) == (f"front:{harness.front.key_id}", f"tenant:{claimed}")


async def test_only_services_may_ask_who_a_credential_is(harness: Harness) -> None:
    """A tenant's own key cannot be used to test other credentials."""
    created = await harness.create()
    request = authentication_service_pb2.AuthenticateRequest(credential=created.api_key)
    error = await refusal(call(harness.authentication.Authenticate, request, with_key(created.api_key)))
    assert error.reason == error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED


async def test_the_services_own_entrances_use_the_same_answers(harness: Harness) -> None:
    """A wrong key at the tenant service's own door is refused exactly as through Authenticate."""
    wrong = str(new_api_key("free"))
    asked = await refusal(harness.authenticate(wrong))
    entered = await refusal(call(harness.tenants.GetTenant, tenant_service_pb2.GetTenantRequest(), with_key(wrong)))
    assert facts(asked) == facts(entered)


async def test_a_malformed_question_is_refused_by_its_contract(harness: Harness) -> None:
    """An empty credential and a tenant id of 3 bytes are invalid requests."""
    for request in (
        authentication_service_pb2.AuthenticateRequest(credential=""),
        authentication_service_pb2.AuthenticateRequest(credential="x" * 4097),
        authentication_service_pb2.AuthenticateRequest(credential="x", claimed_tenant_id=b"abc"),
        authentication_service_pb2.AuthenticateRequest(credential=str(harness.operator), operator_reason="a\x00b"),
        authentication_service_pb2.AuthenticateRequest(credential="x", peer_address="a\x00b"),
    ):
        error = await refusal(call(harness.authentication.Authenticate, request, as_service("inference")))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_first_use_is_durable_before_the_answer_and_later_ones_once_a_minute(harness: Harness) -> None:
    """Last use appears with the first answer; a second use in the same minute writes nothing, one a minute later does."""
    created = await harness.create()
    key_id = taken_apart(created.api_key).key_id
    read = "SELECT last_use_time FROM tenant.api_keys WHERE key_id = $1"
    assert await harness.value(read, key_id) is None
    await harness.authenticate(created.api_key)
    first = await harness.value(read, key_id)
    assert first is not None
    await harness.authenticate(created.api_key)
    await harness.app.trail.flush()
    assert await harness.value(read, key_id) == first
    other = await make_key(harness, created.api_key)
    other_id = taken_apart(other).key_id
    await harness.authenticate(other)
    await harness.execute("UPDATE tenant.api_keys SET last_use_time = now() - interval '2 minutes' WHERE key_id = $1", other_id)
    await harness.authenticate(other)
    await harness.app.trail.flush()
    assert datetime.now(UTC) - await harness.value(read, other_id) < timedelta(seconds=30)


async def make_key(harness: Harness, admin_key: str, *, expire_time: datetime | None = None) -> str:
    """Makes a second key of the tenant and returns its text."""
    request = api_key_service_pb2.CreateApiKeyRequest(display_name="second", scopes=["tenant:read"])
    if expire_time is not None:
        request.expire_time.FromDatetime(expire_time)
    return (await call(harness.keys.CreateApiKey, request, with_key(admin_key))).api_key
