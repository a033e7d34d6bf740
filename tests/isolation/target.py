"""The tenants of the suite: one that is attacked and has something of everything, and one that attacks with real credentials."""

import secrets
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import asyncpg
from google.protobuf.field_mask_pb2 import FieldMask

from devstack.environment import DATABASE, TENANTS_OWN_KEYS
from devstack.mesh_client import Metadata, credentials, operator_credentials
from devstack.state import DemoTenant
from mesh.common.v1.money_pb2 import NanoUsd
from mesh.inference.v1 import conversation_service_pb2, inference_service_pb2, prompt_service_pb2
from mesh.metering.v1 import budget_service_pb2, event_service_pb2, invoice_service_pb2, usage_service_pb2, webhook_service_pb2
from mesh.retrieval.v1 import document_service_pb2
from mesh.tenant.v1 import (
    api_key_service_pb2,
    audit_service_pb2,
    authentication_service_pb2,
    configuration_service_pb2,
    domain_service_pb2,
    issuer_service_pb2,
    secret_service_pb2,
    user_service_pb2,
)
from services.kernel.ids import new_uuid7
from services.kernel.timestamps import to_timestamp
from services.metering.billing.periods import period_of
from tests.isolation.surface import LEAF, Answer, Surface
from tests.support.jwks import SigningKey, running_jwks
from tests.support.mesh import Mesh
from tests.support.waiting import eventually

ON_RECORD_SECONDS = 90.0
EVENT_SOURCE = "/planting"
IS_SUMMED = "SELECT EXISTS (SELECT FROM metering.usage_latencies WHERE tenant_id = $1)"
PLANT_RERATING = (
    "INSERT INTO metering.reratings VALUES ($1, $1, 1, now() - interval '1 hour', now(), '{planted}', 'right', now(), sha256(''), now())",
    "INSERT INTO metering.rerating_ends VALUES ($1, $1, now(), NULL)",
)
# Of a month that is not dropped: it counts for nobody.
PLANT_SUM = (
    "INSERT INTO metering.event_sums (tenant_id, use_time, sum_id, month, record_time, begin_time, product, event_type, user_name, "
    "feature, quantity, event_count) VALUES ($1, now(), uuidv7(), '1990-01-01', now(), now(), 'planted', 'planted', '', '', 1, 1)"
)
EVENT_TYPE = {"product": "planting", "type": "thing.planted"}


@dataclass(frozen=True, slots=True)
class Ids:
    """Every id of a tenant's that a request can name, and where its lists go on."""

    tenant_id: uuid.UUID
    conversation_id: str
    document_id: str
    document_key: str
    call_id: str
    reservation_id: str
    key_id: str
    issuer_id: str
    user_id: str
    domain: str
    invoice_id: str
    endpoint_id: str
    budget_name: str
    page_tokens: tuple[tuple[str, str], ...] = ()

    @classmethod
    def never_existed(cls) -> "Ids":
        """Ids of the right form that name nothing."""
        return cls(
            tenant_id=new_uuid7(),
            conversation_id=secrets.token_hex(32),
            document_id=str(uuid.uuid4()),
            document_key=f"doc-{secrets.token_hex(8)}",
            call_id=str(uuid.uuid4()),
            reservation_id=str(new_uuid7()),
            key_id=secrets.token_hex(8),
            issuer_id=str(new_uuid7()),
            user_id=str(new_uuid7()),
            domain=f"d{secrets.token_hex(8)}.example",
            invoice_id=str(new_uuid7()),
            endpoint_id=str(new_uuid7()),
            budget_name=f"budget_{secrets.token_hex(8)}",
        )

    def page_token(self, listing: str) -> str:
        """Where the named list goes on; empty when it was never asked."""
        return dict(self.page_tokens).get(listing, "")

    def spellings(self) -> dict[bytes, bytes]:
        """Each id as it may stand in an answer, with the name to put in its place."""
        found: dict[bytes, bytes] = {}
        for name in (
            "tenant_id",
            "conversation_id",
            "document_id",
            "call_id",
            "reservation_id",
            "key_id",
            "document_key",
            "issuer_id",
            "user_id",
            "domain",
            "invoice_id",
            "endpoint_id",
            "budget_name",
        ):
            text = str(getattr(self, name))
            found[text.encode()] = f"<{name}>".encode()
        for value in (self.tenant_id, uuid.UUID(self.document_id), uuid.UUID(self.call_id), uuid.UUID(self.reservation_id)):
            found[value.bytes] = b"<id>"
            found[value.hex.encode()] = b"<id>"
        return found


