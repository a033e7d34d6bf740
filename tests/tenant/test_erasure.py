"""The end of a tenant over all services: keys dead first, everything removed, the receipt signed, and what is left found."""

import asyncio
import base64
import io
import json
import tarfile
from hashlib import sha256
from pathlib import Path
from uuid import UUID, uuid4

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf import json_format

from mesh.common.v1 import error_reason_pb2, lifecycle_service_pb2
from mesh.tenant.v1 import authentication_service_pb2, tenant_service_pb2
from services.tenant.context_minting import read_signing_key
from services.tenant.receipt import DOMAIN, ErasureReceipt, ReceiptRefused, check_file, read_receipt, verify_receipt, what_is_left
from tests.support.waiting import eventually
from tests.tenant.harness import PEERS, Harness, as_service, call, refusal, wish, with_key


def erasing(created: tenant_service_pb2.CreateTenantResponse, **changes: object) -> tenant_service_pb2.EraseTenantRequest:
    """A request to erase the tenant."""
    fields: dict[str, object] = {
        "request_id": str(uuid4()),
        "tenant_id": created.tenant.tenant_id,
        "confirm_slug": created.tenant.slug,
        "canaries": ["nobody else says this"],
    }
    return tenant_service_pb2.EraseTenantRequest(**(fields | changes))  # type: ignore[arg-type] # fields of several types


async def public_key(harness: Harness, key_id: str) -> Ed25519PublicKey:
    """The published key of that name."""
    keys = await call(harness.authentication.GetContextKeys, authentication_service_pb2.GetContextKeysRequest(), as_service("inference"))
    return next(Ed25519PublicKey.from_public_bytes(key.public_key) for key in keys.keys if key.key_id == key_id)


async def test_an_erased_tenant_is_gone_everywhere_and_its_receipt_holds(harness: Harness) -> None:
    """The key is dead, the rows are gone in every service, the slug is free, and the receipt names what was found and removed."""
    created, bystander = await harness.create(), await harness.create()
    answer = await call(harness.tenants.EraseTenant, erasing(created), harness.as_operator())
    receipt = ErasureReceipt(answer.receipt.body_json, answer.receipt.signature, answer.receipt.key_id)
    statement = verify_receipt(receipt, await public_key(harness, receipt.key_id))
    assert answer.receipt.verified
    assert statement["tenant_id"] == created.tenant.tenant_id
    text = json.dumps(statement)
    assert created.tenant.slug not in text
    assert "@example.com" not in text
    assert sha256(b"nobody else says this").hexdigest() in text
    removed = {(item["service"], item["store"]): item["count"] for item in json.loads(receipt.body)["removed"]}
    assert all(removed[(name, "scripted:tenants")] == 1 for name in PEERS)
    assert removed[("own_records", "postgres:tenant.tenants")] == 1
    assert (await refusal(harness.authenticate(created.api_key))).reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID
    [audit] = await harness.audit(created.tenant.tenant_id, "TENANT_ERASED")
    assert audit["reason"] == "customer call 4711"
    await harness.authenticate(bystander.api_key)
    await harness.create(slug=created.tenant.slug)


async def test_the_keys_are_dead_before_anything_is_removed(harness: Harness) -> None:
    """While the first service is still erasing, the tenant is ERASING, its key is refused, and a repeat waits for the same erasure."""
    created = await harness.create()
    harness.peers["inference"].erase_failures = [grpc.StatusCode.UNAVAILABLE] * 3
    request = erasing(created)
    error = await refusal(call(harness.tenants.EraseTenant, request, harness.as_operator()))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert (await refusal(harness.authenticate(created.api_key))).reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID
    live = "SELECT count(*) FROM tenant.api_keys WHERE tenant_id = $1 AND revoke_time IS NULL"
    assert await harness.value(live, UUID(created.tenant.tenant_id)) == 0
    other = await refusal(call(harness.tenants.EraseTenant, erasing(created), harness.as_operator()))
    assert other.reason == error_reason_pb2.ERROR_REASON_CONTENT_CONFLICT
    first = await call(harness.tenants.EraseTenant, request, harness.as_operator())
    again = await call(harness.tenants.EraseTenant, request, harness.as_operator())
    assert first == again


