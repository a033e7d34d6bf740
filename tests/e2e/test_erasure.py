"""A tenant's whole life in the running mesh: made, used, erased in pool, bridge and silo, with what is left looked for in every store."""

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import pytest
import redis.asyncio
from google.protobuf import json_format
from qdrant_client import grpc as qdrant

from devstack.environment import DATABASE, KEY_DATABASE, TENANTS_OWN_KEYS, service_environment
from devstack.mesh_client import Metadata, credentials, open_channel, operator_credentials
from devstack.state import DemoTenant
from mesh.inference.v1 import conversation_service_pb2, inference_service_pb2
from mesh.metering.v1 import event_service_pb2, event_service_pb2_grpc, usage_service_pb2
from mesh.retrieval.v1 import document_service_pb2
from mesh.tenant.v1 import secret_service_pb2, secret_service_pb2_grpc, tenant_service_pb2
from services.metering.event_months import months_from
from tests.support.mesh import Mesh

PLACEMENTS = ("pool", "bridge", "silo")
PATIENCE_SECONDS = 60.0
# What an erased tenant leaves on purpose, and of it the id alone: the operator's books, the log, the erasure itself, tombstones.
KEPT = {
    "tenant.audit", "tenant.audit_documents", "tenant.audit_chains", "tenant.request_directory", "tenant.changes", "tenant.sagas",
    "tenant.saga_steps", "tenant.events", "tenant.erasure_receipts",
    "metering.calls", "metering.entries", "metering.unit_entries", "metering.tenant_epochs", "metering.outbox", "metering.erased_tenants",
    "metering.subscriptions", "metering.credits", "metering.invoice_closings", "metering.invoices", "metering.invoice_lines",
    "metering.credit_uses", "metering.credit_notes", "metering.budget_alerts",
    "metering.usage_pending", "metering.usage_rollups", "metering.usage_latencies",
    "metering.reratings", "metering.rerating_ends",
    "metering.stripe_customers", "metering.export_outbox",
    "metering.usage_levels", "metering.refusals", "metering.event_sums", "metering.summed_event_months",
    *(f"metering.events_{month:%Y_%m}" for month in months_from(datetime.now(UTC).date())),
    *(f"metering.event_claims_{number}" for number in range(16)),
    "inference.erased_tenants", "retrieval.erased_tenants",
    "tenant_keys.destroyed_tenants",
}  # fmt: skip
EVERY_TABLE = """
SELECT n.nspname || '.' || c.relname AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND n.nspname NOT IN ('pg_catalog', 'information_schema')
"""
AMOUNTS = "SELECT coalesce(sum(cost_nano_usd), 0)::bigint FROM metering.entries WHERE tenant_id = $1"


@dataclass(frozen=True, slots=True)
class Used:
    """A tenant that was used, and the words that only it knew."""

    tenant: DemoTenant
    fact: str
    cost_nano_usd: int

    @property
    def tenant_id(self) -> uuid.UUID:
        """Its id."""
        return uuid.UUID(self.tenant.tenant_id)

    @property
    def name(self) -> str:
        """What its own schema, database, roles and collection begin with."""
        return f"t_{self.tenant_id.hex}"

    @property
    def canaries(self) -> list[str]:
        """What nothing may say afterwards."""
        return [self.fact, TENANTS_OWN_KEYS[0], self.tenant.api_key.rpartition("_")[2]]


def as_operator(mesh: Mesh) -> Metadata:
    """An operator's credentials."""
    return operator_credentials(mesh.stack.state.secrets.operator_key, "the customer has left")