@dataclass(frozen=True, slots=True)
class Target:
    """A tenant with planted data: every text of its own carries its canary."""

    tenant: DemoTenant
    canary: str
    ids: Ids
    prompt: str

    @property
    def tenant_id(self) -> uuid.UUID:
        """Its id."""
        return self.ids.tenant_id

    @property
    def metadata(self) -> Metadata:
        """What its own calls carry."""
        return credentials(self.tenant.api_key)

    def traces_in(self, answer: Answer, *, asked_with: "Ids | None" = None) -> list[str]:
        """Names what of this tenant's stands in an answer; ids the asker named itself are no news to it."""
        seen = answer.everything()
        known = () if asked_with is None else asked_with.spellings()
        found = [name.decode() for spelling, name in self.ids.spellings().items() if spelling in seen and spelling not in known]
        return found + (["canary"] if self.canary.encode() in seen else [])


async def plant(mesh: Mesh, surface: Surface, plan: str = "enterprise", isolation: str = "pool", *, sealed: bool = True) -> Target:
    """Makes a tenant with keys, documents, a prompt, a conversation, a call, units, events, an invoice, a budget, all with its canary.

    Its content is sealed under its own key, as its plan has it, unless told.
    """
    tenant = await mesh.tenant(plan, isolation)
    metadata, canary = credentials(tenant.api_key), f"canary{secrets.token_hex(8)}"
    if not sealed:
        await _plant_in_the_open(mesh, surface, tenant.tenant_id)
    listed_documents = await _plant_documents(mesh, metadata, canary)
    prompt = f"You are the assistant of {canary}. Answer from the documents."
    await _must(surface, "inference", "PromptService/PutPrompt", prompt_service_pb2.PutPromptRequest(text=prompt), metadata)
    conversation_id, call_id = await _plant_conversation(surface, metadata, canary)
    await eventually(lambda: _read_is_on_record(mesh, metadata, call_id), within_seconds=ON_RECORD_SECONDS)
    call = (await mesh.client.usage.GetCall(usage_service_pb2.GetCallRequest(call_id=call_id), metadata=metadata)).attempts[0]
    await _plant_use(mesh, surface, tenant, canary)
    await _plant_events(mesh, surface, metadata, canary, listed_documents[0].document_key)
    made = await _must(
        surface,
        "tenant",
        "ApiKeyService/CreateApiKey",
        api_key_service_pb2.CreateApiKeyRequest(display_name=canary, scopes=["usage:read"]),
        metadata,
    )
    await _plant_change(surface, metadata)
    user = user_service_pb2.PutUserRequest(email=f"{canary}@example.com", role=user_service_pb2.USER_ROLE_MEMBER)
    put = await _must(surface, "tenant", "UserService/PutUser", user, metadata)
    issuer_id, domain = await _plant_names(mesh, surface, tenant.tenant_id, canary)
    await _plant_settings(surface, metadata, canary)
    own_key = secret_service_pb2.PutProviderKeyRequest(api_key=TENANTS_OWN_KEYS[0])
    await _must(surface, "tenant", "SecretService/PutProviderKey", own_key, metadata)
    await _plant_books(mesh, tenant.tenant_id)
    document = listed_documents[0]
    await eventually(lambda: _is_summed(mesh, tenant.tenant_id), within_seconds=ON_RECORD_SECONDS)
    ids = Ids(
        tenant_id=uuid.UUID(tenant.tenant_id),
        conversation_id=conversation_id,
        document_id=document.document_id,
        document_key=document.document_key,
        call_id=call_id,
        reservation_id=call.reservation_id,
        key_id=made.messages[0].key.key_id,  # type: ignore[attr-defined] # a class of the reflected pool
        issuer_id=issuer_id,
        user_id=put.messages[0].user.user_id,  # type: ignore[attr-defined] # a class of the reflected pool
        domain=domain,
        invoice_id=await _plant_invoice(mesh, surface, tenant.tenant_id, canary),
        endpoint_id=await _plant_budget(surface, metadata, canary),
        budget_name=f"budget_{canary}",
        page_tokens=await _page_tokens(surface, metadata, conversation_id),
    )
    return Target(tenant, canary, ids, prompt)


