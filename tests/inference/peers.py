"""The peers of the inference service as scripted gRPC servers of their real contracts: they answer as told and record what they heard."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.common.v1 import limit_rule_pb2
from mesh.common.v1.tenant_claims_pb2 import TenantClaims
from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from mesh.metering.v1 import ledger_service_pb2_grpc as ledger_grpc
from mesh.metering.v1 import price_service_pb2 as price_pb
from mesh.metering.v1 import price_service_pb2_grpc as price_grpc
from mesh.ratelimit.v1 import rate_limit_service_pb2 as limit_pb
from mesh.ratelimit.v1 import rate_limit_service_pb2_grpc as limit_grpc
from mesh.retrieval.v1 import search_service_pb2 as search_pb
from mesh.retrieval.v1 import search_service_pb2_grpc as search_grpc
from mesh.tenant.v1 import audit_service_pb2 as audit_pb
from mesh.tenant.v1 import audit_service_pb2_grpc as audit_grpc
from mesh.tenant.v1 import authentication_service_pb2 as auth_pb
from mesh.tenant.v1 import authentication_service_pb2_grpc as auth_grpc
from mesh.tenant.v1 import data_key_service_pb2 as data_key_pb
from mesh.tenant.v1 import data_key_service_pb2_grpc as data_key_grpc
from mesh.tenant.v1 import secret_service_pb2 as secret_pb
from mesh.tenant.v1 import secret_service_pb2_grpc as secret_grpc
from mesh.tenant.v1 import tenant_service_pb2 as tenant_pb
from mesh.tenant.v1 import tenant_service_pb2_grpc as tenant_grpc
from services.kernel.context_token import SigningKey, mint
from services.kernel.errors import MeshError
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.rpc.wire_status import DETAILS_KEY, encode

HAIKU = "claude-haiku-4-5-20251001"
OPUS = "claude-opus-4-6"
EVERY_SCOPE = ("inference:generate", "prompts:read", "prompts:write", "conversations:read", "conversations:write")
INPUT_PRICE, OUTPUT_PRICE = 1_000_000_000, 5_000_000_000
ENTRY_ID = UUID("01900000-0000-7000-8000-00000000000e")

Hook = Callable[[Any], Any]


@dataclass
class Tenant:
    """A tenant as the scripted tenant service knows it."""

    config: tenant_pb.TenantConfig
    key: str
    encrypts: bool = False
    data_keys: dict[int, bytes] = field(default_factory=lambda: {1: secrets.token_bytes(32)})
    provider_key: str = ""

    @property
    def tenant_id(self) -> TenantId:
        return TenantId(UUID(self.config.tenant_id))


@dataclass
class Script:
    """What was heard, in order, and what to answer instead of the usual: one hook an event, called with the request.

    A hook may return an answer, return None for the usual one, or raise a MeshError; it may be awaited.
    """

    heard: list[tuple[str, Any]] = field(default_factory=list)
    hooks: dict[str, Hook] = field(default_factory=dict)
    tenants: dict[str, Tenant] = field(default_factory=dict)
    settled: dict[bytes, Any] = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    # What the feed of changes tells; None: the tenant service has no feed.
    feed: asyncio.Queue[auth_pb.Change] | None = None

    def names(self, *ignored: str) -> list[str]:
        """The events in order, immediate repetitions once, housekeeping left out."""
        passed_over = {
            "authenticate",
            "keys",
            "config",
            "prices",
            "renew",
            "renew_calls",
            "audit",
            "data_keys",
            "provider_key",
            "record_refusals",
        }
        passed_over |= {"alone", "batch", *ignored}
        found: list[str] = []
        for name, _ in self.heard:
            if name not in passed_over and (not found or found[-1] != name):
                found.append(name)
        return found

    def all(self, name: str) -> list[Any]:
        """Every request of one kind."""
        return [request for heard, request in self.heard if heard == name]

    async def hear(self, name: str, request: Any, context: Any, usual: Callable[[], Any]) -> Any:
        try:
            return await self.take(name, request, usual)
        except MeshError as error:
            await context.abort(error.code, error.message, ((DETAILS_KEY, encode(error)),))

    async def take(self, name: str, request: Any, usual: Callable[[], Any]) -> Any:
        """Writes the event down and answers it. Raises: MeshError as the hook does."""
        async with self.changed:
            self.heard.append((name, request))
            self.changed.notify_all()
        hook = self.hooks.get(name)
        answer = hook(request) if hook else None
        if asyncio.iscoroutine(answer):
            answer = await answer
        return usual() if answer is None else answer

    async def wait_for(self, *names: str) -> None:
        """Returns once each of the events was heard."""
        async with asyncio.timeout(30.0), self.changed:
            await self.changed.wait_for(lambda: {name for name, _ in self.heard} >= set(names))


class Trust(
    auth_grpc.AuthenticationServiceServicer,
    tenant_grpc.TenantServiceServicer,
    data_key_grpc.DataKeyServiceServicer,
    secret_grpc.SecretServiceServicer,
):
    """The tenant service."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.signing = SigningKey("k1", Ed25519PrivateKey.generate())

    def token(self, tenant: Tenant, subject: str = "key:1") -> str:
        claims = TenantClaims(
            tenant_id=tenant.tenant_id.bytes, tier=tenant.config.tier, region="local", subject=subject, config_version=tenant.config.version
        )
        claims.scopes.extend(sorted(EVERY_SCOPE))
        claims.encrypt_content = tenant.encrypts
        claims.issue_time.FromDatetime(datetime.now(UTC))
        claims.expire_time.FromDatetime(datetime.now(UTC) + timedelta(seconds=200))
        return mint(claims, self.signing)

    async def Authenticate(self, request: Any, context: Any) -> Any:
        return await self.script.hear(
            "authenticate",
            request,
            context,
            lambda: auth_pb.AuthenticateResponse(context_token=self.token(self.script.tenants[request.credential])),
        )

    async def GetContextKeys(self, request: Any, context: Any) -> Any:
        public = self.signing.private_key.public_key().public_bytes_raw()
        return auth_pb.GetContextKeysResponse(keys=[auth_pb.ContextKey(key_id="k1", public_key=public)])

    async def WatchChanges(self, request: Any, context: Any) -> Any:
        if self.script.feed is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no feed")
        while (feed := self.script.feed) is not None:
            changes = [] if feed.empty() else [feed.get_nowait()]
            yield auth_pb.WatchChangesResponse(change_id=1, changes=changes)
            await asyncio.sleep(0.05)

    async def GetTenantConfig(self, request: Any, context: Any) -> Any:
        config = self.named(context).config
        return await self.script.hear("config", request, context, lambda: tenant_pb.GetTenantConfigResponse(config=config))

    async def GetDataKeys(self, request: Any, context: Any) -> Any:
        def usual() -> Any:
            kept = self.named(context).data_keys
            keys = [data_key_pb.DataKey(version=version, key=key, active=version == max(kept)) for version, key in sorted(kept.items())]
            return data_key_pb.GetDataKeysResponse(keys=keys)

        return await self.script.hear("data_keys", request, context, usual)

    async def GetProviderKey(self, request: Any, context: Any) -> Any:
        key = self.named(context).provider_key
        return await self.script.hear("provider_key", request, context, lambda: secret_pb.GetProviderKeyResponse(api_key=key))

    def named(self, context: Any) -> Tenant:
        """The tenant of a call."""
        tenant_id = dict(context.invocation_metadata())["x-tenant-id"]
        return next(tenant for tenant in self.script.tenants.values() if tenant.config.tenant_id == tenant_id)