async def use(mesh: Mesh, isolation: str) -> Used:
    """Makes a tenant with its own provider key, a document, and a conversation of settled calls about it."""
    tenant, fact = await mesh.tenant("enterprise", isolation=isolation), f"heliotrope-{uuid.uuid4().hex[:12]}"
    metadata = credentials(tenant.api_key)
    async with open_channel(mesh.stack.ports.address("tenant"), mesh.stack.client_leaf) as channel:
        wanted = secret_service_pb2.PutProviderKeyRequest(api_key=TENANTS_OWN_KEYS[0])
        await secret_service_pb2_grpc.SecretServiceStub(channel).PutProviderKey(wanted, metadata=metadata, timeout=30)
    document = document_service_pb2.DocumentInput(document_key="vault.md", title=f"On {fact}", text=f"The code of the vault is {fact}.")
    await mesh.client.documents.UpsertDocuments(
        document_service_pb2.UpsertDocumentsRequest(documents=[document]), metadata=metadata, timeout=30
    )
    begun = await mesh.client.conversations.CreateConversation(
        conversation_service_pb2.CreateConversationRequest(user="ada"), metadata=metadata, timeout=30
    )
    options = inference_service_pb2.GenerateOptions(
        feature=fact.replace("-", "_"),
        max_output_tokens=60,
        conversation_id=begun.conversation.conversation_id,
        retrieval=inference_service_pb2.RetrievalOptions(mode=inference_service_pb2.RETRIEVAL_MODE_REQUIRED),
    )
    cost = 0
    for text in (f"What is {fact}?", "And then?"):
        message = inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text=text)
        request = inference_service_pb2.GenerateRequest(messages=[message], options=options)
        cost += (await mesh.client.inference.Generate(request, metadata=metadata, timeout=60)).summary.cost.nano_usd
    report = await mesh.client.usage.GetUsageReport(usage_service_pb2.GetUsageReportRequest(), metadata=metadata, timeout=30)
    assert (report.settled_count, report.total_cost.nano_usd) == (2, cost)
    assert cost > 0
    await record_events(mesh, metadata, fact)
    return Used(tenant, fact, cost)


async def record_events(mesh: Mesh, metadata: Metadata, fact: str) -> None:
    """Records two events that say what only the tenant knows, and takes one of them back."""
    wanted = event_service_pb2.EventType(product="vault", type="door.opened", unit="doors", aggregation=event_service_pb2.AGGREGATION_SUM)
    events = [
        event_service_pb2.Event(
            id=str(number),
            source="/vault",
            product="vault",
            type="door.opened",
            subject=fact,
            feature=fact,
            data=event_service_pb2.EventData(quantity=1, metadata={"code": fact}),
        )
        for number in range(2)
    ]
    for event in events:
        event.time.GetCurrentTime()
    reversals = [event_service_pb2.EventReversal(id="1", source="/vault", reason="a mistake")]
    async with open_channel(mesh.stack.ports.address("metering"), mesh.stack.client_leaf) as channel:
        stub = event_service_pb2_grpc.EventServiceStub(channel)
        known = event_service_pb2.RegisterEventTypeRequest(event_type=wanted)
        await stub.RegisterEventType(known, metadata=as_operator(mesh), timeout=30)
        recorded = await stub.RecordEvents(event_service_pb2.RecordEventsRequest(events=events), metadata=metadata, timeout=30)
        assert [result.outcome for result in recorded.results] == [1, 1]
        await stub.ReverseEvents(event_service_pb2.ReverseEventsRequest(reversals=reversals), metadata=metadata, timeout=30)


def erasing(used: Used) -> tenant_service_pb2.EraseTenantRequest:
    """A request to erase the tenant."""
    return tenant_service_pb2.EraseTenantRequest(
        request_id=str(uuid.uuid4()), tenant_id=used.tenant.tenant_id, confirm_slug=used.tenant.slug, canaries=used.canaries
    )


@pytest.mark.parametrize("isolation", PLACEMENTS)
async def test_an_erased_tenant_leaves_amounts_and_nothing_else(mesh: Mesh, isolation: str, tmp_path: Path) -> None:
    """The receipt counts what was there and its signature holds; afterwards no store holds a word, a name or a place of the tenant."""
    used, bystander = await use(mesh, isolation), await use(mesh, isolation)
    answer = await mesh.client.tenants.EraseTenant(erasing(used), metadata=as_operator(mesh), timeout=120)
    assert answer.receipt.verified, left_over(answer.receipt)
    removed = {item["store"]: item["count"] for item in json.loads(answer.receipt.body_json)["removed"]}
    wanted = {
        "postgres:retrieval.documents": 1, "qdrant:points": 1, "postgres:inference.conversations": 1, "postgres:inference.turns": 4,
        "postgres:metering.calls": 2, "postgres:metering.events": 3, "postgres:tenant.provider_keys": 1, "postgres:tenant.tenants": 1,
        "key_store:tenant_keys.data_keys": 1,
    }  # fmt: skip
    assert {store: removed.get(store) for store in wanted} == wanted
    assert any(used.name in store for store in removed) == (isolation != "pool")
    await the_receipt_holds(mesh, answer, tmp_path)
    looked = tenant_service_pb2.VerifyErasureRequest(tenant_id=used.tenant.tenant_id, canaries=used.canaries)
    verification = await mesh.client.tenants.VerifyErasure(looked, metadata=as_operator(mesh), timeout=120)
    assert verification.verified, verification
    await nothing_is_left(mesh, used)
    # Who lives the same way goes on as before.
    report = await mesh.client.usage.GetUsageReport(
        usage_service_pb2.GetUsageReportRequest(), metadata=credentials(bystander.tenant.api_key), timeout=30
    )
    assert report.total_cost.nano_usd == bystander.cost_nano_usd
    listed = await mesh.client.documents.ListDocuments(
        document_service_pb2.ListDocumentsRequest(), metadata=credentials(bystander.tenant.api_key), timeout=30
    )
    assert [document.document_key for document in listed.documents] == ["vault.md"]