async def _read_is_on_record(mesh: Mesh, metadata: Metadata, call_id: str) -> bool:
    request = audit_service_pb2.QueryAuditRequest(call_id=call_id)
    found = {record.action for record in (await mesh.client.audit.QueryAudit(request, metadata=metadata, timeout=10)).records}
    return found >= {"DOCUMENTS_READ", "CALL_ENDED"}


async def _plant_in_the_open(mesh: Mesh, surface: Surface, tenant_id: str) -> None:
    operator = (*operator_credentials(mesh.stack.state.secrets.operator_key, "planting"), ("x-tenant-id", tenant_id))
    request = configuration_service_pb2.UpdateConfigurationRequest(
        overrides=configuration_service_pb2.ConfigurationOverrides(encrypt_content=False), update_mask=FieldMask(paths=["encrypt_content"])
    )
    await _must(surface, "tenant", "ConfigurationService/UpdateConfiguration", request, operator)


async def _plant_change(surface: Surface, metadata: Metadata) -> None:
    """A revoked key leaves a row in the feed of changes."""
    spare = api_key_service_pb2.CreateApiKeyRequest(display_name="spare", scopes=["usage:read"])
    made = await _must(surface, "tenant", "ApiKeyService/CreateApiKey", spare, metadata)
    revoked = api_key_service_pb2.RevokeApiKeyRequest(key_id=made.messages[0].key.key_id)  # type: ignore[attr-defined] # as above
    await _must(surface, "tenant", "ApiKeyService/RevokeApiKey", revoked, metadata)


async def _plant_names(mesh: Mesh, surface: Surface, tenant_id: str, canary: str) -> tuple[str, str]:
    secret = mesh.stack.state.secrets.operator_key
    operator = (*operator_credentials(secret, "planting"), ("x-tenant-id", tenant_id))
    domain = domain_service_pb2.AddDomainRequest(domain=f"{canary}.example")
    given = await _must(surface, "tenant", "DomainService/AddDomain", domain, operator)
    key = SigningKey()
    # Its keys need to be there only while it is registered.
    async with running_jwks(key) as server:
        issuer = issuer_service_pb2.AddIssuerRequest(
            issuer=f"https://login.{canary}.example",
            audience="tenantry",
            jwks_uri=server.uri,
            algorithms=[issuer_service_pb2.JWT_ALGORITHM_ES256],
            scopes=["tenant:read", "tenant:admin"],
        )
        added = await _must(surface, "tenant", "IssuerService/AddIssuer", issuer, operator)
    return added.messages[0].issuer.issuer_id, given.messages[0].domain.domain  # type: ignore[attr-defined] # as above


async def _plant_documents(mesh: Mesh, metadata: Metadata, canary: str) -> list[document_service_pb2.Document]:
    documents = [
        document_service_pb2.DocumentInput(
            document_key=f"vault-{secrets.token_hex(8)}", title=f"Vault {canary}", text=f"The vault code is {canary}-{n}."
        )
        for n in range(2)
    ]
    request = document_service_pb2.UpsertDocumentsRequest(documents=documents)
    return list((await mesh.client.documents.UpsertDocuments(request, metadata=metadata, timeout=20)).documents)


async def _plant_conversation(surface: Surface, metadata: Metadata, canary: str) -> tuple[str, str]:
    begin = conversation_service_pb2.CreateConversationRequest(user=f"user-{canary}")
    begun = await _must(surface, "inference", "ConversationService/CreateConversation", begin, metadata)
    conversation_id = str(begun.messages[0].conversation.conversation_id)  # type: ignore[attr-defined] # a class of the reflected pool
    options = inference_service_pb2.GenerateOptions(
        max_output_tokens=100,
        conversation_id=conversation_id,
        user=f"user-{canary}",
        feature=f"feature_{canary}",
        retrieval=inference_service_pb2.RetrievalOptions(mode=inference_service_pb2.RETRIEVAL_MODE_REQUIRED),
    )
    message = inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text=f"Remember {canary}: what is the vault code?")
    call_id = str(uuid.uuid4())
    asked = inference_service_pb2.GenerateRequest(messages=[message], options=options)
    await _must(surface, "inference", "InferenceService/Generate", asked, (*metadata, ("x-request-id", call_id)))
    return conversation_id, call_id


