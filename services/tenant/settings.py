"""The tenant service's settings. Refuses keys and hashes it could not use, without repeating them."""

import re
from typing import ClassVar, Self

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from services.kernel.settings import (
    InferenceAddress,
    ListenAddress,
    MeteringAddress,
    PostgresAdminDsn,
    PostgresDsn,
    PostgresTransactionPooling,
    RatelimitAddress,
    RetrievalAddress,
    ServiceSettings,
)
from services.tenant.domain_name import read_base_domains
from services.tenant.key_management import parse_master_keys

_SHA256_HEX = re.compile(r"[0-9a-fA-F]{64}")


class TenantSettings(ServiceSettings):
    """Read once, by app."""

    service_name: ClassVar[str] = "tenant"

    listen_address: ListenAddress = "127.0.0.1:7401"
    postgres_dsn: PostgresDsn = SecretStr("")
    postgres_transaction_pooling: PostgresTransactionPooling = False
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
    region: str = Field(default="local", description="where this cell keeps its tenants' data")
    retrieval_address: RetrievalAddress = "127.0.0.1:7404"
    inference_address: InferenceAddress = "127.0.0.1:7403"
    ratelimit_address: RatelimitAddress = "127.0.0.1:7402"
    metering_address: MeteringAddress = "127.0.0.1:7405"

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
