"""A ledger and a tenant service on a real gRPC server, as their contracts say, that a test can hold back or silence."""

# grpc is generic in its stubs only: subscripting it at run time fails.
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.common.v1.tenant_claims_pb2 import TenantClaims
from mesh.metering.v1 import ledger_service_pb2 as ledger
from mesh.metering.v1 import ledger_service_pb2_grpc
from mesh.tenant.v1 import (
    audit_service_pb2,
    audit_service_pb2_grpc,
    authentication_service_pb2,
    authentication_service_pb2_grpc,
    tenant_service_pb2,
    tenant_service_pb2_grpc,
)
from services.kernel.context_token import SigningKey, mint
from services.kernel.ids import TenantId
from services.kernel.tenant_context import TenantContext

OPERATOR_KEY = "ten_operator_one_for_tests"


@dataclass
class LedgerCall:
    """One call as the ledger has it. `epoch`: the ledger's when the call was settled."""

    state: ledger.CallState.ValueType
    reserve_us: int = 0
    tokens: int = 0
    cost: int = 0
    epoch: int = 0
    user: str = ""
    feature: str = ""
    attempt: int = 1
    product_unit: str = ""
    quantity: int = 0


@dataclass
class LedgerTenant:
    """One tenant's epoch and calls, by reservation."""

    epoch: int = 0
    calls: dict[bytes, LedgerCall] = field(default_factory=dict)


class ScriptedLedger(ledger_service_pb2_grpc.LedgerServiceServicer):
    """Keeps calls in memory by the rules of the call protocol; answers when its gate is open."""

    def __init__(self) -> None:
        self.tenants: dict[UUID, LedgerTenant] = {}
        self.epoch_count = 0
        self.fence_count = 0
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.fence_answers: dict[bytes, ledger.FenceOutcome.ValueType] = {}
        self.silent = False

    def of(self, tenant_id: UUID) -> LedgerTenant:
        """The tenant's part of the ledger."""
        return self.tenants.setdefault(tenant_id, LedgerTenant())

    def settle(self, tenant_id: UUID, reservation_id: UUID, tokens: int, cost: int = 0) -> int:
        """Settles a call now; returns the epoch its commit carries."""
        tenant = self.of(tenant_id)
        call = tenant.calls[reservation_id.bytes]
        call.state, call.tokens, call.cost, call.epoch = ledger.CALL_STATE_SETTLED, tokens, cost, tenant.epoch
        return tenant.epoch

    async def BeginEpoch(self, request: ledger.BeginEpochRequest, context: grpc.aio.ServicerContext) -> ledger.BeginEpochResponse:  # type: ignore[type-arg]
        """Takes the snapshot at once, and answers when the gate opens."""
        await self._refuse_when_silent(context)
        tenant_id = UUID(dict(context.invocation_metadata() or ())["x-tenant-id"])  # type: ignore[arg-type]
        self.epoch_count += 1
        response = snapshot(self.of(tenant_id), request)
        self.asked.set()
        await self.gate.wait()
        return response

    async def RecordUnits(self, request: ledger.RecordUnitsRequest, context: grpc.aio.ServicerContext) -> ledger.RecordUnitsResponse:  # type: ignore[type-arg]
        """Records at once, and answers when the gate opens. A silent ledger records and does not say so."""
        response = ledger.RecordUnitsResponse(outcomes=[self._record(item) for item in request.items])
        self.asked.set()
        await self._refuse_when_silent(context)
        await self.gate.wait()
        return response

    async def FenceCalls(self, request: ledger.FenceCallsRequest, context: grpc.aio.ServicerContext) -> ledger.FenceCallsResponse:  # type: ignore[type-arg]
        """Answers as the protocol's rule 2, or what the test wrote down."""
        await self._refuse_when_silent(context)
        self.fence_count += 1
        response = ledger.FenceCallsResponse(outcomes=[self._fence(item) for item in request.calls])
        self.asked.set()
        await self.gate.wait()
        return response

    async def _refuse_when_silent(self, context: grpc.aio.ServicerContext) -> None:  # type: ignore[type-arg]
        if self.silent:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "silent")

    def _record(self, item: ledger.RecordUnits) -> ledger.RecordUnitsOutcome.ValueType:
        tenant = self.of(UUID(bytes=item.ref.tenant_id))
        known = tenant.calls.get(item.ref.reservation_id)
        if known is not None and known.state == ledger.CALL_STATE_VOID:
            return ledger.RECORD_UNITS_OUTCOME_ENDED
        if known is not None:
            content = (item.product_unit, item.quantity, item.user, item.feature)
            same = (known.product_unit, known.quantity, known.user, known.feature) == content
            return ledger.RECORD_UNITS_OUTCOME_RECORDED if same else ledger.RECORD_UNITS_OUTCOME_CONFLICT
        if item.epoch < tenant.epoch:
            return ledger.RECORD_UNITS_OUTCOME_STALE_EPOCH
        tenant.calls[item.ref.reservation_id] = LedgerCall(
            ledger.CALL_STATE_SETTLED,
            item.reserve_time.ToMicroseconds(),
            epoch=tenant.epoch,
            user=item.user,
            feature=item.feature,
            attempt=0,
            product_unit=item.product_unit,
            quantity=item.quantity,
        )
        return ledger.RECORD_UNITS_OUTCOME_RECORDED

    def _fence(self, item: ledger.FenceCall) -> ledger.FenceOutcome.ValueType:
        told = self.fence_answers.get(item.ref.reservation_id)
        if told is not None:
            return told
        tenant = self.of(UUID(bytes=item.ref.tenant_id))
        call = tenant.calls.setdefault(item.ref.reservation_id, LedgerCall(ledger.CALL_STATE_VOID))
        match call.state:
            case ledger.CALL_STATE_VOID:
                return ledger.FENCE_OUTCOME_VOID
            case ledger.CALL_STATE_SETTLED:
                return ledger.FENCE_OUTCOME_SETTLED_BEFORE if call.epoch < item.epoch else ledger.FENCE_OUTCOME_SETTLED
            case _:
                call.state = ledger.CALL_STATE_UNRESOLVED
                return ledger.FENCE_OUTCOME_UNRESOLVED


