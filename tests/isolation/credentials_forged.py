"""Metadata as attackers send it: stolen, guessed, forged and misplaced credentials and context tokens."""

import base64
import hashlib
import hmac
import uuid
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from google.protobuf.timestamp_pb2 import Timestamp

from devstack.state import StackState
from mesh.common.v1.tenant_claims_pb2 import TenantClaims
from mesh.tenant.v1 import authentication_service_pb2
from services.kernel.context_token import SigningKey, mint
from services.tenant.api_key import ApiKeyText, new_api_key, new_operator_key, parse
from services.tenant.context_minting import read_signing_key
from services.tenant.scopes import TENANT_SCOPES
from tests.isolation.surface import LEAF, Metadata, Surface
from tests.isolation.target import in_seconds
from tests.support.jwks import SigningKey as JwtKey
from tests.support.jwks import unsigned


@dataclass(frozen=True, slots=True)
class Inside:
    """What a caller inside the mesh would hold: every service's bearer or leaf, and the key that signs context tokens."""

    state: StackState
    surface: Surface

    @property
    def signing_key(self) -> SigningKey:
        """The key the tenant service signs with."""
        return read_signing_key(self.state.secrets.context_signing_key)

    def as_service(self, name: str, *, context: str = "", tenant_id: object = "") -> Metadata:
        """The metadata of a call of this service: with its right bearer, or on TLS over its own leaf."""
        pairs = [(LEAF, name)] if self.surface.tls else self.bearer_of(name)
        pairs += [("x-tenant-context", context)] if context else []
        return [*pairs, ("x-tenant-id", str(tenant_id))] if tenant_id else pairs

    def bearer_of(self, name: str) -> list[tuple[str, str]]:
        """The service's bearer, as it is taken on plaintext and worth nothing on TLS."""
        return [("x-mesh-service", name), ("x-mesh-service-token", self.state.secrets.service_tokens[name])]

    def as_operator(self, reason: str = "", *, tenant_id: object = "") -> Metadata:
        """The metadata of an operator's call."""
        pairs = [("authorization", f"Bearer {self.state.secrets.operator_key}")]
        pairs += [("x-operator-reason", reason)] if reason else []
        return [*pairs, ("x-tenant-id", str(tenant_id))] if tenant_id else pairs

    async def context_of(self, api_key: str) -> str:
        """A real context token, minted by the running tenant service for a real credential."""
        rpc = self.surface.find("tenant", "AuthenticationService/Authenticate")
        request = authentication_service_pb2.AuthenticateRequest(credential=api_key)
        answer = await self.surface.call(rpc, request, self.as_service("inference"))
        return str(answer.messages[0].context_token)  # type: ignore[attr-defined] # a class of the reflected pool


def bearer(credential: str) -> Metadata:
    """An outsider's credential."""
    return [("authorization", f"Bearer {credential}")]


def bad_credentials(real_key: str, revoked: str) -> dict[str, Metadata]:
    """Credentials that must all be refused alike, by what is wrong with them."""
    key = parse(real_key)
    assert isinstance(key, ApiKeyText)
    other = new_api_key(key.tier)
    last = "0" if real_key[-1] != "0" else "1"
    return {
        "not a key": bearer("let-me-in"),
        "empty": [("authorization", "Bearer ")],
        "another scheme": [("authorization", f"Basic {base64.b64encode(real_key.encode()).decode()}")],
        "no scheme": [("authorization", real_key)],
        "very long": bearer("ten_free_" + "a" * 8000),
        "wrong checksum": bearer(real_key[:-1] + last),
        "wrong secret": bearer(str(ApiKeyText(key.tier, key.key_id, other.secret))),
        "unknown key id": bearer(str(ApiKeyText(key.tier, other.key_id, key.secret))),
        "two keys": bearer(f"{real_key} {real_key}"),
        "injection": bearer("ten_free_' OR 1=1 --_x"),
        "unknown operator": [*bearer(str(new_operator_key())), ("x-operator-reason", "curious")],
        "revoked": bearer(revoked),
        "wrong service bearer": [("x-mesh-service", "inference"), ("x-mesh-service-token", "guess")],
        "no service bearer": [("x-mesh-service", "inference")],
        "unknown service": [("x-mesh-service", "external"), ("x-mesh-service-token", "guess")],
    }


