"""The services metering talks to, as scripted peers that speak their real contracts on loopback: tenant and ratelimit."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.common.v1 import limit_rule_pb2 as rules_pb
from mesh.common.v1.tenant_claims_pb2 import TenantClaims
from mesh.ratelimit.v1 import rate_limit_service_pb2 as limits_pb
from mesh.ratelimit.v1 import rate_limit_service_pb2_grpc as limits_grpc
from mesh.tenant.v1 import authentication_service_pb2 as auth_pb
from mesh.tenant.v1 import authentication_service_pb2_grpc as auth_grpc
from mesh.tenant.v1 import plan_service_pb2 as plan_pb
from mesh.tenant.v1 import plan_service_pb2_grpc as plan_grpc
from mesh.tenant.v1 import tenant_service_pb2 as tenant_pb
from mesh.tenant.v1 import tenant_service_pb2_grpc as tenant_grpc
from services.kernel.context_token import SigningKey, mint

DONE = limits_pb.COMMIT_OUTCOME_DONE
RETRY = limits_pb.COMMIT_OUTCOME_RETRY
OPERATOR = "operator-key"


class ScriptedTenantService(auth_grpc.AuthenticationServiceServicer, plan_grpc.PlanServiceServicer):
    """Publishes one key, mints the tokens and answers the credentials of the tests, and knows the tiers they give."""

    def __init__(self, rules: dict[str, rules_pb.LimitRules]) -> None:
        self._rules = rules
        self._key = SigningKey("test-key", Ed25519PrivateKey.generate())
        self.credentials: dict[str, UUID] = {}
        self.readers: set[str] = set()
        self.admins: set[str] = set()
        self.unknown_plans: set[UUID] = set()
        self.tiers: dict[UUID, str] = {}

    def token(
        self,
        tenant_id: UUID | None,
        *,
        lifetime: timedelta = timedelta(seconds=300),
        key: SigningKey | None = None,
        operator: bool = False,
        scopes: Sequence[str] = ("usage:read", "usage:write"),
        tier: str = "",
    ) -> str:
        """A context token of the tenant or for it, signed by the published key unless told otherwise."""
        now = datetime.now(UTC)
        claims = TenantClaims(region="local", subject="key:test", scopes=scopes)
        if tenant_id is not None:
            claims.tenant_id = tenant_id.bytes
            claims.tier = tier or self.tiers.get(tenant_id, "free")
        if operator:
            claims.operator = True
            claims.scopes[:] = ["usage:read", "tenant:admin", "operator:tenants"]
        claims.issue_time.FromDatetime(now)
        claims.expire_time.FromDatetime(now + lifetime)
        return mint(claims, key or self._key)

    async def GetContextKeys(self, request: auth_pb.GetContextKeysRequest, context: Any) -> auth_pb.GetContextKeysResponse:
        public = self._key.private_key.public_key().public_bytes_raw()
        return auth_pb.GetContextKeysResponse(keys=[auth_pb.ContextKey(key_id=self._key.key_id, public_key=public)])

    async def Authenticate(self, request: auth_pb.AuthenticateRequest, context: Any) -> auth_pb.AuthenticateResponse:
        if request.credential == OPERATOR:
            claimed = UUID(bytes=request.claimed_tenant_id) if request.claimed_tenant_id else None
            return auth_pb.AuthenticateResponse(context_token=self.token(claimed, operator=True))
        tenant_id = self.credentials.get(request.credential)
        if tenant_id is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "unknown credential")
        scopes = ("usage:read",) if request.credential in self.readers else ("usage:read", "usage:write")
        if request.credential in self.admins:
            scopes = ("usage:read", "tenant:admin")
        return auth_pb.AuthenticateResponse(context_token=self.token(tenant_id, scopes=scopes))

    async def GetTenantPlan(self, request: plan_pb.GetTenantPlanRequest, context: Any) -> plan_pb.GetTenantPlanResponse:
        if UUID(bytes=request.tenant_id) in self.unknown_plans:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the plan cannot be read now")
        tier = self.tiers.get(UUID(bytes=request.tenant_id))
        if tier is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such tenant")
        rules = self._rules.get(str(UUID(bytes=request.tenant_id)), rules_pb.LimitRules())
        anchor = rules.cycle_anchor_time if rules.HasField("cycle_anchor_time") else None
        return plan_pb.GetTenantPlanResponse(plan=tier, time_zone=rules.time_zone, cycle_anchor_time=anchor)


class ScriptedConfigs(tenant_grpc.TenantServiceServicer):
    """Answers every tenant's configuration: of no rule, in the time zone and with the anchor the test put."""

    def __init__(self) -> None:
        self.rules: dict[str, rules_pb.LimitRules] = {}

    async def GetTenantConfig(self, request: tenant_pb.GetTenantConfigRequest, context: Any) -> tenant_pb.GetTenantConfigResponse:
        tenant_id = dict(context.invocation_metadata())["x-tenant-id"]
        rules = self.rules.get(tenant_id, rules_pb.LimitRules())
        return tenant_pb.GetTenantConfigResponse(config=tenant_pb.TenantConfig(tenant_id=tenant_id, version=1, limit_rules=rules))


class ScriptedLimits(limits_grpc.RateLimitServiceServicer):
    """Remembers every commit it answered; `answer` decides, `hold` delays, `down` refuses."""

    def __init__(self) -> None:
        self.commits: list[limits_pb.Commit] = []
        self.batches: list[int] = []
        self.answer: Callable[[limits_pb.Commit], int] = lambda commit: DONE
        self.down = False
        self.arrived = asyncio.Condition()

    async def Commit(self, request: limits_pb.CommitRequest, context: Any) -> limits_pb.CommitResponse:
        if self.down:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "down")
        outcomes = [self.answer(commit) for commit in request.commits]
        async with self.arrived:
            self.commits.extend(request.commits)
            self.batches.append(len(request.commits))
            self.arrived.notify_all()
        return limits_pb.CommitResponse(outcomes=outcomes)

    def of(self, tenant_id: UUID) -> list[limits_pb.Commit]:
        """The commits of a tenant, in the order they came."""
        return [commit for commit in self.commits if commit.reservation.tenant_id == tenant_id.bytes]

    async def wait_for(self, tenant_id: UUID, count: int, seconds: float = 60.0) -> list[limits_pb.Commit]:
        """Waits until the tenant has that many commits."""
        async with asyncio.timeout(seconds), self.arrived:
            await self.arrived.wait_for(lambda: len(self.of(tenant_id)) >= count)
        return self.of(tenant_id)


class Peers:
    """Both peers behind one plain server on loopback."""

    def __init__(self) -> None:
        self.configs = ScriptedConfigs()
        self.tenants = ScriptedTenantService(self.configs.rules)
        self.limits = ScriptedLimits()
        self.port = 0

    async def start(self) -> None:
        """Serves on a free port, or on the same one as before."""
        self._server = grpc.aio.server()
        auth_grpc.add_AuthenticationServiceServicer_to_server(self.tenants, self._server)
        plan_grpc.add_PlanServiceServicer_to_server(self.tenants, self._server)
        limits_grpc.add_RateLimitServiceServicer_to_server(self.limits, self._server)
        tenant_grpc.add_TenantServiceServicer_to_server(self.configs, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Stops at once."""
        await self._server.stop(None)

    @property
    def address(self) -> str:
        """Where both are."""
        return f"127.0.0.1:{self.port}"