class ScriptedTenants(
    tenant_service_pb2_grpc.TenantServiceServicer,
    authentication_service_pb2_grpc.AuthenticationServiceServicer,
    audit_service_pb2_grpc.AuditServiceServicer,
):
    """Knows each tenant's limits and vouches for it."""

    def __init__(self) -> None:
        self._key = SigningKey("test-key", Ed25519PrivateKey.generate())
        self._configs: dict[str, tenant_service_pb2.TenantConfig] = {}
        self.audited: list[audit_service_pb2.AuditItem] = []
        # Credentials and the addresses they are good from, with what each proves.
        self.credentials: dict[tuple[str, str], TenantContext] = {}

    def context(
        self,
        tenant_id: UUID,
        limit_rules: rules.LimitRules | None = None,
        version: int = 1,
        features: Mapping[str, int] | None = None,
        region: str = "local",
        **limits: int,
    ) -> TenantContext:
        """Registers a tenant with these rules or limits, or changes them under a higher version, and returns its proven context."""
        plan = tenant_service_pb2.PlanLimits(**limits)
        self._configs[str(tenant_id)] = tenant_service_pb2.TenantConfig(
            tenant_id=str(tenant_id),
            version=version,
            limits=plan,
            limit_rules=limit_rules,
            features={name: tenant_service_pb2.FeatureTerms(enabled=True, limit=limit) for name, limit in (features or {}).items()},
        )
        now = datetime.now(UTC)
        claims = TenantClaims(tenant_id=tenant_id.bytes, tier="test", region=region, subject="mesh:inference", config_version=version)
        claims.issue_time.FromDatetime(now)
        claims.expire_time.FromDatetime(now + timedelta(seconds=300))
        return TenantContext(
            TenantId(tenant_id),
            "test",
            region,
            "mesh:inference",
            frozenset(),
            version,
            now + timedelta(seconds=300),
            operator=False,
            token=mint(claims, self._key),
        )

    async def Authenticate(
        self,
        request: authentication_service_pb2.AuthenticateRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> authentication_service_pb2.AuthenticateResponse:
        """Knows the credentials a test wrote down, and one operator."""
        if request.credential == OPERATOR_KEY:
            return self.operator(request.claimed_tenant_id)
        known = self.credentials.get((request.credential, request.peer_address))
        if known is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "unknown")
            raise AssertionError
        response = authentication_service_pb2.AuthenticateResponse(context_token=known.token)
        response.expire_time.FromDatetime(known.expire_time)
        return response

    async def GetTenantConfig(
        self,
        request: tenant_service_pb2.GetTenantConfigRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> tenant_service_pb2.GetTenantConfigResponse:
        """Returns the registered limits."""
        tenant_id = str(dict(context.invocation_metadata() or ())["x-tenant-id"])
        return tenant_service_pb2.GetTenantConfigResponse(config=self._configs[tenant_id])

    def operator(self, tenant_id: bytes = b"") -> authentication_service_pb2.AuthenticateResponse:
        """What the operator's credential proves: acting for this tenant, or for none."""
        now = datetime.now(UTC)
        claims = TenantClaims(tenant_id=tenant_id, tier="test", region="local", subject="operator:1", operator=True)
        claims.scopes.append("operator:tenants")
        claims.issue_time.FromDatetime(now)
        claims.expire_time.FromDatetime(now + timedelta(seconds=300))
        return authentication_service_pb2.AuthenticateResponse(context_token=mint(claims, self._key), expire_time=claims.expire_time)

    async def RecordAudit(self, request: audit_service_pb2.RecordAuditRequest, context: object) -> audit_service_pb2.RecordAuditResponse:
        """Keeps what it is told."""
        self.audited += request.items
        return audit_service_pb2.RecordAuditResponse(outcomes=[audit_service_pb2.AUDIT_OUTCOME_RECORDED] * len(request.items))

    async def GetContextKeys(
        self, request: authentication_service_pb2.GetContextKeysRequest, context: object
    ) -> authentication_service_pb2.GetContextKeysResponse:
        """Returns the one key."""
        key = authentication_service_pb2.ContextKey(
            key_id=self._key.key_id, public_key=self._key.private_key.public_key().public_bytes_raw()
        )
        return authentication_service_pb2.GetContextKeysResponse(keys=[key])


def snapshot(tenant: LedgerTenant, request: ledger.BeginEpochRequest) -> ledger.BeginEpochResponse:
    """Begins an epoch of the tenant: everything its limits must count, as of now."""
    tenant.epoch += 1
    now = datetime.now(UTC)
    response = ledger.BeginEpochResponse(nonce=request.nonce, epoch=tenant.epoch)
    response.snapshot_time.FromDatetime(now)
    recently_us = int((now - timedelta(seconds=request.recent_seconds or 60)).timestamp() * 1e6)
    for reservation_id, call in tenant.calls.items():
        counted = ledger.CountedCall(
            reservation_id=reservation_id,
            state=call.state,
            reserve_time=time_of(call.reserve_us),
            tokens=call.tokens,
            cost_nano_usd=call.cost,
            user=call.user,
            feature=call.feature,
            attempt=call.attempt,
            product_unit=call.product_unit,
            quantity=call.quantity,
        )
        if call.state in (ledger.CALL_STATE_OPEN, ledger.CALL_STATE_UNRESOLVED):
            response.outstanding.append(counted)
            continue
        if call.reserve_us >= recently_us:
            response.recent.append(counted)
    for place, period in enumerate(request.periods):
        for (user, feature), amount in _sums(tenant, period).items():
            response.sums.append(ledger.CountedSum(period=place, user=user, feature=feature, amount=amount))
    return response


def _sums(tenant: LedgerTenant, period: ledger.CountedPeriod) -> dict[tuple[str, str], int]:
    """The settled part of a period; a void call is a request all the same."""
    users = period.scope in (rules.LIMIT_SCOPE_USER, rules.LIMIT_SCOPE_USER_FEATURE)
    features = period.scope in (rules.LIMIT_SCOPE_FEATURE, rules.LIMIT_SCOPE_USER_FEATURE)
    sums: dict[tuple[str, str], int] = {}
    for call in tenant.calls.values():
        within = period.start_time.ToMicroseconds() <= call.reserve_us < period.end_time.ToMicroseconds()
        named = (not users or call.user) and (not features or call.feature)
        amount = _amount(call, period)
        if within and named and amount:
            key = (call.user if users else "", call.feature if features else "")
            sums[key] = sums.get(key, 0) + amount
    return sums


def _amount(call: LedgerCall, period: ledger.CountedPeriod) -> int:
    settled = call.state == ledger.CALL_STATE_SETTLED
    ended = settled or call.state == ledger.CALL_STATE_VOID
    if period.unit == rules.LIMIT_UNIT_PRODUCT:
        return call.quantity * (settled and call.product_unit == period.product_unit)
    if call.product_unit:
        return 0
    return {
        rules.LIMIT_UNIT_REQUESTS: int(ended and call.attempt == 1),
        rules.LIMIT_UNIT_RETRIES: int(ended and call.attempt > 1),
        rules.LIMIT_UNIT_TOKENS: call.tokens * settled,
        rules.LIMIT_UNIT_COST_NANO_USD: call.cost * settled,
    }[period.unit]


def time_of(us: int) -> Timestamp:
    """A count of microseconds as a message."""
    time = Timestamp()
    time.FromMicroseconds(us)
    return time


@dataclass(frozen=True)
class Peer:
    """The running peers: both at one address."""

    address: str
    ledger: ScriptedLedger
    tenants: ScriptedTenants


@asynccontextmanager
async def running_peer() -> AsyncIterator[Peer]:
    """Serves both contracts on a free loopback port."""
    server = grpc.aio.server()
    # What the limits never ask is left unanswered.
    scripted = ScriptedLedger()  # type: ignore[abstract] # see above
    tenants = ScriptedTenants()  # type: ignore[abstract] # see above
    ledger_service_pb2_grpc.add_LedgerServiceServicer_to_server(scripted, server)
    tenant_service_pb2_grpc.add_TenantServiceServicer_to_server(tenants, server)
    authentication_service_pb2_grpc.add_AuthenticationServiceServicer_to_server(tenants, server)
    audit_service_pb2_grpc.add_AuditServiceServicer_to_server(tenants, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Peer(f"127.0.0.1:{port}", scripted, tenants)
    finally:
        await server.stop(None)