def left_over(receipt: tenant_service_pb2.ErasureReceipt) -> list[str]:
    """The stores in which a receipt says that something is left."""
    stores = json.loads(receipt.body_json)["verification"]["stores"]
    return [item["store"] for item in stores if item["canaries"] or (item["found"] and not item["kept"])]


async def the_receipt_holds(mesh: Mesh, answer: tenant_service_pb2.EraseTenantResponse, folder: Path) -> None:
    """The command that anybody may run accepts the receipt, and not one with a digit changed."""
    environment = service_environment("tenant", mesh.stack.state, mesh.stack.ports, mesh.stack.provider)
    public_key = (await command(environment, "context-public-key"))[1].strip()
    file = folder / "receipt.json"
    for altered in (False, True):
        text = json_format.MessageToJson(answer)
        file.write_text(text.replace('\\"count\\":1', '\\"count\\":2', 1) if altered else text)
        code, out = await command({}, "verify-receipt", str(file), public_key)
        assert (code, "the receipt holds" in out) == (int(altered), not altered), out


async def command(environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Runs a command of the tenant service; returns its exit code and output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.tenant", *arguments, env=environment, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
    return process.returncode or 0, out.decode()


async def nothing_is_left(mesh: Mesh, used: Used) -> None:
    """Looks as the stores' own administrators can, past every role and policy of the services."""
    ids, words = (used.tenant.tenant_id, used.tenant_id.hex), (*used.canaries, used.tenant.slug)
    async with administrator(mesh, DATABASE) as shared:
        for sql in (
            "SELECT count(*) FROM pg_namespace WHERE starts_with(nspname, $1)",
            "SELECT count(*) FROM pg_database WHERE starts_with(datname, $1)",
            "SELECT count(*) FROM pg_roles WHERE starts_with(rolname, $1)",
        ):
            assert await shared.fetchval(sql, used.name) == 0, sql
        assert await shared.fetchval(AMOUNTS, used.tenant_id) == used.cost_nano_usd
        assert await tables_that_say(shared, words) == set()
        assert await tables_that_say(shared, ids) <= KEPT
    async with administrator(mesh, KEY_DATABASE) as keys:
        assert await tables_that_say(keys, ids) <= KEPT
    async with redis.asyncio.from_url(mesh.stack.redis.url) as client:
        named = [key async for key in client.scan_iter("*") if any(spelling.encode() in key for spelling in ids)]
        # The tombstone alone, which ends by itself, later than any token of the tenant.
        assert [await client.hkeys(key) for key in named] in ([], [[b"history", b"erased"]])
        assert all([0 < await client.ttl(key) <= 330 for key in named])
    assert not [name for name in await collections(mesh) if used.name in name]


@asynccontextmanager
async def administrator(mesh: Mesh, database: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that no policy holds back."""
    connection = await asyncpg.connect(mesh.stack.postgres.dsn(database))
    try:
        yield connection
    finally:
        await connection.close()


async def tables_that_say(connection: asyncpg.Connection, words: Iterable[str]) -> set[str]:
    """The tables with a row that holds one of the words, also as hexadecimal of bytes."""
    needles, found = [spelling for word in words for spelling in (word, word.encode().hex())], set()
    for row in await connection.fetch(EVERY_TABLE):
        sql = f"SELECT EXISTS (SELECT FROM {row['name']} r WHERE EXISTS (SELECT FROM unnest($1::text[]) n WHERE strpos(r::text, n) > 0))"
        if await connection.fetchval(sql, needles):
            found.add(row["name"])
    return found


async def collections(mesh: Mesh) -> list[str]:
    """The collections and aliases in the vector store."""
    metadata = (("api-key", mesh.stack.state.secrets.qdrant_api_key),)
    async with open_channel(mesh.stack.ports.address("qdrant"), None) as channel:
        stub = qdrant.CollectionsStub(channel)  # type: ignore[no-untyped-call] # generated without types
        listed = await stub.List(qdrant.ListCollectionsRequest(), metadata=metadata, timeout=30)
        aliases = await stub.ListAliases(qdrant.ListAliasesRequest(), metadata=metadata, timeout=30)
    return [*(item.name for item in listed.collections), *(item.alias_name for item in aliases.aliases)]
