"""Who saw what: what a call read is on record before it is shown, and delivered to the audit log whatever happens in between."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import grpc
import pytest

from mesh.common.v1 import error_reason_pb2
from mesh.inference.v1 import inference_service_pb2 as pb
from mesh.retrieval.v1 import search_service_pb2 as search_pb
from mesh.tenant.v1 import audit_service_pb2 as audit_pb
from services.kernel.errors import Forbidden, InvalidRequest, MeshError, Unavailable
from tests.inference.conftest import World
from tests.inference.peers import Tenant, chunk
from tests.support.stores import PostgresStore

REQUIRED = pb.RetrievalOptions(mode=pb.RETRIEVAL_MODE_REQUIRED)
DELIVERED_WITHIN_SECONDS = 60.0


def items(world: World, tenant: Tenant, action: str) -> list[audit_pb.AuditItem]:
    """What the audit log was told of a tenant."""
    told = [item for request in world.script.all("audit") for item in request.items]
    return [item for item in told if item.tenant_id == tenant.tenant_id.bytes and item.action == action]


async def delivered(world: World, tenant: Tenant, action: str, count: int = 1) -> list[audit_pb.AuditItem]:
    """Returns once the audit log has heard so many of the action."""
    async with asyncio.timeout(DELIVERED_WITHIN_SECONDS), world.script.changed:
        await world.script.changed.wait_for(lambda: len(items(world, tenant, action)) >= count)
    return items(world, tenant, action)


@asynccontextmanager
async def as_jobs(inference_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection as the relay's role."""
    connection = await asyncpg.connect(inference_dsn.replace("inference_service:", "inference_jobs:"))
    try:
        yield connection
    finally:
        await connection.close()


async def waiting(inference_dsn: str, tenant: Tenant) -> list[asyncpg.Record]:
    """What waits in the outbox."""
    async with as_jobs(inference_dsn) as connection:
        sql = "SELECT * FROM inference.audit_outbox WHERE tenant_id = $1 ORDER BY audit_id"
        return list(await connection.fetch(sql, tenant.tenant_id))


async def is_empty(inference_dsn: str, tenant: Tenant) -> None:
    """Returns once nothing of the tenant waits any more."""
    async with asyncio.timeout(DELIVERED_WITHIN_SECONDS):
        while await waiting(inference_dsn, tenant):  # noqa: ASYNC110 - a row in a store: no event tells when it goes
            await asyncio.sleep(0.05)


async def test_documents_are_on_record_before_anything_is_shown(world: World, tenant: Tenant, inference_dsn: str) -> None:
    """When the provider is asked, the call's documents, user, address and prompt version stand in the outbox already."""
    found, seen, call_id = chunk(), list[asyncpg.Record](), str(uuid4())
    world.script.hooks["search"] = lambda _: search_pb.SearchResponse(chunks=[found, found])
    world.script.hooks["audit"] = _away

    async def look() -> None:
        await world.script.wait_for("dispatch")
        seen.extend(await waiting(inference_dsn, tenant))

    async with asyncio.TaskGroup() as both:
        both.create_task(look())
        both.create_task(
            world.generate(tenant, "[[stub: output_tokens=5 token_ms=100]] What?", call_id=call_id, retrieval=REQUIRED, user="carol")
        )
    [row] = [row for row in seen if row["action"] == "DOCUMENTS_READ"]
    assert row["document_ids"] == [UUID(found.document_id)]
    assert (str(row["call_id"]), row["user_name"], row["peer_address"]) == (call_id, "carol", "127.0.0.1")
    assert json.loads(row["detail"])["prompt_version"] == "default@1"
    world.script.hooks.clear()
    await is_empty(inference_dsn, tenant)


async def test_a_calls_end_reaches_the_log(world: World, tenant: Tenant, inference_dsn: str) -> None:
    """The outcome, model, tokens and cost of a call follow, and the outbox is empty once the log has them."""
    answer = await world.generate(tenant)
    [ended] = await delivered(world, tenant, "CALL_ENDED")
    detail = json.loads(ended.detail_json)
    assert (detail["outcome"], detail["model"], detail["cost_nano_usd"]) == ("settled", answer.summary.model, answer.summary.cost.nano_usd)
    assert detail["output_tokens"] == answer.summary.usage.output_tokens
    assert UUID(bytes=ended.call_id) == UUID(answer.summary.call_id)
    assert items(world, tenant, "DOCUMENTS_READ") == []
    await is_empty(inference_dsn, tenant)


async def test_an_end_without_a_bill_is_recorded_with_its_cause(world: World, tenant: Tenant) -> None:
    """A call that failed is void or unresolved in the log, and says why."""
    await world.refusal(tenant, "[[stub: error=529]] What?")
    [ended] = await delivered(world, tenant, "CALL_ENDED")
    detail = json.loads(ended.detail_json)
    assert detail["outcome"] in {"void", "unresolved"}
    assert detail["cause"]