async def _plant_use(mesh: Mesh, surface: Surface, tenant: DemoTenant, canary: str) -> None:
    """Records a use of units as the limits do, in whatever epoch the tenant is."""
    tokens = mesh.stack.state.secrets.service_tokens
    limits = [(LEAF, "ratelimit")] if surface.tls else [("x-mesh-service", "ratelimit"), ("x-mesh-service-token", tokens["ratelimit"])]
    asked = authentication_service_pb2.AuthenticateRequest(credential=tenant.api_key)
    known = await _must(surface, "tenant", "AuthenticationService/Authenticate", asked, limits)
    use = {
        "ref": {"tenant_id": uuid.UUID(tenant.tenant_id).bytes, "reservation_id": new_uuid7().bytes},
        "context_token": known.messages[0].context_token,  # type: ignore[attr-defined] # a class of the reflected pool
        "epoch": 2**40,
        "reserve_time": in_seconds(0),
        "product_unit": "ai_interviews",
        "quantity": 3,
        "user": f"user-{canary}",
        "feature": f"feature_{canary}",
    }
    rpc = surface.find("metering", "LedgerService/RecordUnits")
    recorded = await _must(surface, "metering", "LedgerService/RecordUnits", rpc.request_type(items=[use]), limits)
    assert list(recorded.messages[0].outcomes) == [1]  # type: ignore[attr-defined] # as above


async def _plant_invoice(mesh: Mesh, surface: Surface, tenant_id: str, canary: str) -> str:
    """Leaves a row in every billing table: a plan, a credit, the last month's invoice that it pays in part, and a note; returns its id."""
    operator = (*operator_credentials(mesh.stack.state.secrets.operator_key, "planting"), ("x-tenant-id", tenant_id))
    period = period_of(period_of(datetime.now(UTC), 1).start_time - timedelta(seconds=1), 1)
    amount = NanoUsd(nano_usd=1_000_000_000)
    plan = invoice_service_pb2.SetSubscriptionRequest(
        subscription_id=str(new_uuid7()), plan="starter", effective_time=to_timestamp(period.start_time)
    )
    await _must(surface, "metering", "InvoiceService/SetSubscription", plan, operator)
    credit = invoice_service_pb2.GrantCreditRequest(credit_id=str(new_uuid7()), amount=amount, reason=canary)
    await _must(surface, "metering", "InvoiceService/GrantCredit", credit, operator)
    asked = invoice_service_pb2.CloseInvoiceRequest(period_start=to_timestamp(period.start_time))
    closed = await _must(surface, "metering", "InvoiceService/CloseInvoice", asked, operator)
    invoice_id = str(closed.messages[0].invoice.invoice_id)  # type: ignore[attr-defined] # a class of the reflected pool
    note = invoice_service_pb2.IssueCreditNoteRequest(credit_note_id=str(new_uuid7()), invoice_id=invoice_id, amount=amount, reason=canary)
    await _must(surface, "metering", "InvoiceService/IssueCreditNote", note, operator)
    return invoice_id


async def _is_summed(mesh: Mesh, tenant_id: str) -> bool:
    """Tells whether the call is in the sums of use: whoever attacks them later keeps them from being folded."""
    admin = await asyncpg.connect(mesh.stack.postgres.dsn(DATABASE))
    try:
        return bool(await admin.fetchval(IS_SUMMED, uuid.UUID(tenant_id)))
    finally:
        await admin.close()


async def _plant_books(mesh: Mesh, tenant_id: str) -> None:
    """Leaves a re-rating that changed nothing, and a sum of events: the mesh has one price version, and no month that is old enough."""
    admin = await asyncpg.connect(mesh.stack.postgres.dsn(DATABASE))
    try:
        for sql in (*PLANT_RERATING, PLANT_SUM):
            await admin.execute(sql, uuid.UUID(tenant_id))
    finally:
        await admin.close()