class AuditLog(audit_grpc.AuditServiceServicer):
    """The audit log of the tenant service."""

    def __init__(self, script: Script) -> None:
        self.script = script

    async def RecordAudit(self, request: Any, context: Any) -> Any:
        def usual() -> Any:
            return audit_pb.RecordAuditResponse(outcomes=[audit_pb.AUDIT_OUTCOME_RECORDED for _ in request.items])

        return await self.script.hear("audit", request, context, usual)


class Limits(limit_grpc.RateLimitServiceServicer):
    """The ratelimit service. A reservation is heard as "reserve" whether it came alone or in a batch; how, tells "alone" and "batch"."""

    def __init__(self, script: Script) -> None:
        self.script = script

    async def Reserve(self, request: Any, context: Any) -> Any:
        self.script.heard.append(("alone", request))
        return await self.script.hear("reserve", request, context, lambda: held(request))

    async def ReserveBatch(self, request: Any, context: Any) -> Any:
        self.script.heard.append(("batch", request))
        # Side by side, so that a hook may hold up one item; the answers are in order all the same.
        async with asyncio.TaskGroup() as items:
            decided = [items.create_task(self.decide(item.request)) for item in request.items]
        return limit_pb.ReserveBatchResponse(outcomes=[one.result() for one in decided])

    async def decide(self, request: Any) -> Any:
        try:
            answer = await self.script.take("reserve", request, lambda: held(request))
        except MeshError as error:
            return limit_pb.ReserveBatchOutcome(error_status=encode(error))
        if isinstance(answer, limit_pb.Refusal):
            return limit_pb.ReserveBatchOutcome(refused=answer)
        return limit_pb.ReserveBatchOutcome(held=answer)

    async def Extend(self, request: Any, context: Any) -> Any:
        return await self.script.hear("extend", request, context, lambda: limit_pb.ExtendResponse(granted=request.amounts))

    async def Renew(self, request: Any, context: Any) -> Any:
        return await self.script.hear("renew", request, context, limit_pb.RenewResponse)

    async def Release(self, request: Any, context: Any) -> Any:
        return await self.script.hear("release", request, context, limit_pb.ReleaseResponse)


