"""A tenant whose JWTs a test makes: its issuer is registered, the key is in the test's hand, and the key set is served over HTTP."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from mesh.common.v1 import error_reason_pb2
from mesh.tenant.v1 import issuer_service_pb2 as pb
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.errors import MeshError
from services.kernel.tenant_context import TenantContext
from services.tenant.context_minting import ContextMinter, read_signing_key
from tests.support.jwks import JwksServer, SigningKey, claims_of, running_jwks
from tests.tenant.harness import Harness, call, refusal

ALGORITHMS = {
    "RS256": pb.JWT_ALGORITHM_RS256,
    "PS256": pb.JWT_ALGORITHM_PS256,
    "ES256": pb.JWT_ALGORITHM_ES256,
    "EdDSA": pb.JWT_ALGORITHM_EDDSA,
}
AUDIENCE = "tenantry-api"
INVALID = error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID


@dataclass
class Bench:
    """A tenant with a registered issuer whose key and address are in the test's hand."""

    harness: Harness
    tenant_id: str
    api_key: str
    key: SigningKey
    server: JwksServer
    issuer: pb.Issuer

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Claims that fit the registration, changed."""
        return claims_of(self.issuer.issuer, AUDIENCE, **changes)

    def token(self, **changes: Any) -> str:
        """A token that fits but for the changes."""
        return self.key.sign(self.claims(**changes))

    async def refused(self, token: str) -> MeshError:
        """How the token is refused."""
        return await refusal(self.harness.authenticate(token))


def wish(server: JwksServer, key: SigningKey, **changes: Any) -> pb.AddIssuerRequest:
    """A registration nobody else has."""
    fields = {
        "issuer": f"https://login.example/{secrets.token_hex(6)}",
        "audience": AUDIENCE,
        "jwks_uri": server.uri,
        "algorithms": [ALGORITHMS[key.algorithm]],
        "scopes": ["tenant:read", "documents:read"],
    }
    return pb.AddIssuerRequest(**{**fields, **changes})


async def register(harness: Harness, tenant_id: str, request: pb.AddIssuerRequest) -> pb.Issuer:
    """Registers an issuer as the operator."""
    return (await call(harness.issuers.AddIssuer, request, harness.as_operator(tenant_id))).issuer


@asynccontextmanager
async def bench(harness: Harness, algorithm: str = "ES256", **changes: Any) -> AsyncIterator[Bench]:
    """A bench of its own."""
    created, key = await harness.create(), SigningKey(algorithm)
    async with running_jwks(key) as server:
        issuer = await register(harness, created.tenant.tenant_id, wish(server, key, **changes))
        yield Bench(harness, created.tenant.tenant_id, created.api_key, key, server, issuer)


async def proven(harness: Harness, token: str) -> TenantContext:
    """What a context token says."""
    minter = ContextMinter(read_signing_key(harness.settings.context_signing_key.get_secret_value()), [], region="", clock=_never)
    return await ContextTokenVerifier(minter).verify((await harness.authenticate(token)).context_token)


def _never() -> Any:
    raise AssertionError
