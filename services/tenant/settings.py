"""The tenant service's settings. Refuses keys and hashes it could not use, without repeating them."""

import re
from typing import ClassVar, Self

from pydantic import Field, SecretStr, field_validator

from services.kernel.settings import (
    InferenceAddress,
    ListenAddress,
    MeteringAddress,
    PostgresAdminDsn,
    PostgresDsn,
    PostgresPlacementDsn,
    RatelimitAddress,
    RetrievalAddress,
    ServiceSettings,
    SiloAdminDsn,
)

_SHA256_HEX = re.compile(r"[0-9a-fA-F]{64}")


class TenantSettings(ServiceSettings):
    """Read once, by app."""

    service_name: ClassVar[str] = "tenant"

    listen_address: ListenAddress = "127.0.0.1:7401"
    postgres_dsn: PostgresDsn = SecretStr("")
    postgres_admin_dsn: PostgresAdminDsn = SecretStr("")
    context_signing_key: SecretStr = Field(
        default=SecretStr(""), description="base64 of the 32-byte Ed25519 seed that signs context tokens; the same on every replica"
    )
    context_additional_public_keys: str = Field(
        default="", description="base64 public keys still or soon in use, comma separated: for 300 s around a change of the signing key"
    )
    operator_key_sha256: str = Field(default="", description="SHA-256 (hex) of each operator key's whole text, comma separated")
    master_key: SecretStr = Field(
        default=SecretStr(""), description="base64 of the 32 bytes that tenants' secrets are sealed under; the same on every replica"
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
