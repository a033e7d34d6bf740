"""Postgres away: the service starts, refuses with a typed answer, and recovers by itself."""

import asyncio
import base64
from urllib.parse import urlsplit

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from devstack.ports import free_port
from mesh.common.v1 import error_reason_pb2
from mesh.tenant.v1 import authentication_service_pb2, authentication_service_pb2_grpc
from services.tenant.api_key import new_api_key, new_operator_key
from services.tenant.app import TenantApp, build, migrate_schema
from services.tenant.context_minting import public_key_id
from services.tenant.settings import TenantSettings
from tests.support.stores import PostgresStore
from tests.tenant.harness import Harness, as_service, call, refusal, settings_for


async def forward(port: int, target: str) -> asyncio.Server:
    """Listens on a port and passes bytes on: a Postgres that can appear at a known place."""
    host, target_port = urlsplit(target).hostname, urlsplit(target).port

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(host, target_port)
        async with asyncio.TaskGroup() as group:
            group.create_task(pump(reader, up_writer))
            group.create_task(pump(up_reader, writer))

    return await asyncio.start_server(serve, "127.0.0.1", port)


async def ask(app: TenantApp, credential: str) -> object:
    """Authenticates over a channel of its own."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.server.bound_port}") as channel:
        stub = authentication_service_pb2_grpc.AuthenticationServiceStub(channel)
        request = authentication_service_pb2.AuthenticateRequest(credential=credential)
        return await call(stub.Authenticate, request, as_service("metering"))


async def test_it_starts_without_postgres_and_serves_when_it_is_back(postgres: PostgresStore) -> None:
    """While the store is away every question is UNAVAILABLE with a time to retry; when it is back the same process answers."""
    admin_dsn, operator = await postgres.fresh_database(), new_operator_key()
    real_dsn = postgres.dsn(urlsplit(admin_dsn).path.lstrip("/"), "tenant_service", "service-password")
    await migrate_schema(settings_for(admin_dsn, real_dsn, operator, {}))
    port = free_port()
    away_dsn = real_dsn.replace(f":{urlsplit(real_dsn).port}", f":{port}")
    app = await build(settings_for(admin_dsn, away_dsn, operator, {}))
    await app.server.start()
    try:
        error = await refusal(ask(app, str(new_api_key("free"))))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, error_reason_pb2.ERROR_REASON_DEPENDENCY_UNAVAILABLE)
        assert error.metadata["dependency"] == "postgres"
        assert error.retry_after_seconds is not None
        forwarder = await forward(port, real_dsn)
        try:
            error = await refusal(ask(app, str(new_api_key("free"))))
            assert error.reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID
        finally:
            forwarder.close()
    finally:
        await app.server.stop()
        await app.close()


async def test_the_keys_are_published_whatever_the_store_does(harness: Harness) -> None:
    """GetContextKeys needs no store, and a rotated-out key stays published when the settings name it."""
    old = Ed25519PrivateKey.generate().public_key()
    settings = TenantSettings(
        **{**harness.settings.model_dump(), "context_additional_public_keys": base64.b64encode(old.public_bytes_raw()).decode()}
    )
    app = await build(settings)
    await app.server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.server.bound_port}") as channel:
            stub = authentication_service_pb2_grpc.AuthenticationServiceStub(channel)
            answer = await call(stub.GetContextKeys, authentication_service_pb2.GetContextKeysRequest(), as_service("ratelimit"))
        assert public_key_id(old) in {key.key_id for key in answer.keys}
        assert len(answer.keys) == 2
    finally:
        await app.server.stop()
        await app.close()
