"""The tenant service's settings. Refuses keys and hashes it could not use, without repeating them."""

import re
from typing import ClassVar, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from services.kernel.settings import (
    InferenceAddress,
    ListenAddress,
    MeteringAddress,
    PostgresAdminDsn,
    PostgresDsn,
    PostgresJobsDsn,
    RatelimitAddress,
    RetrievalAddress,
    ServiceSettings,
)

_SHA256_HEX = re.compile(r"[0-9a-fA-F]{64}")


class TenantSettings(ServiceSettings):
    """Read once, by app."""

    service_name: ClassVar[str] = "tenant"

    listen_address: ListenAddress = "127.0.0.1:7401"
    postgres_dsn: PostgresDsn = SecretStr("")
    postgres_jobs_dsn: PostgresJobsDsn = SecretStr("")
    postgres_admin_dsn: PostgresAdminDsn = SecretStr("")
    context_signing_key: SecretStr = Field(
        default=SecretStr(""), description="base64 of the 32-byte Ed25519 seed that signs context tokens; the same on every replica"
    )
    context_additional_public_keys: str = Field(
        default="", description="base64 public keys still or soon in use, comma separated: for 300 s around a change of the signing key"
    )
    operator_key_sha256: str = Field(default="", description="SHA-256 (hex) of each operator key's whole text, comma separated")
    region: str = Field(default="local", description="where this cell keeps its tenants' data")
    retrieval_address: RetrievalAddress = "127.0.0.1:7404"
    inference_address: InferenceAddress = "127.0.0.1:7403"
    ratelimit_address: RatelimitAddress = "127.0.0.1:7402"
    metering_address: MeteringAddress = "127.0.0.1:7405"
    saga_poll_seconds: float = Field(default=1.0, gt=0.0, description="pause between looks for creations and erasures that wait")
    saga_lease_seconds: float = Field(
        default=10.0, gt=0.0, le=300.0, description="how long a creation or erasure stays with a replica that does not answer any more"
    )
    saga_max_attempts: int = Field(default=20, ge=1, description="failed attempts after which a creation is undone")
    event_webhook_url: str = Field(default="", description="where events of tenants' lives are posted; empty: they are kept and not sent")
    event_webhook_secret: SecretStr = Field(
        default=SecretStr(""), description="signs the events: any text, or whsec_<base64>; needed with the URL"
    )
    event_max_attempts: int = Field(default=12, ge=1, description="deliveries after which an event is given up")
    event_poll_seconds: float = Field(default=1.0, gt=0.0, description="pause between looks for events that wait")
    smtp_url: SecretStr = Field(
        default=SecretStr(""), description="sends the welcome mail: smtp://user:password@host:port?starttls=1; empty: no mail"
    )
    smtp_from: str = Field(default="", description="the sender of the welcome mail; needed with the SMTP URL")
    retention_poll_seconds: float = Field(default=300.0, gt=0.0, description="pause between looks for tenants to purge, each once a day")

    @model_validator(mode="after")
    def _refuse_half_configured_sinks(self) -> Self:
        if self.event_webhook_url and not self.event_webhook_secret.get_secret_value():
            msg = "TENANTRY_EVENT_WEBHOOK_URL needs TENANTRY_EVENT_WEBHOOK_SECRET: an unsigned event proves nothing"
            raise ValueError(msg)
        if self.event_webhook_url and urlsplit(self.event_webhook_url).scheme not in ("http", "https"):
            msg = "TENANTRY_EVENT_WEBHOOK_URL must begin with https:// or http://"
            raise ValueError(msg)
        if self.smtp_url.get_secret_value() and (not self.smtp_from or urlsplit(self.smtp_url.get_secret_value()).scheme != "smtp"):
            msg = "TENANTRY_SMTP_URL must begin with smtp:// and needs TENANTRY_SMTP_FROM"
            raise ValueError(msg)
        return self

    @field_validator("operator_key_sha256")
    @classmethod
    def _refuse_other_hashes(cls: type[Self], value: str) -> str:
        if not all(_SHA256_HEX.fullmatch(item) for item in _items(value)):
            msg = "TENANTRY_OPERATOR_KEY_SHA256 must list SHA-256 digests of 64 hex digits"
            raise ValueError(msg)
        return value

    def operator_key_hashes(self) -> tuple[bytes, ...]:
        """Returns the digests of the operator keys."""
        return tuple(bytes.fromhex(item) for item in _items(self.operator_key_sha256))


def _items(value: str) -> list[str]:
    return [item.strip() for item in value.split(",") if item.strip()]