async def _plant_budget(surface: Surface, metadata: Metadata, canary: str) -> str:
    """Leaves a budget that fired, and then a receiver, which so has nothing to wait for; returns the receiver's id."""
    budget = budget_service_pb2.Budget(
        name=f"budget_{canary}",
        measure=budget_service_pb2.BUDGET_MEASURE_TOKENS,
        period=budget_service_pb2.BUDGET_PERIOD_MONTH,
        user=f"user-{canary}",
        amount=1,
        thresholds_percent=[100],
    )
    await _must(surface, "metering", "BudgetService/PutBudget", budget_service_pb2.PutBudgetRequest(budget=budget), metadata)

    async def has_fired() -> bool:
        listed = await _must(surface, "metering", "BudgetService/ListAlerts", budget_service_pb2.ListAlertsRequest(), metadata)
        return len(listed.messages[0].alerts) == 1  # type: ignore[attr-defined] # a class of the reflected pool

    await eventually(has_fired, within_seconds=ON_RECORD_SECONDS)
    asked = webhook_service_pb2.CreateWebhookEndpointRequest(url=f"https://hooks.example/{canary}")
    made = await _must(surface, "metering", "WebhookService/CreateWebhookEndpoint", asked, metadata)
    return str(made.messages[0].endpoint.endpoint_id)  # type: ignore[attr-defined] # as above


async def _plant_events(mesh: Mesh, surface: Surface, metadata: Metadata, canary: str, name: str) -> None:
    """Records two events, one of them by a name that attacks use."""
    operator = operator_credentials(mesh.stack.state.secrets.operator_key, "planting")
    event_type = event_service_pb2.EventType(**EVENT_TYPE, unit="things", aggregation=event_service_pb2.AGGREGATION_SUM)
    known = event_service_pb2.RegisterEventTypeRequest(event_type=event_type)
    await _must(surface, "metering", "EventService/RegisterEventType", known, operator)
    events = [
        event_service_pb2.Event(
            id=event_id,
            source=EVENT_SOURCE,
            **EVENT_TYPE,
            subject=f"user-{canary}",
            feature=f"feature_{canary}",
            data=event_service_pb2.EventData(quantity=3, metadata={"note": canary}),
        )
        for event_id in (name, f"second-{canary}")
    ]
    for event in events:
        event.time.GetCurrentTime()
    recorded = await _must(surface, "metering", "EventService/RecordEvents", event_service_pb2.RecordEventsRequest(events=events), metadata)
    assert [result.outcome for result in recorded.messages[0].results] == [1, 1]  # type: ignore[attr-defined] # as above


async def _plant_settings(surface: Surface, metadata: Metadata, canary: str) -> None:
    for name in (canary, f"{canary} again"):
        request = configuration_service_pb2.UpdateConfigurationRequest(
            overrides=configuration_service_pb2.ConfigurationOverrides(ai=configuration_service_pb2.AiOverrides(assistant_name=name)),
            update_mask=FieldMask(paths=["ai.assistant_name"]),
        )
        await _must(surface, "tenant", "ConfigurationService/UpdateConfiguration", request, metadata)


async def _page_tokens(surface: Surface, metadata: Metadata, conversation_id: str) -> tuple[tuple[str, str], ...]:
    tokens: list[tuple[str, str]] = []
    for port, method in (
        ("retrieval", "DocumentService/ListDocuments"),
        ("inference", "ConversationService/ListTurns"),
        ("metering", "EventService/ListEvents"),
        ("tenant", "ApiKeyService/ListApiKeys"),
        ("tenant", "UserService/ListUsers"),
        ("tenant", "ConfigurationService/ListConfigurationChanges"),
    ):
        rpc = surface.find(port, method)
        request = rpc.request_type(page_size=1)
        if "conversation_id" in rpc.request_type.DESCRIPTOR.fields_by_name:
            request.conversation_id = conversation_id  # type: ignore[attr-defined] # a class of the reflected pool
        answer = await surface.call(rpc, request, metadata)
        tokens.append((rpc.path, str(answer.messages[0].next_page_token)))  # type: ignore[attr-defined] # as above
    assert all(token for _, token in tokens)
    return tuple(tokens)


async def _must(surface: Surface, port: str, method: str, request: object, metadata: Metadata) -> Answer:
    answer = await surface.call(surface.find(port, method), request, metadata)  # type: ignore[arg-type] # any message
    assert answer.code == "OK", (method, answer)
    return answer


def in_seconds(seconds: float) -> datetime:
    """A time from now, or before now."""
    return datetime.now(UTC) + timedelta(seconds=seconds)