async def test_an_erasure_needs_the_slug_and_a_tenant(harness: Harness) -> None:
    """Another slug, an unknown tenant and one that is still being made are refused, and nothing is written."""
    created = await harness.create()
    error = await refusal(call(harness.tenants.EraseTenant, erasing(created, confirm_slug="other"), harness.as_operator()))
    assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "confirm_slug")
    error = await refusal(call(harness.tenants.EraseTenant, erasing(created, tenant_id=str(uuid4())), harness.as_operator()))
    assert error.code is grpc.StatusCode.NOT_FOUND
    harness.peers["metering"].failures = [grpc.StatusCode.UNAVAILABLE] * 30
    request = wish()
    await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
    unfinished = await harness.value("SELECT tenant_id FROM tenant.tenants WHERE slug = $1", request.slug)
    error = await refusal(
        call(harness.tenants.EraseTenant, erasing(created, tenant_id=str(unfinished), confirm_slug=request.slug), harness.as_operator())
    )
    assert (error.code, error.metadata["state"]) == (grpc.StatusCode.FAILED_PRECONDITION, "PROVISIONING")
    assert await harness.value("SELECT state FROM tenant.tenants WHERE tenant_id = $1", UUID(created.tenant.tenant_id)) == "ACTIVE"
    harness.peers["metering"].failures.clear()


async def test_a_tampered_receipt_is_refused(harness: Harness, tmp_path: Path) -> None:
    """One letter changed, another key, a signature without the receipt's own prefix, or no receipt at all: the command says so."""
    answer = await call(harness.tenants.EraseTenant, erasing(await harness.create()), harness.as_operator())
    key = await public_key(harness, answer.receipt.key_id)
    receipt, file = read_receipt(json_format.MessageToJson(answer)), tmp_path / "receipt.json"
    assert verify_receipt(receipt, key)["tenant_id"]
    altered = ErasureReceipt(receipt.body.replace('"count":1', '"count":2', 1), receipt.signature, receipt.key_id)
    with pytest.raises(ReceiptRefused):
        verify_receipt(altered, key)
    with pytest.raises(ReceiptRefused):
        verify_receipt(receipt, Ed25519PrivateKey.generate().public_key())
    signing = read_signing_key(harness.settings.context_signing_key.get_secret_value()).private_key
    with pytest.raises(ReceiptRefused):
        verify_receipt(ErasureReceipt(receipt.body, signing.sign(receipt.body.encode()), receipt.key_id), key)
    assert DOMAIN.endswith(b"\n")
    encoded = base64.b64encode(key.public_bytes_raw()).decode()
    for text, code in ((json_format.MessageToJson(answer), 0), (json_format.MessageToJson(answer).replace("found", "Found"), 1), ("{}", 1)):
        file.write_text(text)
        assert check_file([str(file), encoded]) == code
    assert check_file([]) == 2


