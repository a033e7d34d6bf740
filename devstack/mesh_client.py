"""How the embedded stack calls the mesh: as any product back end does, with a credential in the metadata and nothing else."""

import contextlib
import secrets
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from devstack.addresses import Ports
from devstack.certificates import LeafFiles
from mesh.inference.v1 import conversation_service_pb2_grpc, inference_service_pb2_grpc
from mesh.metering.v1 import (
    budget_service_pb2_grpc,
    event_service_pb2_grpc,
    invoice_service_pb2_grpc,
    reconciliation_service_pb2_grpc,
    usage_service_pb2_grpc,
    webhook_service_pb2_grpc,
)
from mesh.ratelimit.v1 import rate_limit_service_pb2_grpc
from mesh.retrieval.v1 import document_service_pb2_grpc, search_service_pb2_grpc
from mesh.tenant.v1 import (
    audit_service_pb2_grpc,
    configuration_service_pb2_grpc,
    placement_service_pb2_grpc,
    tenant_service_pb2_grpc,
)

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refused call as its status details tell it."""

    code: str
    reason: str
    message: str
    metadata: dict[str, str]
    retry_after_seconds: float | None


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """Reads ErrorInfo and RetryInfo out of a failed call."""
    reason, metadata, retry_after = "", {}, None
    try:
        status = rpc_status.from_call(error)
    except ValueError:
        # Its own deadline made up another status than the one the server sent.
        status = None
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    return Refusal(error.code().name, reason, error.details() or "", metadata, retry_after)


@dataclass(frozen=True, slots=True)
class NewTrace:
    """A sampled W3C trace context made by the caller, so that it knows the trace to look for."""

    trace_id: str
    traceparent: str

    @classmethod
    def begin(cls) -> "NewTrace":
        """Makes a new one."""
        trace_id = secrets.token_hex(16)
        return cls(trace_id, f"00-{trace_id}-{secrets.token_hex(8)}-01")


class MeshClient:
    """Stubs of the five services over loopback channels: plaintext, or TLS with a leaf."""

    def __init__(self, ports: Ports, leaf: LeafFiles | None = None) -> None:
        options = (("grpc.max_reconnect_backoff_ms", 500), ("grpc.use_local_subchannel_pool", 1))
        self._channels = {
            name: open_channel(ports.address(name), leaf, options) for name in ("tenant", "ratelimit", "inference", "retrieval", "metering")
        }
        self.tenants = tenant_service_pb2_grpc.TenantServiceStub(self._channels["tenant"])
        self.audit = audit_service_pb2_grpc.AuditServiceStub(self._channels["tenant"])
        self.configuration = configuration_service_pb2_grpc.ConfigurationServiceStub(self._channels["tenant"])
        self.placements = placement_service_pb2_grpc.PlacementServiceStub(self._channels["tenant"])
        self.limits = rate_limit_service_pb2_grpc.RateLimitServiceStub(self._channels["ratelimit"])
        self.inference = inference_service_pb2_grpc.InferenceServiceStub(self._channels["inference"])
        self.conversations = conversation_service_pb2_grpc.ConversationServiceStub(self._channels["inference"])
        self.documents = document_service_pb2_grpc.DocumentServiceStub(self._channels["retrieval"])
        self.search = search_service_pb2_grpc.SearchServiceStub(self._channels["retrieval"])
        self.events = event_service_pb2_grpc.EventServiceStub(self._channels["metering"])
        self.invoices = invoice_service_pb2_grpc.InvoiceServiceStub(self._channels["metering"])
        self.budgets = budget_service_pb2_grpc.BudgetServiceStub(self._channels["metering"])
        self.webhooks = webhook_service_pb2_grpc.WebhookServiceStub(self._channels["metering"])
        self.usage = usage_service_pb2_grpc.UsageServiceStub(self._channels["metering"])
        self.reconciliations = reconciliation_service_pb2_grpc.ReconciliationServiceStub(self._channels["metering"])

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, ports: Ports, leaf: LeafFiles | None = None) -> AsyncIterator["MeshClient"]:
        """Opens the channels and closes them at the end."""
        client = cls(ports, leaf)
        try:
            yield client
        finally:
            for channel in client._channels.values():
                await channel.close()


def open_channel(address: str, leaf: LeafFiles | None, options: tuple[tuple[str, int], ...] = ()) -> grpc.aio.Channel:
    """Opens a channel as whoever the leaf is of; without one in plaintext."""
    if leaf is None:
        return grpc.aio.insecure_channel(address, options=options)
    trust = grpc.ssl_channel_credentials(leaf.authorities.read_bytes(), leaf.key.read_bytes(), leaf.certificate.read_bytes())
    return grpc.aio.secure_channel(address, trust, options=options)


def credentials(api_key: str, *, call_id: uuid.UUID | None = None, trace: NewTrace | None = None, tenant_id: str = "") -> Metadata:
    """Returns the metadata of a call made with an API key."""
    metadata = [("authorization", f"Bearer {api_key}")]
    if call_id is not None:
        metadata.append(("x-request-id", str(call_id)))
    if trace is not None:
        metadata.append(("traceparent", trace.traceparent))
    if tenant_id:
        metadata.append(("x-tenant-id", tenant_id))
    return tuple(metadata)


def operator_credentials(operator_key: str, reason: str) -> Metadata:
    """Returns the metadata of an operator's call."""
    return (("authorization", f"Bearer {operator_key}"), ("x-operator-reason", reason))
