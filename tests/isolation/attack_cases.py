"""For every rpc of the mesh a well-formed request that aims at the tenant whose ids it is given.

Well-formed on purpose: where a guard fails, the request must really do its harm, or the attack would prove nothing.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from google.protobuf.message import Message

from devstack.environment import TENANTS_OWN_KEYS
from services.kernel.ids import new_uuid7
from tests.isolation.surface import Rpc
from tests.isolation.target import EVENT_SOURCE, EVENT_TYPE, Ids, in_seconds

# Requests are written as the fields they set; the classes come from the reflected pool. `Any`: protobuf's own constructor.
Fields = dict[str, Any]
Case = Callable[[Ids], Fields]

TAMPERED = "tampered by a stranger"


def _question(ids: Ids) -> Fields:
    return {
        "messages": [{"role": 1, "text": "What is the vault code?"}],
        "options": {"max_output_tokens": 20, "conversation_id": ids.conversation_id, "retrieval": {"mode": 3}},
    }


def _ref(ids: Ids) -> Fields:
    return {"tenant_id": ids.tenant_id.bytes, "reservation_id": UUID(ids.reservation_id).bytes}


def _opening(ids: Ids) -> Fields:
    return {
        "ref": _ref(ids),
        "call_id": UUID(ids.call_id).bytes,
        "attempt": 1,
        "reserve_time": in_seconds(0),
        "dispatch_deadline": in_seconds(30),
        "bound_tokens": 100,
        "bound_nano_usd": 1000,
        "price_version": "any",
        "provider": "anthropic",
        "model": "claude-haiku-4-5-20251001",
    }


def _nothing(_: Ids) -> Fields:
    return {}


CASES: Mapping[str, Case] = {
    "/mesh.common.v1.TenantLifecycleService/ProvisionTenant": _nothing,
    "/mesh.common.v1.TenantLifecycleService/EraseTenant": _nothing,
    "/mesh.common.v1.TenantLifecycleService/ExportTenant": _nothing,
    "/mesh.common.v1.TenantLifecycleService/ReencryptTenant": lambda ids: {"active_version": 1},
    "/mesh.common.v1.TenantLifecycleService/MoveTenant": lambda ids: {"phase": 2},
    "/mesh.tenant.v1.PlacementService/GetPlacement": lambda ids: {"for_tables": True},
    "/mesh.tenant.v1.PlacementService/MoveTenant": lambda ids: {"to": 3},
    "/mesh.tenant.v1.PlacementService/DescribePlacement": _nothing,
    "/mesh.common.v1.TenantLifecycleService/ScanTenant": lambda ids: {"canaries": [ids.document_key]},
    "/mesh.common.v1.TenantLifecycleService/PurgeTenant": lambda ids: {"older_than": in_seconds(3600)},
    "/mesh.tenant.v1.TenantService/WatchProvisioning": lambda ids: {"request_id": ids.call_id},
    "/mesh.tenant.v1.TenantService/SuspendTenant": lambda ids: {"tenant_id": str(ids.tenant_id)},
    "/mesh.tenant.v1.TenantService/ResumeTenant": lambda ids: {"tenant_id": str(ids.tenant_id)},
    "/mesh.tenant.v1.TenantService/ExportTenantArchive": _nothing,
    "/mesh.tenant.v1.TenantService/EraseTenant": lambda ids: {
        "request_id": ids.call_id,
        "tenant_id": str(ids.tenant_id),
        "confirm_slug": f"slug-{ids.key_id}",
    },
    "/mesh.tenant.v1.TenantService/GetErasureReceipt": lambda ids: {"tenant_id": str(ids.tenant_id)},
    "/mesh.tenant.v1.TenantService/VerifyErasure": lambda ids: {"tenant_id": str(ids.tenant_id), "canaries": [ids.document_key]},
    "/mesh.tenant.v1.EventService/ListEvents": lambda ids: {"page_size": 1000},
    "/mesh.tenant.v1.EventService/ReplayEvent": lambda ids: {"tenant_id": str(ids.tenant_id), "event_id": ids.call_id},
    "/mesh.tenant.v1.TenantService/CreateTenant": lambda ids: {
        "request_id": ids.call_id,
        "slug": f"stolen-{ids.key_id}",
        "display_name": TAMPERED,
        "plan": "enterprise",
        "owner_email": "thief@example.com",
    },
    "/mesh.tenant.v1.TenantService/GetTenant": _nothing,
    "/mesh.tenant.v1.TenantService/ListTenants": lambda ids: {"page_size": 1000},
    "/mesh.tenant.v1.TenantService/GetTenantConfig": _nothing,
    "/mesh.tenant.v1.ApiKeyService/CreateApiKey": lambda ids: {"display_name": TAMPERED, "scopes": ["tenant:admin"]},
    "/mesh.tenant.v1.ApiKeyService/ListApiKeys": lambda ids: {
        "page_size": 1000,
        "page_token": ids.page_token("/mesh.tenant.v1.ApiKeyService/ListApiKeys"),
    },
    "/mesh.tenant.v1.ApiKeyService/UpdateApiKey": lambda ids: {
        "key_id": ids.key_id,
        "display_name": TAMPERED,
        "allowed_cidrs": ["0.0.0.0/0"],
        "update_mask": {"paths": ["display_name", "allowed_cidrs"]},
    },
    "/mesh.tenant.v1.ApiKeyService/RevokeApiKey": lambda ids: {"key_id": ids.key_id},
    "/mesh.tenant.v1.ApiKeyService/RotateApiKey": lambda ids: {"key_id": ids.key_id, "request_id": str(new_uuid7())},
    "/mesh.tenant.v1.IssuerService/AddIssuer": lambda ids: {
        "issuer": f"https://{ids.domain}",
        "audience": "stolen",
        "jwks_uri": "http://127.0.0.1:9/keys",
        "algorithms": [3],
        "scopes": ["tenant:admin"],
    },
    "/mesh.tenant.v1.IssuerService/ListIssuers": _nothing,
    "/mesh.tenant.v1.IssuerService/SetIssuerScopes": lambda ids: {"issuer_id": ids.issuer_id, "scopes": ["tenant:admin", "usage:read"]},
    "/mesh.tenant.v1.IssuerService/RemoveIssuer": lambda ids: {"issuer_id": ids.issuer_id},
    "/mesh.tenant.v1.DomainService/AddDomain": lambda ids: {"domain": ids.domain},
    "/mesh.tenant.v1.DomainService/ListDomains": _nothing,
    "/mesh.tenant.v1.DomainService/RemoveDomain": lambda ids: {"domain": ids.domain},
    "/mesh.tenant.v1.UserService/PutUser": lambda ids: {"email": "thief@example.com", "role": 1},
    "/mesh.tenant.v1.UserService/ListUsers": lambda ids: {
        "page_size": 1000,
        "page_token": ids.page_token("/mesh.tenant.v1.UserService/ListUsers"),
    },
    "/mesh.tenant.v1.UserService/RemoveUser": lambda ids: {"user_id": ids.user_id},
    "/mesh.tenant.v1.DataKeyService/GetDataKeys": _nothing,
    "/mesh.tenant.v1.DataKeyService/RotateDataKey": lambda ids: {"tenant_id": str(ids.tenant_id)},
    "/mesh.tenant.v1.DataKeyService/RewrapDataKeys": _nothing,
    # A key the provider takes: what is put here is used by the attacker's own later calls.
    "/mesh.tenant.v1.SecretService/PutProviderKey": lambda ids: {"api_key": TENANTS_OWN_KEYS[1]},
    "/mesh.tenant.v1.SecretService/DeleteProviderKey": _nothing,
    "/mesh.tenant.v1.SecretService/GetProviderKeyInfo": _nothing,
    "/mesh.tenant.v1.SecretService/GetProviderKey": _nothing,
    "/mesh.tenant.v1.PlanService/ListPlans": _nothing,
    "/mesh.tenant.v1.PlanService/GetTenantPlan": lambda ids: {"tenant_id": ids.tenant_id.bytes},
    "/mesh.tenant.v1.ConfigurationService/GetConfiguration": _nothing,
    "/mesh.tenant.v1.ConfigurationService/UpdateConfiguration": lambda ids: {
        "overrides": {"ai": {"assistant_name": TAMPERED}},
        "update_mask": {"paths": ["ai.assistant_name"]},
    },
    "/mesh.tenant.v1.ConfigurationService/ChangePlan": lambda ids: {"plan": "professional"},
    "/mesh.tenant.v1.ConfigurationService/ListConfigurationChanges": lambda ids: {
        "page_size": 1000,
        "page_token": ids.page_token("/mesh.tenant.v1.ConfigurationService/ListConfigurationChanges"),
    },
    "/mesh.tenant.v1.FlagService/PutFlag": lambda ids: {"flag": {"name": "stolen_flag", "tenants_on": [str(ids.tenant_id)]}},
    "/mesh.tenant.v1.FlagService/DeleteFlag": lambda ids: {"name": "stolen_flag"},
    "/mesh.tenant.v1.FlagService/ListFlags": _nothing,
    "/mesh.tenant.v1.FlagService/EvaluateFlags": lambda ids: {"tenant_id": str(ids.tenant_id)},
    "/mesh.tenant.v1.AuthenticationService/Authenticate": lambda ids: {
        "credential": f"ten_free_{ids.key_id}_guess",
        "claimed_tenant_id": ids.tenant_id.bytes,
    },
    "/mesh.tenant.v1.AuthenticationService/ResolveTenant": lambda ids: {"host": ids.domain},
    "/mesh.tenant.v1.AuthenticationService/GetContextKeys": _nothing,
    "/mesh.tenant.v1.AuditService/QueryAudit": lambda ids: {"document_id": ids.document_id, "page_size": 1000},
    "/mesh.tenant.v1.AuditService/VerifyAuditChain": _nothing,
    "/mesh.tenant.v1.AuditService/GetAuditHead": _nothing,
    "/mesh.tenant.v1.AuditService/RecordAudit": lambda ids: {
        "items": [
            {
                "tenant_id": ids.tenant_id.bytes,
                "audit_id": UUID(ids.call_id).bytes,
                "occur_time": in_seconds(0),
                "action": "DOCUMENTS_READ",
                "user": TAMPERED,
                "document_ids": [UUID(ids.document_id).bytes],
            }
        ]
    },
    # From the beginning: everything that is kept of anybody's changes.
    "/mesh.tenant.v1.AuthenticationService/WatchChanges": lambda ids: {"after_change_id": 0},
    "/mesh.ratelimit.v1.RateLimitService/Reserve": lambda ids: {
        "reservation_id": ids.reservation_id,
        "amounts": {"tokens": 10, "cost_nano_usd": 1000},
    },
    "/mesh.ratelimit.v1.RateLimitService/TakeSlice": lambda ids: {
        "slice_id": str(new_uuid7()),
        # The unit of every plan that may be sliced.
        "product_unit": "audio_seconds",
        "quantity": 1_000_000,
        "user": TAMPERED,
    },
    "/mesh.ratelimit.v1.RateLimitService/ReturnSlices": lambda ids: {"slices": [{"slice_id": ids.reservation_id, "epoch": 1, "used": 0}]},
    "/mesh.ratelimit.v1.RateLimitService/Renew": lambda ids: {"reservations": [_ref(ids)]},
    "/mesh.ratelimit.v1.RateLimitService/Release": lambda ids: {"reservation_id": ids.reservation_id, "epoch": 1},
    "/mesh.ratelimit.v1.RateLimitService/Commit": lambda ids: {
        "commits": [{"reservation": _ref(ids), "epoch": 1, "kind": 1, "actual": {"tokens": 5_000_000, "cost_nano_usd": 10**12}}]
    },
    "/mesh.ratelimit.v1.RateLimitService/Check": lambda ids: {"amounts": {"tokens": 10, "cost_nano_usd": 1000}},
    "/mesh.ratelimit.v1.RateLimitService/ListLimits": _nothing,
    "/mesh.ratelimit.v1.RateLimitService/ReserveBatch": lambda ids: {
        "items": [
            {
                "context_token": "forged",
                "request": {"reservation_id": ids.reservation_id, "amounts": {"tokens": 10, "cost_nano_usd": 1000}},
            }
        ]
    },
    # By now the attacker may hold this id in its own name, by the attack on Reserve: in this epoch it does not.
    "/mesh.ratelimit.v1.RateLimitService/Extend": lambda ids: {
        "reservation_id": ids.reservation_id,
        "epoch": 0,
        "amounts": {"tokens": 5_000_000, "cost_nano_usd": 10**12},
    },
    "/mesh.ratelimit.v1.RateLimitService/Consume": lambda ids: {
        "consumption_id": str(new_uuid7()),
        "product_unit": "ai_interviews",
        "quantity": 1_000_000,
        "user": TAMPERED,
    },
    # Would have the victim kept out.
    "/mesh.ratelimit.v1.RateLimitService/ReportAbuse": lambda ids: {
        "reports": [{"tenant_id": ids.tenant_id.bytes, "auth_failures": 1_000_000}]
    },
    "/mesh.ratelimit.v1.RateLimitService/LiftGuard": _nothing,
    "/mesh.inference.v1.InferenceService/Generate": _question,
    "/mesh.inference.v1.InferenceService/StreamGenerate": _question,
    "/mesh.inference.v1.ConversationService/CreateConversation": lambda ids: {"user": TAMPERED},
    "/mesh.inference.v1.ConversationService/ListTurns": lambda ids: {
        "conversation_id": ids.conversation_id,
        "page_token": ids.page_token("/mesh.inference.v1.ConversationService/ListTurns"),
    },
    "/mesh.inference.v1.ConversationService/DeleteConversation": lambda ids: {"conversation_id": ids.conversation_id},
    "/mesh.inference.v1.PromptService/PutPrompt": lambda ids: {"text": TAMPERED},
    "/mesh.inference.v1.PromptService/GetPrompt": _nothing,
    "/mesh.retrieval.v1.DocumentService/UpsertDocuments": lambda ids: {
        "documents": [{"document_key": ids.document_key, "title": TAMPERED, "text": TAMPERED}]
    },
    "/mesh.retrieval.v1.DocumentService/GetDocument": lambda ids: {"document_id": ids.document_id},
    "/mesh.retrieval.v1.DocumentService/ListDocuments": lambda ids: {
        "page_size": 1000,
        "page_token": ids.page_token("/mesh.retrieval.v1.DocumentService/ListDocuments"),
    },
    "/mesh.retrieval.v1.DocumentService/DeleteDocument": lambda ids: {"document_id": ids.document_id},
    "/mesh.retrieval.v1.SearchService/Search": lambda ids: {"query": "What is the vault code?", "top_k": 50},
    "/mesh.metering.v1.LedgerService/OpenCalls": lambda ids: {"calls": [_opening(ids)]},
    "/mesh.metering.v1.LedgerService/SettleCalls": lambda ids: {"calls": [{"ref": _ref(ids), "usage": {"output_tokens": 99_999}}]},
    "/mesh.metering.v1.LedgerService/VoidCalls": lambda ids: {"calls": [{"ref": _ref(ids), "kind": 1, "cause": "stolen"}]},
    "/mesh.metering.v1.LedgerService/RenewCalls": lambda ids: {"calls": [_ref(ids)]},
    "/mesh.metering.v1.LedgerService/FenceCalls": lambda ids: {"calls": [{"ref": _ref(ids), "epoch": 1}]},
    "/mesh.metering.v1.LedgerService/ExtendCalls": lambda ids: {
        "calls": [{"ref": _ref(ids), "bound_tokens": 9_000_000, "bound_nano_usd": 10**14}]
    },
    "/mesh.metering.v1.LedgerService/RecordUnits": lambda ids: {
        "items": [
            {
                "ref": _ref(ids),
                "epoch": 1,
                "reserve_time": in_seconds(0),
                "product_unit": "ai_interviews",
                "quantity": 1_000_000,
                "user": TAMPERED,
            }
        ]
    },
    "/mesh.metering.v1.LedgerService/RecordRefusals": lambda ids: {
        "replica_id": new_uuid7().bytes,
        "counts": [
            {
                "tenant_id": _ref(ids)["tenant_id"],
                "minute_time": in_seconds(0),
                "reason": "PLAN_LIMIT",
                "user": TAMPERED,
                "count": 1_000_000,
            }
        ],
    },
    "/mesh.metering.v1.LedgerService/BeginEpoch": lambda ids: {
        "nonce": new_uuid7().hex,
        # One sum for each user: whose names are told?
        "periods": [{"unit": unit, "scope": 2, "start_time": in_seconds(-86_400), "end_time": in_seconds(60)} for unit in (1, 2, 3)],
        "recent_seconds": 3_600,
    },
    "/mesh.metering.v1.EventService/RegisterEventType": lambda ids: {
        "event_type": {"product": "stolen", "type": f"of.key_{ids.key_id}", "unit": "stolen", "aggregation": 1}
    },
    "/mesh.metering.v1.EventService/ListEventTypes": lambda ids: {"page_size": 1000},
    # The source and id of the attacked tenant's own event: were they one name for all, it would be met, changed or taken back.
    "/mesh.metering.v1.EventService/RecordEvents": lambda ids: {
        "events": [
            {
                "id": ids.document_key,
                "source": EVENT_SOURCE,
                **EVENT_TYPE,
                "subject": TAMPERED,
                "time": in_seconds(0),
                "data": {"quantity": 1_000_000},
            }
        ]
    },
    "/mesh.metering.v1.EventService/ReverseEvents": lambda ids: {
        "reversals": [{"id": ids.document_key, "source": EVENT_SOURCE, "reason": TAMPERED}]
    },
    "/mesh.metering.v1.EventService/ListEvents": lambda ids: {
        "page_size": 1000,
        "page_token": ids.page_token("/mesh.metering.v1.EventService/ListEvents"),
    },
    "/mesh.metering.v1.ExportService/ExportUsage": lambda ids: {
        "kind": 2,
        "start_time": datetime(2026, 1, 1, tzinfo=UTC),
        "end_time": datetime(2027, 1, 1, tzinfo=UTC),
    },
    "/mesh.metering.v1.ExportSinkService/SetStripeCustomer": lambda ids: {"customer_id": "cus_of_the_attacker"},
    "/mesh.metering.v1.ExportSinkService/SetStripeMeter": lambda ids: {"meter": "calls.tokens", "event_name": TAMPERED},
    "/mesh.metering.v1.ExportSinkService/SetEndpointExport": lambda ids: {"is_on": True},
    "/mesh.metering.v1.ExportSinkService/GetExportSinks": _nothing,
    "/mesh.metering.v1.ExportSinkService/ListPendingExports": lambda ids: {"page_size": 1000},
    "/mesh.metering.v1.ExportSinkService/ReplayExports": lambda ids: {"sink": 1, "accept_repeats": True},
    "/mesh.metering.v1.PriceService/GetPriceBook": _nothing,
    "/mesh.metering.v1.PriceService/LoadPriceBook": lambda ids: {"validate_only": True},
    "/mesh.metering.v1.PriceService/ListReratings": lambda ids: {"page_size": 1000},
    "/mesh.metering.v1.PriceService/RerateUsage": lambda ids: {
        "rerating_id": str(new_uuid7()),
        "start_time": in_seconds(-86_400),
        "end_time": in_seconds(60),
        "price_versions": ["2026-01"],
        "right_version": "stolen",
        "cutoff_time": in_seconds(0),
    },
    "/mesh.metering.v1.InvoiceService/GetDraftInvoice": _nothing,
    "/mesh.metering.v1.InvoiceService/CloseInvoice": lambda ids: {"period_start": datetime(2026, 1, 1, tzinfo=UTC)},
    "/mesh.metering.v1.InvoiceService/ListInvoices": _nothing,
    "/mesh.metering.v1.InvoiceService/GetInvoice": lambda ids: {"invoice_id": ids.invoice_id},
    "/mesh.metering.v1.InvoiceService/ListInvoiceLineEntries": lambda ids: {"invoice_id": ids.invoice_id, "line_number": 1},
    "/mesh.metering.v1.InvoiceService/RenderInvoice": lambda ids: {"invoice_id": ids.invoice_id, "format": 1},
    "/mesh.metering.v1.InvoiceService/IssueCreditNote": lambda ids: {
        "credit_note_id": str(new_uuid7()),
        "invoice_id": ids.invoice_id,
        "amount": {"nano_usd": 1},
        "reason": TAMPERED,
    },
    "/mesh.metering.v1.InvoiceService/GrantCredit": lambda ids: {"credit_id": str(new_uuid7()), "amount": {"nano_usd": 10**15}},
    "/mesh.metering.v1.InvoiceService/ListCredits": lambda ids: {"page_size": 1000},
    "/mesh.metering.v1.InvoiceService/SetSubscription": lambda ids: {"subscription_id": str(new_uuid7()), "plan": "free"},
    "/mesh.metering.v1.ReconciliationService/ReconcileProvider": lambda ids: {"start_time": datetime(2026, 1, 1, tzinfo=UTC)},
    "/mesh.metering.v1.ReconciliationService/ListReconciliations": lambda ids: {"page_size": 1000},
    # So much that it never fires.
    "/mesh.metering.v1.BudgetService/PutBudget": lambda ids: {
        "budget": {"name": "tampered", "measure": 2, "period": 2, "amount": 9 * 10**15, "user": str(ids.user_id)}
    },
    "/mesh.metering.v1.BudgetService/GetBudget": lambda ids: {"name": ids.budget_name},
    "/mesh.metering.v1.BudgetService/ListBudgets": _nothing,
    "/mesh.metering.v1.BudgetService/DeleteBudget": lambda ids: {"name": ids.budget_name},
    "/mesh.metering.v1.BudgetService/ListAlerts": lambda ids: {"page_size": 1000},
    "/mesh.metering.v1.WebhookService/CreateWebhookEndpoint": lambda ids: {"url": "https://hooks.example/tampered"},
    "/mesh.metering.v1.WebhookService/ListWebhookEndpoints": _nothing,
    "/mesh.metering.v1.WebhookService/RotateWebhookSecret": lambda ids: {"endpoint_id": ids.endpoint_id},
    "/mesh.metering.v1.WebhookService/DeleteWebhookEndpoint": lambda ids: {"endpoint_id": ids.endpoint_id},
    "/mesh.metering.v1.WebhookService/ListDeliveries": lambda ids: {"endpoint_id": ids.endpoint_id},
    "/mesh.metering.v1.WebhookService/ReplayDeliveries": lambda ids: {"dead_of_endpoint_id": ids.endpoint_id},
    "/mesh.metering.v1.UsageService/GetUsageReport": _nothing,
    "/mesh.metering.v1.UsageService/ListCalls": lambda ids: {"page_size": 1000},
    "/mesh.metering.v1.UsageService/GetCall": lambda ids: {"call_id": ids.call_id},
    # By every name there is: whose are told?
    "/mesh.metering.v1.UsageService/QueryUsage": lambda ids: {"query": {"group_by": [2, 3, 4, 5, 6, 7, 8], "page_size": 1000}},
    "/mesh.metering.v1.UsageService/QueryUsageOfTenants": lambda ids: {
        "query": {"group_by": [1, 3, 4, 5, 6, 7, 8], "page_size": 1000},
        "tenant_ids": [str(ids.tenant_id)],
    },
    "/mesh.metering.v1.UsageService/GetBalance": _nothing,
    "/mesh.metering.v1.VerificationService/VerifyLedger": _nothing,
}

# Erasing is aimed at tenants made for it: every other attack must leave its tenants standing.
ENDS_ITS_TENANT = frozenset({"/mesh.common.v1.TenantLifecycleService/EraseTenant", "/mesh.common.v1.TenantLifecycleService/PurgeTenant"})


def aimed_at(rpc: Rpc, ids: Ids) -> Message:
    """Builds the attack on this rpc. Raises: KeyError for an rpc without one."""
    return rpc.request_type(**CASES[rpc.path](ids))


def names_an_id(rpc: Rpc) -> bool:
    """Tells whether the request differs with the ids it aims at."""
    first, second = Ids.never_existed(), Ids.never_existed()
    return CASES[rpc.path](first) != CASES[rpc.path](second)