async def test_records_hold_no_texts(world: World, tenant: Tenant) -> None:
    """Neither question, answer, title nor document stands in a record."""
    found = chunk(text="The secret plan.", title="Secret title")
    world.script.hooks["search"] = lambda _: search_pb.SearchResponse(chunks=[found])
    answer = await world.generate(tenant, "A secret question?", retrieval=REQUIRED)
    told = [*await delivered(world, tenant, "DOCUMENTS_READ"), *await delivered(world, tenant, "CALL_ENDED")]
    written = b"".join(item.SerializeToString() for item in told)
    for text in ("secret", "Secret", answer.text):
        assert text.encode() not in written


async def test_a_log_that_is_away_delays_records_and_fails_no_call(world: World, tenant: Tenant, inference_dsn: str) -> None:
    """While the tenant service does not record, calls are answered; when it is back, every record arrives once it was acknowledged."""
    world.script.hooks["audit"] = _away
    for _ in range(3):
        await world.generate(tenant, retrieval=REQUIRED)
    await world.script.wait_for("audit")
    assert await waiting(inference_dsn, tenant)
    world.script.heard.clear()
    world.script.hooks.clear()
    told = [*await delivered(world, tenant, "DOCUMENTS_READ", 3), *await delivered(world, tenant, "CALL_ENDED", 3)]
    assert len({item.audit_id for item in told}) == 6
    await is_empty(inference_dsn, tenant)


async def test_an_unproven_record_is_kept(world: World, tenant: Tenant, inference_dsn: str) -> None:
    """A record whose token the log does not believe stays in the outbox, put off, and does not hold up the others."""
    world.script.hooks["audit"] = lambda request: audit_pb.RecordAuditResponse(
        outcomes=[audit_pb.AUDIT_OUTCOME_TENANT_NOT_PROVEN for _ in request.items]
    )
    await world.generate(tenant)
    await delivered(world, tenant, "CALL_ENDED")
    async with asyncio.timeout(DELIVERED_WITHIN_SECONDS):
        while not any(row["send_count"] for row in await waiting(inference_dsn, tenant)):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.05)
    world.script.hooks.clear()
    world.script.heard.clear()
    await is_empty(inference_dsn, tenant)
    assert len(items(world, tenant, "CALL_ENDED")) >= 1


async def test_documents_that_cannot_be_recorded_are_not_shown(world: World, tenant: Tenant, inference_dsn: str) -> None:
    """A call with documents is UNAVAILABLE while its record cannot be written, before provider or caller see them; others go on."""
    async with as_jobs(inference_dsn) as connection, connection.transaction():
        # Nobody can write to the table while this transaction lasts; the rest of the database goes on.
        await connection.execute("LOCK TABLE inference.audit_outbox IN EXCLUSIVE MODE")
        refused = await world.refusal(tenant, retrieval=REQUIRED, timeout=30.0)
        assert (refused.code, refused.metadata["dependency"]) == (grpc.StatusCode.UNAVAILABLE, "postgres")
        assert "dispatch" not in world.script.names()
        assert (await world.generate(tenant)).text
    ended = await delivered(world, tenant, "CALL_ENDED", 2)
    assert {json.loads(item.detail_json)["outcome"] for item in ended} == {"void", "settled"}


async def aside(inference_dsn: str, tenant: Tenant) -> list[asyncpg.Record]:
    """What of the tenant is set aside."""
    async with as_jobs(inference_dsn) as connection:
        return list(await connection.fetch("SELECT * FROM inference.audit_set_aside WHERE tenant_id = $1", tenant.tenant_id))


def refusing(user: str, error: Callable[[int], MeshError]) -> Callable[[Any], Any]:
    """A log that refuses any batch with an item of that end user, as `error` says for its place."""

    def answer(request: Any) -> Any:
        for index, item in enumerate(request.items):
            if item.user == user:
                raise error(index)
        return audit_pb.RecordAuditResponse(outcomes=[audit_pb.AUDIT_OUTCOME_RECORDED for _ in request.items])

    return answer


async def test_an_entry_the_log_refuses_holds_up_nobody(world: World, tenant: Tenant, inference_dsn: str) -> None:
    """An entry that the log refuses for what it says is set aside whole, with the refusal; every other one is delivered."""
    world.script.hooks["audit"] = refusing("refused", lambda index: InvalidRequest(f"items[{index}].occur_time", "is older than 7 days"))
    for user in ("carol", "refused", "dave", "refused", "erin"):
        await world.generate(tenant, user=user)
    await is_empty(inference_dsn, tenant)
    assert {item.user for item in items(world, tenant, "CALL_ENDED")} >= {"carol", "dave", "erin"}
    kept = await aside(inference_dsn, tenant)
    assert len(kept) == 2
    entry = json.loads(kept[0]["entry"])
    assert (entry["user"], entry["action"], json.loads(entry["detail"])["outcome"]) == ("refused", "CALL_ENDED", "settled")
    assert "older than 7 days" in kept[0]["cause"]
    world.script.hooks.clear()


