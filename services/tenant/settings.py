"""The tenant service's settings. Refuses keys and hashes it could not use, without repeating them."""

import re
from typing import ClassVar, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator

from services.kernel.settings import (
    InferenceAddress,
    ListenAddress,
    MeteringAddress,
    PostgresAdminDsn,
    PostgresDsn,
    PostgresJobsDsn,
    PostgresPlacementDsn,
    PostgresTransactionPooling,
    RatelimitAddress,
    RetrievalAddress,
    ServiceSettings,
    SiloAdminDsn,
)
from services.kernel.webhook_signing import read_webhook_secret
from services.tenant.domain_name import read_base_domains
from services.tenant.key_management import parse_master_keys

_SHA256_HEX = re.compile(r"[0-9a-fA-F]{64}")


class TenantSettings(ServiceSettings):
    """Read once, by app."""

    service_name: ClassVar[str] = "tenant"

    listen_address: ListenAddress = "127.0.0.1:7401"
    postgres_dsn: PostgresDsn = SecretStr("")
    postgres_transaction_pooling: PostgresTransactionPooling = False
    postgres_jobs_dsn: PostgresJobsDsn = SecretStr("")
    postgres_admin_dsn: PostgresAdminDsn = SecretStr("")
    context_signing_key: SecretStr = Field(
        default=SecretStr(""), description="base64 of the 32-byte Ed25519 seed that signs context tokens; the same on every replica"
    )
    context_additional_public_keys: str = Field(
        default="", description="base64 public keys still or soon in use, comma separated: for 300 s around a change of the signing key"
    )
    operator_key_sha256: str = Field(default="", description="SHA-256 (hex) of each operator key's whole text, comma separated")
    front_key_sha256: str = Field(
        default="", description="SHA-256 (hex) of each key's whole text by which a front end may ask ResolveTenant, comma separated"
    )
    base_domains: str = Field(
        default="", description="domains under which <slug>.<domain> names a tenant, comma separated; empty: no host does by itself"
    )
    jwks_private_addresses: bool = Field(
        default=False, description="whether the JWKS of an issuer may be at a private, link-local or loopback address"
    )
    key_store_dsn: SecretStr = Field(
        default=SecretStr(""),
        description="the key store, apart from the data and its backups, logging in as tenant_keys_service",
    )
    key_store_admin_dsn: SecretStr = Field(
        default=SecretStr(""), description="the key store, as a role that may create roles and schemas; for `migrate` alone"
    )
    master_keys: SecretStr = Field(
        default=SecretStr(""),
        description="master keys as id:base64 of 32 bytes, comma separated: the first wraps new data keys, the others only unwrap",
    )
    postgres_placement_dsn: PostgresPlacementDsn = SecretStr("")
    silo_admin_dsn: SiloAdminDsn = SecretStr("")
    move_grace_seconds: float = Field(
        default=60.0, ge=0.0, description="how long what a moved tenant left behind is kept, for calls that still look there"
    )
    max_bridge_schemas: int = Field(default=500, ge=0, description="tenants with a schema of their own in the shared database, at most")
    retrieval_address: RetrievalAddress = "127.0.0.1:7404"
    inference_address: InferenceAddress = "127.0.0.1:7403"
    ratelimit_address: RatelimitAddress = "127.0.0.1:7402"
    metering_address: MeteringAddress = "127.0.0.1:7405"
    saga_poll_seconds: float = Field(default=1.0, gt=0.0, description="pause between looks for creations and erasures that wait")
    saga_lease_seconds: float = Field(
        default=10.0, gt=0.0, le=300.0, description="how long a creation or erasure stays with a replica that does not answer any more"
    )
    saga_max_attempts: int = Field(default=20, ge=1, description="failed attempts after which a creation is undone")
    history_days: int = Field(
        default=90, ge=0, description="days that ended creations and erasures and delivered events are kept; 0: for ever"
    )
    event_webhook_url: str = Field(default="", description="where events of tenants' lives are posted; empty: they are kept and not sent")
    event_webhook_secret: SecretStr = Field(
        default=SecretStr(""), description="signs the events: whsec_<base64> of at least 24 bytes, or any text as long; needed with the URL"
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
        if self.event_webhook_secret.get_secret_value():
            self.webhook_signing_key()
        if self.event_webhook_url and urlsplit(self.event_webhook_url).scheme not in ("http", "https"):
            msg = "TENANTRY_EVENT_WEBHOOK_URL must begin with https:// or http://"
            raise ValueError(msg)
        if self.smtp_url.get_secret_value() and (not self.smtp_from or urlsplit(self.smtp_url.get_secret_value()).scheme != "smtp"):
            msg = "TENANTRY_SMTP_URL must begin with smtp:// and needs TENANTRY_SMTP_FROM"
            raise ValueError(msg)
        return self

    @field_validator("operator_key_sha256", "front_key_sha256")
    @classmethod
    def _refuse_other_hashes(cls: type[Self], value: str, info: ValidationInfo) -> str:
        if not all(_SHA256_HEX.fullmatch(item) for item in _items(value)):
            msg = f"TENANTRY_{(info.field_name or '').upper()} must list SHA-256 digests of 64 hex digits"
            raise ValueError(msg)
        return value

    @field_validator("base_domains")
    @classmethod
    def _refuse_other_names(cls: type[Self], value: str) -> str:
        try:
            read_base_domains(_items(value))
        except ValueError as error:
            msg = f"TENANTRY_BASE_DOMAINS must list host names: {error}"
            raise ValueError(msg) from None
        return value

    def webhook_signing_key(self) -> bytes:
        """Returns the key that signs events. Raises: ValueError when the secret holds none."""
        try:
            return read_webhook_secret(self.event_webhook_secret.get_secret_value())
        except ValueError as error:
            msg = f"TENANTRY_EVENT_WEBHOOK_SECRET {error}"
            raise ValueError(msg) from None

    def base_domain_names(self) -> tuple[str, ...]:
        """Returns the base domains in lower-case ASCII."""
        return read_base_domains(_items(self.base_domains))

    def front_key_hashes(self) -> tuple[bytes, ...]:
        """Returns the digests of the front ends' keys."""
        return tuple(bytes.fromhex(item) for item in _items(self.front_key_sha256))

    @field_validator("master_keys")
    @classmethod
    def _refuse_other_master_keys(cls: type[Self], value: SecretStr) -> SecretStr:
        try:
            parse_master_keys(value.get_secret_value())
        except ValueError as error:
            msg = f"TENANTRY_MASTER_KEYS {error}"
            raise ValueError(msg) from None
        return value

    def operator_key_hashes(self) -> tuple[bytes, ...]:
        """Returns the digests of the operator keys."""
        return tuple(bytes.fromhex(item) for item in _items(self.operator_key_sha256))


def _items(value: str) -> list[str]:
    return [item.strip() for item in value.split(",") if item.strip()]