async def test_a_genuine_receipt_of_an_unfinished_erasure_does_not_pass(
    harness: Harness, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the signed statement says that something is left, the command exits 1 and says what is where, whatever stands beside it."""
    harness.peers["retrieval"].left_over = ["a note that nobody else says this"]
    answer = await call(harness.tenants.EraseTenant, erasing(await harness.create()), harness.as_operator())
    harness.peers["retrieval"].left_over = []
    assert not answer.receipt.verified
    key = await public_key(harness, answer.receipt.key_id)
    encoded = base64.b64encode(key.public_bytes_raw()).decode()
    for claimed in (False, True):
        answer.receipt.verified = claimed
        (tmp_path / "receipt.json").write_text(json_format.MessageToJson(answer))
        capsys.readouterr()
        assert check_file([str(tmp_path / "receipt.json"), encoded]) == 1
        said = capsys.readouterr().out
        assert "the receipt is genuine and says that not everything is gone" in said
        assert said.strip().endswith("left: 1 record with a canary in scripted:tenants")
        assert "the receipt holds" not in said


def test_what_a_receipt_says_is_left_is_read_from_its_signed_body() -> None:
    """Records that are kept on purpose are not left; others are named with their store; a body that looked for nothing is refused."""

    def receipt(*stores: dict[str, object], verified: bool) -> ErasureReceipt:
        return ErasureReceipt(json.dumps({"verification": {"verified": verified, "stores": stores}}), b"", "k")

    clean = {"store": "postgres:a.b", "found": 0, "canaries": 0, "kept": False, "sight": "all"}
    kept, left = {**clean, "found": 4, "kept": True}, {**clean, "found": 2, "store": "postgres:c.d"}
    assert what_is_left(receipt(clean, kept, verified=True)) == []
    assert what_is_left(receipt(clean, left, kept, verified=False)) == ["2 records in postgres:c.d"]
    assert what_is_left(receipt(left, verified=True)) == ["2 records in postgres:c.d"]
    assert what_is_left(receipt(clean, verified=False)) == ["something that the statement does not name"]
    for body in ("{}", "[]", '{"verification":{"verified":true}}', '{"verification":{"verified":true,"stores":[{"found":1}]}}'):
        with pytest.raises(ReceiptRefused):
            what_is_left(ErasureReceipt(body, b"", "k"))


async def test_a_planted_leftover_is_found(harness: Harness) -> None:
    """A row that comes back, or another's record with a canary, turns the verification to false and is named by its store."""
    created = await harness.create()
    tenant_id = UUID(created.tenant.tenant_id)
    await call(harness.tenants.EraseTenant, erasing(created), harness.as_operator())
    verify = tenant_service_pb2.VerifyErasureRequest(tenant_id=created.tenant.tenant_id, canaries=["the heron lands"])
    clean = await call(harness.tenants.VerifyErasure, verify, harness.as_operator())
    assert clean.verified
    assert {store.store for store in clean.stores} >= {"scripted:tenants", "postgres:tenant.users", "postgres:tenant.audit"}
    await harness.execute("INSERT INTO tenant.api_key_directory VALUES ($1, $2)", f"left{uuid4().hex}", tenant_id)
    left = await call(harness.tenants.VerifyErasure, verify, harness.as_operator())
    assert not left.verified
    assert [store.store for store in left.stores if store.found_count and not store.kept] == ["postgres:tenant.api_key_directory"]
    await harness.execute("DELETE FROM tenant.api_key_directory WHERE tenant_id = $1", tenant_id)
    for kind, catalog in (("SCHEMA", "pg_namespace"), ("DATABASE", "pg_database")):
        await harness.execute(f"CREATE {kind} t_{tenant_id.hex}")
        left = await call(harness.tenants.VerifyErasure, verify, harness.as_operator())
        await harness.execute(f"DROP {kind} t_{tenant_id.hex}")
        assert not left.verified
        assert [store.store for store in left.stores if store.found_count and not store.kept] == [f"postgres:{catalog}"]
    harness.peers["retrieval"].left_over = ["and the heron lands here"]
    assert not (await call(harness.tenants.VerifyErasure, verify, harness.as_operator())).verified
    harness.peers["retrieval"].left_over = []
    await harness.execute("INSERT INTO tenant.audit (tenant_id, action, subject) VALUES ($1, 'NOTE', 'the heron lands')", tenant_id)
    found = await call(harness.tenants.VerifyErasure, verify, harness.as_operator())
    assert [store.store for store in found.stores if store.canary_count] == ["postgres:tenant.audit"]
    never = tenant_service_pb2.VerifyErasureRequest(tenant_id=str(uuid4()))
    assert (await refusal(call(harness.tenants.VerifyErasure, never, harness.as_operator()))).code is grpc.StatusCode.NOT_FOUND


async def test_a_suspended_tenant_is_refused_until_it_is_resumed(harness: Harness) -> None:
    """Suspending and resuming are audited with their reason, announced, told once each, and change nothing when repeated."""
    created = await harness.create()
    tenant_id, operator = created.tenant.tenant_id, harness.as_operator()
    changes = "SELECT count(*) FROM tenant.changes WHERE tenant_id = $1 AND kind = 'STATE'"
    before = await harness.value(changes, UUID(tenant_id))
    for _ in range(2):
        answer = await call(harness.tenants.SuspendTenant, tenant_service_pb2.SuspendTenantRequest(tenant_id=tenant_id), operator)
        assert answer.tenant.state == tenant_service_pb2.TENANT_STATE_SUSPENDED
    assert (await refusal(harness.authenticate(created.api_key))).reason == error_reason_pb2.ERROR_REASON_TENANT_SUSPENDED
    for _ in range(2):
        answer = await call(harness.tenants.ResumeTenant, tenant_service_pb2.ResumeTenantRequest(tenant_id=tenant_id), operator)
        assert answer.tenant.state == tenant_service_pb2.TENANT_STATE_ACTIVE
    await harness.authenticate(created.api_key)
    assert await harness.value(changes, UUID(tenant_id)) == before + 2
    for action in ("TENANT_SUSPENDED", "TENANT_RESUMED"):
        [record] = await harness.audit(tenant_id, action)
        assert record["reason"] == "customer call 4711"
    unknown = tenant_service_pb2.SuspendTenantRequest(tenant_id=str(uuid4()))
    assert (await refusal(call(harness.tenants.SuspendTenant, unknown, operator))).code is grpc.StatusCode.NOT_FOUND
    error = await refusal(call(harness.tenants.SuspendTenant, unknown, with_key(created.api_key)))
    assert error.code is grpc.StatusCode.PERMISSION_DENIED


async def test_the_archive_holds_everything_with_its_sums_and_no_secret(harness: Harness) -> None:
    """Every record of every service stands in the tar, the manifest's counts and SHA-256 hold, and chunks are at most 64 KB."""
    created = await harness.create()
    big = json.dumps({"text": "x" * 100_000}).encode()
    for name in PEERS:
        record = lifecycle_service_pb2.ExportTenantResponse(kind=f"scripted:{name}.things", record_json=big)
        harness.peers[name].exported = [record] * 7
    chunks = [
        message.chunk
        async for message in harness.tenants.ExportTenantArchive(
            tenant_service_pb2.ExportTenantArchiveRequest(), metadata=with_key(created.api_key), timeout=30
        )
    ]
    assert max(map(len, chunks)) <= 65_536
    content = {}
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member)
            assert file is not None
            content[member.name] = file.read()
    manifest = json.loads(content.pop("manifest.json"))
    listed = {file["path"]: file["sha256"] for kind in manifest["kinds"].values() for file in kind["files"]}
    assert listed == {name: sha256(data).hexdigest() for name, data in content.items()}
    assert {name: manifest["kinds"][f"scripted:{name}.things"]["record_count"] for name in PEERS} == dict.fromkeys(PEERS, 7)
    assert manifest["kinds"]["postgres:tenant.users"]["record_count"] == 1
    whole = b"".join(content.values())
    assert created.api_key.rpartition("_")[2].encode() not in whole
    assert sum(line.count(b"\n") for line in content.values()) == sum(kind["record_count"] for kind in manifest["kinds"].values())


