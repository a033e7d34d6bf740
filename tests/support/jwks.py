"""Issuers of JWTs as they are outside: real keys, tokens signed with them or forged, and a key set served over HTTP on loopback."""

import base64
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

PRIVATE_KEYS = {
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "PS256": lambda: rsa.generate_private_key(65537, 2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


@dataclass
class SigningKey:
    """A private key and its name."""

    algorithm: str = "ES256"
    kid: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.private: Any = PRIVATE_KEYS[self.algorithm]()

    def public_jwk(self, **changes: Any) -> dict[str, Any]:
        """The public half as an issuer publishes it."""
        made = jwt.get_algorithm_by_name(self.algorithm).to_jwk(self.private.public_key(), as_dict=True)
        return {**made, "kid": self.kid, "use": "sig", "alg": self.algorithm, **changes}

    def sign(self, claims: dict[str, Any], **header: Any) -> str:
        """A token with these claims."""
        return jwt.encode(claims, self.private, algorithm=self.algorithm, headers={"kid": self.kid, **header})

    def sign_text(self, text: bytes) -> str:
        """A token whose payload is this very text, rightly signed."""
        return jwt.PyJWS().encode(text, self.private, algorithm=self.algorithm, headers={"kid": self.kid})


def claims_of(issuer: str, audience: Any, *, seconds: float = 600, **changes: Any) -> dict[str, Any]:
    """Claims of a token that lives from now; a change to None leaves the claim out."""
    now = time.time()
    made = {
        "iss": issuer,
        "aud": audience,
        "sub": "user-1",
        "iat": int(now),
        "exp": int(now + seconds),
        "scope": "tenant:read usage:read",
    } | changes
    return {name: value for name, value in made.items() if value is not None}


def unsigned(header: dict[str, Any], claims: Any, signature: bytes = b"") -> str:
    """A token put together by hand."""
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (_json(header), _json(claims), signature))


def _json(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


class JwksServer:
    """A key set at an address; it can be emptied, grow, redirect, fail and hang."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = []
        self.body: bytes | None = None
        self.status = 200
        self.headers: dict[str, str] = {}
        self.requests: list[str] = []
        self.base = ""

    @property
    def uri(self) -> str:
        """Where the key set is."""
        return f"{self.base}/keys"

    async def answer(self, request: web.Request) -> web.Response:
        """Answers as the test wants."""
        self.requests.append(request.path)
        body = json.dumps({"keys": self.keys}).encode() if self.body is None else self.body
        return web.Response(body=body, status=self.status, headers=self.headers, content_type="application/json")


@asynccontextmanager
async def running_jwks(*keys: SigningKey) -> AsyncIterator[JwksServer]:
    """A server on a free loopback port, with the public halves of these keys."""
    server = JwksServer()
    server.keys = [key.public_jwk() for key in keys]
    app = web.Application()
    app.router.add_get("/{tail:.*}", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()
