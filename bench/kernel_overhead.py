"""CPU that the kernel adds to one empty unary call, in microseconds: the six interceptors, and the channel helper.

Client and server share the process and the event loop, so CPU time of the
process is the whole cost; the figures are the best of several rounds, bare and guarded in turn.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import grpc
import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mesh.common.v1 import lifecycle_service_pb2, lifecycle_service_pb2_grpc
from mesh.common.v1.tenant_claims_pb2 import TenantClaims
from services.kernel.context_token import ContextTokenVerifier, SigningKey, mint
from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import MeshServer
from services.kernel.settings import ServiceSettings
from services.kernel.tenant_context import TenantContext

CALLS = 500
ROUNDS = 10
SERVICE = "mesh.common.v1.TenantLifecycleService"
REQUEST = lifecycle_service_pb2.ProvisionTenantRequest()
RESPONSE = lifecycle_service_pb2.ProvisionTenantResponse()

Call = Callable[[], Awaitable[object]]


class Settings(ServiceSettings):
    """A service that may call the lifecycle methods."""

    service_name: ClassVar[str] = "tenant"


class Servicer(lifecycle_service_pb2_grpc.TenantLifecycleServiceServicer):
    """Answers at once with nothing."""

    async def ProvisionTenant(self, request: Any, context: Any) -> Any:
        """Answers."""
        return RESPONSE


class Keys:
    """Publishes one key."""

    def __init__(self, key: SigningKey) -> None:
        self._key = key

    async def fetch_keys(self) -> Mapping[str, Ed25519PublicKey]:
        """Returns it."""
        return {self._key.key_id: self._key.private_key.public_key()}


class NoCredentials:
    """No outside caller takes part."""

    async def resolve(self, credential: str, claimed_tenant_id: TenantId | None) -> TenantContext:
        """Refuses."""
        raise Unavailable("tenant")


async def measure() -> dict[str, float]:
    """Returns the figures by name."""
    bearer = secrets.token_urlsafe(32)
    settings = Settings(
        listen_address="127.0.0.1:0",
        service_token=bearer,  # type: ignore[arg-type] # pydantic wraps it
        peer_token_hashes=f"tenant={hashlib.sha256(bearer.encode()).hexdigest()}",
    )
    key = SigningKey("bench", Ed25519PrivateKey.generate())
    verifier = ContextTokenVerifier(Keys(key))
    tenant = await verifier.verify(mint(_claims(), key))
    add = lifecycle_service_pb2_grpc.add_TenantLifecycleServiceServicer_to_server
    servicer = Servicer()  # type: ignore[abstract] # the other methods are not called
    guarded = MeshServer(settings, servicers=[(add, servicer, SERVICE)], resolver=NoCredentials(), verifier=verifier)
    await guarded.start()
    bare = grpc.aio.server()
    add(servicer, bare)
    bare_port = bare.add_insecure_port("127.0.0.1:0")
    await bare.start()
    to_guarded = MeshChannel(f"127.0.0.1:{guarded.bound_port}", settings=settings, target_service="guarded")
    to_bare = MeshChannel(f"127.0.0.1:{bare_port}", settings=settings, target_service="bare")
    figures = await _compare(to_guarded, to_bare, tenant)
    for channel in (to_guarded, to_bare):
        await channel.close()
    await guarded.stop()
    await bare.stop(None)
    return figures


async def _compare(to_guarded: MeshChannel, to_bare: MeshChannel, tenant: TenantContext) -> dict[str, float]:
    guarded = lifecycle_service_pb2_grpc.TenantLifecycleServiceStub(to_guarded.channel).ProvisionTenant
    bare = lifecycle_service_pb2_grpc.TenantLifecycleServiceStub(to_bare.channel).ProvisionTenant
    metadata = to_guarded.metadata(tenant, f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00")
    calls: dict[str, Call] = {
        "bare": lambda: bare(REQUEST, timeout=5.0),
        "bare_with_metadata": lambda: bare(REQUEST, timeout=5.0, metadata=metadata),
        "interceptors": lambda: guarded(REQUEST, timeout=5.0, metadata=metadata),
        "channel": lambda: to_bare.unary(bare, REQUEST, timeout_seconds=5.0, tenant=tenant),
        "both": lambda: to_guarded.unary(guarded, REQUEST, timeout_seconds=5.0, tenant=tenant),
    }
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            best[name] = min(best[name], await _cpu_microseconds(call))
    return {
        "bare_call_us": round(best["bare"], 1),
        "metadata_us": round(best["bare_with_metadata"] - best["bare"], 1),
        "interceptors_us": round(best["interceptors"] - best["bare_with_metadata"], 1),
        "channel_us": round(best["channel"] - best["bare_with_metadata"], 1),
        "whole_hop_us": round(best["both"] - best["bare"], 1),
    }


async def _cpu_microseconds(call: Call) -> float:
    started = time.process_time()
    for _ in range(CALLS):
        await call()
    return (time.process_time() - started) / CALLS * 1e6


def _claims() -> TenantClaims:
    now = datetime.now(UTC)
    claims = TenantClaims(tenant_id=new_uuid7().bytes, tier="professional", region="local", subject="key:bench", config_version=1)
    claims.issue_time.FromDatetime(now)
    claims.expire_time.FromDatetime(now + timedelta(seconds=300))
    return claims


def main(arguments: list[str]) -> None:
    """Measures and prints; takes no options."""
    print(json.dumps({"bench": "kernel_overhead"} | uvloop.run(measure())))
