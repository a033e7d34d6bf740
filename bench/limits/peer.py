"""The tenant service and the ledger that the limits ask, as far as they ask: every tenant has the same rules and nothing to count yet."""

# grpc is generic in its stubs only: subscripting it at run time fails.
from __future__ import annotations

from datetime import UTC, datetime, timedelta

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from devstack.ports import LOOPBACK
from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.common.v1.tenant_claims_pb2 import TenantClaims
from mesh.metering.v1 import ledger_service_pb2 as ledger
from mesh.metering.v1 import ledger_service_pb2_grpc
from mesh.tenant.v1 import authentication_service_pb2, authentication_service_pb2_grpc, tenant_service_pb2, tenant_service_pb2_grpc
from services.kernel.context_token import SigningKey, mint
from services.kernel.ids import TenantId

TOKEN_LIFE = timedelta(seconds=290)


class Ledger(ledger_service_pb2_grpc.LedgerServiceServicer):
    """Begins epochs of nothing, and knows no call."""

    async def BeginEpoch(self, request: ledger.BeginEpochRequest, context: object) -> ledger.BeginEpochResponse:
        """Answers at once."""
        response = ledger.BeginEpochResponse(nonce=request.nonce, epoch=1)
        response.snapshot_time.FromDatetime(datetime.now(UTC))
        return response

    async def FenceCalls(self, request: ledger.FenceCallsRequest, context: object) -> ledger.FenceCallsResponse:
        """Says of every call that it was never opened."""
        return ledger.FenceCallsResponse(outcomes=[ledger.FENCE_OUTCOME_VOID] * len(request.calls))


class Tenants(tenant_service_pb2_grpc.TenantServiceServicer, authentication_service_pb2_grpc.AuthenticationServiceServicer):
    """Vouches for tenants, and tells the rules of each. It has no feed of changes: nothing changes."""

    def __init__(self) -> None:
        self._key = SigningKey("bench", Ed25519PrivateKey.generate())
        self._rules: dict[str, rules.LimitRules] = {}

    def token(self, tenant_id: TenantId, limit_rules: rules.LimitRules) -> str:
        """Registers a tenant with these rules and proves it for the next minutes."""
        self._rules[str(tenant_id)] = limit_rules
        now = datetime.now(UTC)
        claims = TenantClaims(tenant_id=tenant_id.bytes, tier="professional", region="local", subject="mesh:inference", config_version=1)
        claims.issue_time.FromDatetime(now)
        claims.expire_time.FromDatetime(now + TOKEN_LIFE)
        return mint(claims, self._key)

    async def GetTenantConfig(
        self,
        request: tenant_service_pb2.GetTenantConfigRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> tenant_service_pb2.GetTenantConfigResponse:
        """Tells the rules."""
        tenant_id = str(dict(context.invocation_metadata() or ())["x-tenant-id"])
        config = tenant_service_pb2.TenantConfig(tenant_id=tenant_id, version=1, limit_rules=self._rules[tenant_id])
        return tenant_service_pb2.GetTenantConfigResponse(config=config)

    async def GetContextKeys(
        self, request: authentication_service_pb2.GetContextKeysRequest, context: object
    ) -> authentication_service_pb2.GetContextKeysResponse:
        """Publishes the one key."""
        public = self._key.private_key.public_key().public_bytes_raw()
        return authentication_service_pb2.GetContextKeysResponse(
            keys=[authentication_service_pb2.ContextKey(key_id=self._key.key_id, public_key=public)]
        )


class Peer:
    """Both, served at one address."""

    def __init__(self) -> None:
        # What the limits never ask is left unanswered.
        self.tenants = Tenants()  # type: ignore[abstract] # see above
        self._server = grpc.aio.server()
        ledger_service_pb2_grpc.add_LedgerServiceServicer_to_server(Ledger(), self._server)  # type: ignore[abstract] # see above
        tenant_service_pb2_grpc.add_TenantServiceServicer_to_server(self.tenants, self._server)
        authentication_service_pb2_grpc.add_AuthenticationServiceServicer_to_server(self.tenants, self._server)
        self.address = f"{LOOPBACK}:{self._server.add_insecure_port(f'{LOOPBACK}:0')}"

    async def start(self) -> None:
        """Serves."""
        await self._server.start()

    async def stop(self) -> None:
        """Ends."""
        await self._server.stop(None)