async def test_an_entry_the_log_fails_at_is_put_off_alone(world: World, tenant: Tenant, inference_dsn: str) -> None:
    """An entry at which the log fails, whatever comes with it, stays in the outbox for later; every other one is delivered."""
    internal = MeshError(grpc.StatusCode.INTERNAL, error_reason_pb2.ERROR_REASON_INTERNAL, "failed")
    world.script.hooks["audit"] = refusing("unlucky", lambda _: internal)
    for user in ("carol", "unlucky", "dave"):
        await world.generate(tenant, user=user)
    async with asyncio.timeout(DELIVERED_WITHIN_SECONDS):
        while [row["user_name"] for row in await waiting(inference_dsn, tenant) if row["send_count"]] != ["unlucky"]:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.05)
    assert await aside(inference_dsn, tenant) == []
    world.script.hooks.clear()
    await is_empty(inference_dsn, tenant)


async def test_a_log_that_refuses_the_service_sets_nothing_aside(world: World, tenant: Tenant, inference_dsn: str) -> None:
    """A refusal that is not about an item says nothing of the entries: they wait."""
    refusal = Forbidden(error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED, "not for inference", caller="inference", method="/x")

    def refused(_: Any) -> Any:
        raise refusal

    world.script.hooks["audit"] = refused
    await world.generate(tenant)
    await world.script.wait_for("audit")
    world.script.hooks.clear()
    await delivered(world, tenant, "CALL_ENDED")
    await is_empty(inference_dsn, tenant)
    assert await aside(inference_dsn, tenant) == []


async def test_an_entry_the_outbox_refuses_holds_up_nobody(
    world: World, tenant: Tenant, inference_dsn: str, postgres: PostgresStore
) -> None:
    """The end of a call that the own database refuses to note for what it says is set aside; the ends behind it are noted."""
    admin = await asyncpg.connect(postgres.server.dsn(urlsplit(inference_dsn).path.lstrip("/")))
    rule = "ALTER TABLE inference.audit_outbox {} CONSTRAINT takes_no_mallory {}"
    try:
        await admin.execute(rule.format("ADD", "CHECK (user_name <> 'mallory')"))
        async with asyncio.TaskGroup() as calls:
            for user in ("carol", "mallory", "dave", "mallory"):
                calls.create_task(world.generate(tenant, user=user))
        await world.generate(tenant, user="erin")
        assert {item.user for item in await delivered(world, tenant, "CALL_ENDED", 3)} == {"carol", "dave", "erin"}
        kept = await aside(inference_dsn, tenant)
        assert [json.loads(row["entry"])["user"] for row in kept] == ["mallory", "mallory"]
        assert {row["cause"] for row in kept} == {"CheckViolationError: takes_no_mallory"}
    finally:
        await admin.execute(rule.format("DROP", ""))
        await admin.close()


async def test_a_read_the_outbox_refuses_fails_alone(world: World, tenant: Tenant, inference_dsn: str, postgres: PostgresStore) -> None:
    """A call whose read cannot be noted shows nothing; the calls whose reads are noted with it go on."""
    admin = await asyncpg.connect(postgres.server.dsn(urlsplit(inference_dsn).path.lstrip("/")))
    rule = "ALTER TABLE inference.audit_outbox {} CONSTRAINT takes_no_mallory {}"
    world.script.hooks["search"] = lambda _: search_pb.SearchResponse(chunks=[chunk()])
    try:
        await admin.execute(rule.format("ADD", "CHECK (user_name <> 'mallory' OR action <> 'DOCUMENTS_READ')"))
        async with asyncio.TaskGroup() as calls:
            answered = [calls.create_task(world.generate(tenant, retrieval=REQUIRED, user=user)) for user in ("carol", "dave")]
            refused = calls.create_task(world.refusal(tenant, retrieval=REQUIRED, user="mallory"))
        assert all(task.result().text for task in answered)
        assert refused.result().code == grpc.StatusCode.INTERNAL
    finally:
        await admin.execute(rule.format("DROP", ""))
        await admin.close()


async def test_what_is_set_aside_is_not_altered_by_the_service(inference_dsn: str) -> None:
    """Neither role changes or removes what is kept apart."""
    async with as_jobs(inference_dsn) as connection:
        for sql in ("UPDATE inference.audit_set_aside SET cause = ''", "DELETE FROM inference.audit_set_aside"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(sql)


def _away(_: Any) -> Any:
    raise Unavailable("postgres")


async def test_the_relays_role_makes_and_alters_no_record(inference_dsn: str) -> None:
    """The jobs role takes rows away and puts them off; it can neither write a record nor change what one says."""
    async with as_jobs(inference_dsn) as connection:
        for sql in (
            "INSERT INTO inference.audit_outbox (tenant_id) VALUES (uuidv7())",
            "UPDATE inference.audit_outbox SET user_name = 'nobody'",
            "SELECT * FROM inference.turns",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(sql)
