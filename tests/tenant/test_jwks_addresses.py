"""Where key sets are fetched from: nowhere in a private network, whatever a name leads to, unless a setting says so."""

import socket
from dataclasses import replace

import grpc
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from services.kernel.public_address import is_public
from services.tenant.adapters.http_jwks import HttpJwksSource
from services.tenant.app import build
from services.tenant.jwks_cache import JwksPrivate
from services.tenant.settings import TenantSettings
from tests.support.jwks import SigningKey, running_jwks
from tests.tenant.harness import Harness, refusal
from tests.tenant.token_bench import register, wish


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("1.1.1.1", True),
        ("2606:4700::1111", True),
        ("::ffff:1.1.1.1", True),
        ("64:ff9b::101:101", True),
        ("127.0.0.1", False),
        ("0.1.2.3", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fc00::1", False),
        ("fe80::1", False),
        ("fe80::1%1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:a00:1::", False),
    ],
)
def test_an_address_is_public_or_not(address: str, public: bool) -> None:
    """Neither this machine's, nor a private network's, nor a link's; nor one that carries such an address inside."""
    assert is_public(address) == public


class Names(AbstractResolver):
    """Names that lead where a test wants, another place each time they are asked."""

    def __init__(self, *places: list[str]) -> None:
        self._places = list(places)

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        """Where it leads now."""
        return [
            ResolveResult(
                hostname=host, host=place, port=port, family=socket.AF_INET6 if ":" in place else socket.AF_INET, proto=0, flags=0
            )
            for place in self._places.pop(0)
        ]

    async def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize("places", [["127.0.0.1"], ["::1", "127.0.0.1"], ["::ffff:127.0.0.1"]], ids=["one", "two", "mapped"])
async def test_a_name_that_leads_into_a_private_network_is_not_called(places: list[str]) -> None:
    """Looked at is the address that would be connected to, so a name that answers otherwise the next time opens nothing."""
    async with running_jwks(SigningKey()) as server:
        port = server.base.rpartition(":")[2]
        source = HttpJwksSource(resolver=Names(places))
        with pytest.raises(JwksPrivate):
            await source.fetch(f"http://keys.example:{port}/keys")
        await source.close()
        assert not server.requests


async def test_an_address_written_out_is_not_called_either() -> None:
    """A literal needs no name to be resolved, and is looked at all the same; where a setting allows it, it is called."""
    async with running_jwks(SigningKey()) as server:
        strict, lax = HttpJwksSource(), HttpJwksSource(private_addresses=True)
        with pytest.raises(JwksPrivate):
            await strict.fetch(server.uri)
        assert not server.requests
        assert b"keys" in await lax.fetch(server.uri)
        for source in (strict, lax):
            await source.close()


async def test_an_issuer_with_keys_in_a_private_network_is_not_registered(harness: Harness) -> None:
    """By default: INVALID_ARGUMENT names the field and says why, and nothing was called."""
    created, key = await harness.create(), SigningKey()
    app = await build(TenantSettings(**{**harness.settings.model_dump(), "jwks_private_addresses": False}))
    await app.server.start()
    try:
        async with running_jwks(key) as server, grpc.aio.insecure_channel(f"127.0.0.1:{app.server.bound_port}") as channel:
            strict = replace(harness, app=app, channel=channel)
            error = await refusal(register(strict, created.tenant.tenant_id, wish(server, key)))
            assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "jwks_uri")
            assert "public address" in error.message
            assert not server.requests
    finally:
        await app.close()
