"""Secrets: shown once, kept nowhere."""

import base64
import logging
from datetime import UTC, datetime
from uuid import UUID

import pytest
import structlog

from mesh.tenant.v1 import api_key_service_pb2, tenant_service_pb2
from services.kernel.ids import TenantId
from services.kernel.telemetry.logging import configure_logging
from services.tenant.api_key import ApiKeyText, new_api_key
from services.tenant.authentication import CredentialAttempt
from services.tenant.provisioning import CreatedTenant
from services.tenant.tenant_record import Tenant, TenantState
from tests.tenant.harness import Harness, call, refusal, taken_apart, wish, with_key
from tests.tenant.test_api_keys import make_key


async def test_no_secret_is_in_the_database(harness: Harness) -> None:
    """Every row of every table, as text, holds neither a key's secret nor the operator's, in any common spelling."""
    created = await harness.create()
    second = await make_key(harness, created.api_key)
    await harness.authenticate(second.api_key)
    secrets = [taken_apart(created.api_key).secret, taken_apart(second.api_key).secret, harness.operator.secret]
    spellings = [text for secret in secrets for text in (secret, secret.encode().hex(), base64.b64encode(secret.encode()).decode())]
    async with harness.superuser() as connection:
        tables = [
            (row[0], row[1])
            for row in await connection.fetch(
                "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
            )
        ]
        text = "\n".join(
            [row[0] for schema, table in tables for row in await connection.fetch(f'SELECT t::text FROM "{schema}"."{table}" t')]
        )
    assert taken_apart(second.api_key).key_id in text
    assert [spelling for spelling in spellings if spelling in text] == []


async def test_no_secret_is_in_the_logs(harness: Harness, capfd: pytest.CaptureFixture[str]) -> None:
    """At the most talkative level, making, using, refusing and failing leave no secret in any line."""
    configure_logging("tenant", "DEBUG")
    try:
        request = wish()
        created = await call(harness.tenants.CreateTenant, request, harness.as_operator())
        own = taken_apart(created.api_key)
        wrong = ApiKeyText(own.tier, own.key_id, new_api_key("x").secret)
        made = await make_key(harness, created.api_key)
        await harness.authenticate(created.api_key)
        await refusal(harness.authenticate(str(wrong)))
        await refusal(make_key(harness, str(wrong)))
        structlog.get_logger("probe").info("probe_line")
        logging.getLogger("probe").warning("probe_line")
    finally:
        lines = "".join(capfd.readouterr())
        structlog.reset_defaults()
    assert "probe_line" in lines
    for secret in (own.secret, wrong.secret, taken_apart(made.api_key).secret, harness.operator.secret):
        assert secret not in lines


def test_values_that_hold_secrets_do_not_show_them() -> None:
    """The repr of a key, an attempt and a fresh tenant names no secret, so that no traceback or log line can."""
    key = new_api_key("free")
    tenant = Tenant(TenantId(UUID(int=1)), "acme", "Acme", "free", "local", TenantState.ACTIVE, datetime.now(UTC))
    for value in (key, CredentialAttempt(str(key), None, "", ""), CreatedTenant(tenant, str(key))):
        assert key.secret not in repr(value)


async def test_an_answer_with_a_key_is_the_only_place_that_shows_it(harness: Harness) -> None:
    """Neither GetTenant nor the list of keys repeats any part of the secret."""
    created = await harness.create()
    secret = taken_apart(created.api_key).secret
    tenant = await call(harness.tenants.GetTenant, tenant_service_pb2.GetTenantRequest(), with_key(created.api_key))
    keys = await call(harness.keys.ListApiKeys, api_key_service_pb2.ListApiKeysRequest(), with_key(created.api_key))
    assert secret.encode() not in tenant.SerializeToString() + keys.SerializeToString()