async def test_a_creation_that_fails_for_good_is_undone(harness: Harness) -> None:
    """What was made is unmade in reverse, the slug is free, the request id stays spent, and the cause is kept without the wish."""
    request = wish()
    harness.peers["ratelimit"].failures = [grpc.StatusCode.FAILED_PRECONDITION]
    error = await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
    assert (error.code, error.metadata["state"]) == (grpc.StatusCode.FAILED_PRECONDITION, "FAILED")
    tenant_id = await harness.value("SELECT tenant_id FROM tenant.request_directory WHERE request_id = $1", UUID(request.request_id))
    assert await harness.value("SELECT state FROM tenant.tenants WHERE tenant_id = $1", tenant_id) == "FAILED"
    for table in ("users", "api_keys", "api_key_directory", "tenant_settings", "slug_directory", "events"):
        assert await harness.value(f"SELECT count(*) FROM tenant.{table} WHERE tenant_id = $1", tenant_id) == 0, table
    assert {name for name, peer in harness.peers.items() if tenant_id in peer.erased} == {"retrieval", "inference", "ratelimit"}
    assert await harness.value("SELECT content::text FROM tenant.sagas WHERE tenant_id = $1", tenant_id) == "{}"
    watched = await watch(harness, request.request_id)
    assert watched[-1].state == tenant_service_pb2.SAGA_STATE_FAILED
    assert watched[-1].cause.endswith("ratelimit")
    again = await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
    assert again.metadata["state"] == "FAILED"
    await call(harness.tenants.CreateTenant, wish(slug=request.slug), harness.as_operator())