class Ledger(ledger_grpc.LedgerServiceServicer, price_grpc.PriceServiceServicer):
    """The metering service."""

    def __init__(self, script: Script) -> None:
        self.script = script

    async def OpenCalls(self, request: Any, context: Any) -> Any:
        return await self.script.hear(
            "open", request, context, lambda: opened(request, ledger_pb.OPEN_OUTCOME_OPENED, ledger_pb.CALL_STATE_OPEN)
        )

    async def ExtendCalls(self, request: Any, context: Any) -> Any:
        def usual() -> Any:
            return ledger_pb.ExtendCallsResponse(outcomes=[ledger_pb.EXTEND_OUTCOME_EXTENDED for _ in request.calls])

        return await self.script.hear("extend_calls", request, context, usual)

    async def SettleCalls(self, request: Any, context: Any) -> Any:
        def usual() -> Any:
            response = ledger_pb.SettleCallsResponse()
            for call in request.calls:
                self.script.settled[call.ref.reservation_id] = call
                cost = (call.usage.input_tokens * INPUT_PRICE + call.usage.output_tokens * OUTPUT_PRICE) // 1_000_000
                response.results.add(outcome=ledger_pb.SETTLE_OUTCOME_SETTLED, cost_nano_usd=cost, entry_id=ENTRY_ID.bytes)
            return response

        return await self.script.hear("settle", request, context, usual)

    async def VoidCalls(self, request: Any, context: Any) -> Any:
        states = {ledger_pb.VOID_KIND_NOT_BILLED: ledger_pb.CALL_STATE_VOID, ledger_pb.VOID_KIND_UNKNOWN: ledger_pb.CALL_STATE_UNRESOLVED}
        certain = all(call.kind == ledger_pb.VOID_KIND_NOT_BILLED for call in request.calls)
        return await self.script.hear(
            "void" if certain else "void_unknown",
            request,
            context,
            lambda: ledger_pb.VoidCallsResponse(states=[states[call.kind] for call in request.calls]),
        )

    async def RecordRefusals(self, request: Any, context: Any) -> Any:
        outcomes = [ledger_pb.RECORD_REFUSALS_OUTCOME_RECORDED] * len(request.counts)
        return await self.script.hear("record_refusals", request, context, lambda: ledger_pb.RecordRefusalsResponse(outcomes=outcomes))

    async def RenewCalls(self, request: Any, context: Any) -> Any:
        return await self.script.hear("renew_calls", request, context, ledger_pb.RenewCallsResponse)

    async def GetPriceBook(self, request: Any, context: Any) -> Any:
        return await self.script.hear("prices", request, context, price_book)