def forged_contexts(real: SigningKey, tenant_id: uuid.UUID, token_of_another: str) -> dict[str, str]:
    """Context tokens for a tenant that must all be refused, by how they were made."""
    own = SigningKey(real.key_id, Ed25519PrivateKey.generate())
    payload, _, signature = token_of_another.partition(".")
    altered = TenantClaims.FromString(_decode(payload))
    altered.tenant_id = tenant_id.bytes
    genuine = mint(_claims(tenant_id), real)
    return {
        "signed by the forger under the real key's name": mint(_claims(tenant_id), own),
        "signed by the forger under a name of their own": mint(_claims(tenant_id), SigningKey("f0f0f0f0f0f0f0f0", own.private_key)),
        "another tenant's token with the tenant changed": f"{_encode(altered.SerializeToString())}.{signature}",
        "another token's signature": f"{genuine.partition('.')[0]}.{signature}",
        "expired": mint(_claims(tenant_id, issued=-200, ends=-100), real),
        "from the future": mint(_claims(tenant_id, issued=100, ends=200), real),
        "living too long": _signed(_claims(tenant_id, ends=3600), real),
        "without a tenant": mint(_claims(None), real),
        "half a tenant id": _signed(_claims(tenant_id, tenant_bytes=tenant_id.bytes[:8]), real),
        "unsigned": genuine.partition(".")[0] + ".",
        "without signature": genuine.partition(".")[0],
        "with padding": genuine + "=",
        "signed twice": f"{genuine}.{genuine.rpartition('.')[2]}",
        "empty": ".",
        "no token at all": "tenant:" + str(tenant_id),
    }


def forged_jwts(real: JwtKey, own: JwtKey, claims: dict[str, Any], own_claims: dict[str, Any]) -> dict[str, str]:
    """JWTs in the name of a registered issuer that must all be refused, by how they were made; `own` is the forger's own issuer's key."""
    header, posing = {"alg": "ES256", "kid": real.kid}, JwtKey("ES256", real.kid)
    public = real.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    shared = unsigned({"alg": "HS256", "kid": real.kid}, claims).rpartition(".")[0]
    genuine = real.sign(claims)
    return {
        "alg none": unsigned({"alg": "none"}, claims),
        "alg none with the real kid": unsigned({"alg": "none", "kid": real.kid}, claims, b"x"),
        "HS256 with the public key": f"{shared}.{_encode(hmac.new(public, shared.encode(), hashlib.sha256).digest())}",
        "signed by the forger under the real kid": posing.sign(claims),
        "signed by the forger's own issuer": own.sign(claims),
        "the forger's issuer with another's claims": f"{own.sign(own_claims).rpartition('.')[0]}.{genuine.rpartition('.')[2]}",
        "claims changed": f"{unsigned(header, claims | {'sub': 'root'}).rpartition('.')[0]}.{genuine.rpartition('.')[2]}",
        "another audience": real.sign(claims | {"aud": "another"}),
        "another issuer": real.sign(claims | {"iss": own_claims["iss"]}),
        "an issuer nobody registered": own.sign(own_claims | {"iss": "https://nobody.example"}),
        "not yet": real.sign(claims | {"nbf": int(in_seconds(120).timestamp())}),
        "without end": real.sign({name: value for name, value in claims.items() if name != "exp"}),
        "without subject": real.sign({name: value for name, value in claims.items() if name != "sub"}),
        "unsigned": genuine.rpartition(".")[0] + ".",
        "replaced header": f"{unsigned(header | {'jku': 'https://forger'}, claims).rpartition('.')[0]}.{genuine.rpartition('.')[2]}",
    }


def _claims(tenant_id: uuid.UUID | None, *, issued: float = 0, ends: float = 120, tenant_bytes: bytes | None = None) -> TenantClaims:
    raw = b"" if tenant_id is None else tenant_id.bytes
    return TenantClaims(
        tenant_id=raw if tenant_bytes is None else tenant_bytes,
        tier="enterprise",
        region="local",
        subject="key:forged",
        scopes=sorted(TENANT_SCOPES),
        config_version=2,
        issue_time=_stamp(issued),
        expire_time=_stamp(ends),
    )


def _stamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(in_seconds(seconds))
    return stamp


def _signed(claims: TenantClaims, key: SigningKey) -> str:
    # As `mint`, which refuses to make what no server would take.
    claims.key_id = key.key_id
    payload = claims.SerializeToString(deterministic=True)
    return f"{_encode(payload)}.{_encode(key.private_key.sign(payload))}"


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