async def test_an_undoing_that_is_stopped_goes_on_by_itself(harness: Harness) -> None:
    """A service that is away while a creation is undone leaves it COMPENSATING; the runner ends it once the service is back."""
    request = wish()
    harness.peers["ratelimit"].failures = [grpc.StatusCode.INVALID_ARGUMENT]
    harness.peers["retrieval"].erase_failures = [grpc.StatusCode.UNAVAILABLE] * 3
    await refusal(call(harness.tenants.CreateTenant, request, harness.as_operator()))
    watched = await watch(harness, request.request_id)
    assert watched[-1].state == tenant_service_pb2.SAGA_STATE_FAILED
    assert all(step.state != tenant_service_pb2.SAGA_STEP_STATE_DONE for step in watched[-1].steps)


async def test_several_watchers_see_every_step_to_the_end(harness: Harness) -> None:
    """Watchers that join at different times see the steps come and all end with the creation; an unknown request is NOT_FOUND."""
    request, peer = wish(), harness.peers["inference"]
    peer.gate = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        creating = group.create_task(call(harness.tenants.CreateTenant, request, harness.as_operator(), timeout_seconds=30))
        await peer.entered.wait()
        watched: list[list[tenant_service_pb2.WatchProvisioningResponse]] = [[], [], []]
        for seen in watched:
            group.create_task(watch(harness, request.request_id, seen))

        async def all_watch() -> bool:
            return all(watched)

        await eventually(all_watch, within_seconds=20)
        peer.gate.set()
    peer.gate = None
    for seen in watched:
        assert {step.name: step.state for step in seen[0].steps}["INFERENCE"] == tenant_service_pb2.SAGA_STEP_STATE_BEGUN
        assert seen[-1].state == tenant_service_pb2.SAGA_STATE_DONE
        assert {step.state for step in seen[-1].steps} == {tenant_service_pb2.SAGA_STEP_STATE_DONE}
        assert all(step.HasField("begin_time") and step.HasField("end_time") for step in seen[-1].steps)
        assert seen[-1].tenant_id == creating.result().tenant.tenant_id
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await watch(harness, str(uuid4()))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def watch(
    harness: Harness, request_id: str, seen: list[tenant_service_pb2.WatchProvisioningResponse] | None = None
) -> list[tenant_service_pb2.WatchProvisioningResponse]:
    """Watches a creation to its end, keeping what it sees as it comes."""
    kept = [] if seen is None else seen
    request = tenant_service_pb2.WatchProvisioningRequest(request_id=request_id)
    async for message in harness.tenants.WatchProvisioning(request, metadata=tuple(harness.as_operator()), timeout=30):
        kept.append(message)
    return kept