class Search(search_grpc.SearchServiceServicer):
    """The retrieval service."""

    def __init__(self, script: Script) -> None:
        self.script = script

    async def Search(self, request: Any, context: Any) -> Any:
        return await self.script.hear("search", request, context, lambda: search_pb.SearchResponse(chunks=[chunk()]))


def held(request: Any, output_tokens: int | None = None) -> limit_pb.ReserveResponse:
    """What was asked for, held; or so many output tokens of it."""
    asked = request.shorten.max_output_tokens
    output = asked if output_tokens is None else output_tokens
    price = request.shorten.output_nano_usd_per_million
    less = -(-asked * price // 1_000_000) - -(-output * price // 1_000_000)
    granted = limit_pb.Amounts(tokens=request.amounts.tokens - asked + output, cost_nano_usd=request.amounts.cost_nano_usd - less)
    response = limit_pb.ReserveResponse(epoch=7, granted=granted, granted_output_tokens=output, shortened=output < asked)
    response.reserve_time.FromDatetime(datetime.now(UTC))
    for rule, unit, limit, used in (
        ("requests_per_minute", limit_rule_pb2.LIMIT_UNIT_REQUESTS, 60, 1),
        ("tokens_per_day", limit_rule_pb2.LIMIT_UNIT_TOKENS, 1_000_000, granted.tokens),
        ("cost_nano_usd_per_month", limit_rule_pb2.LIMIT_UNIT_COST_NANO_USD, 10**12, granted.cost_nano_usd),
        ("concurrent_calls", limit_rule_pb2.LIMIT_UNIT_CONCURRENT_CALLS, 5, 1),
    ):
        response.limits.add(rule=rule, unit=unit, limit=limit, used=used, remaining=limit - used)
    return response


def opened(request: Any, outcome: Any, state: Any = ledger_pb.CALL_STATE_UNSPECIFIED) -> ledger_pb.OpenCallsResponse:
    """The same outcome for every call of the request."""
    return ledger_pb.OpenCallsResponse(results=[ledger_pb.OpenResult(outcome=outcome, state=state) for _ in request.calls])


def price_book(version: str = "prices-1", models: tuple[str, ...] = (HAIKU, OPUS)) -> price_pb.GetPriceBookResponse:
    """A book in which every model costs the same."""
    prices = [price_pb.ModelPrice(provider="anthropic", model=model, input=INPUT_PRICE, output=OUTPUT_PRICE) for model in models]
    return price_pb.GetPriceBookResponse(version=version, prices=prices)


def chunk(text: str = "Refunds are paid within 14 days.", title: str = "Refund policy", key: str = "refunds.md") -> search_pb.FoundChunk:
    """A chunk of a document."""
    return search_pb.FoundChunk(
        chunk_id=str(new_uuid7()), document_id=str(new_uuid7()), document_key=key, title=title, text=text, score=0.9, end_offset=len(text)
    )


@dataclass
class Peers:
    """The running peers: one server stands for all four."""

    script: Script
    trust: Trust
    address: str


@asynccontextmanager
async def running_peers() -> AsyncIterator[Peers]:
    """Serves every contract inference depends on, on one loopback port."""
    script = Script()
    trust, ledger = Trust(script), Ledger(script)
    server = grpc.aio.server()
    audit_grpc.add_AuditServiceServicer_to_server(AuditLog(script), server)
    auth_grpc.add_AuthenticationServiceServicer_to_server(trust, server)
    tenant_grpc.add_TenantServiceServicer_to_server(trust, server)
    data_key_grpc.add_DataKeyServiceServicer_to_server(trust, server)
    secret_grpc.add_SecretServiceServicer_to_server(trust, server)
    limit_grpc.add_RateLimitServiceServicer_to_server(Limits(script), server)
    ledger_grpc.add_LedgerServiceServicer_to_server(ledger, server)
    price_grpc.add_PriceServiceServicer_to_server(ledger, server)
    search_grpc.add_SearchServiceServicer_to_server(Search(script), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Peers(script, trust, f"127.0.0.1:{port}")
    finally:
        await server.stop(0)
