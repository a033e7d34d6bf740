"""What the retrieval service is told by its environment."""

from typing import ClassVar

from pydantic import Field, SecretStr

from services.kernel.settings import (
    DEFAULT_CREDENTIAL_OUTAGE_SECONDS,
    DEFAULT_SILO_POOLS,
    CredentialOutageSeconds,
    ListenAddress,
    MaxSiloPools,
    PostgresAdminDsn,
    PostgresDsn,
    PostgresJobsDsn,
    PostgresPlacementDsn,
    PostgresTransactionPooling,
    ServiceSettings,
    SiloMigrationDsn,
)


class RetrievalSettings(ServiceSettings):
    """Settings of the retrieval service, from TENANTRY_*."""

    service_name: ClassVar[str] = "retrieval"

    listen_address: ListenAddress = "127.0.0.1:7404"
    credential_outage_seconds: CredentialOutageSeconds = DEFAULT_CREDENTIAL_OUTAGE_SECONDS
    postgres_dsn: PostgresDsn = SecretStr("")
    postgres_transaction_pooling: PostgresTransactionPooling = False
    postgres_jobs_dsn: PostgresJobsDsn = SecretStr("")
    postgres_admin_dsn: PostgresAdminDsn = SecretStr("")
    postgres_placement_dsn: PostgresPlacementDsn = SecretStr("")
    silo_migration_dsn: SiloMigrationDsn = SecretStr("")
    max_silo_pools: MaxSiloPools = DEFAULT_SILO_POOLS
    qdrant_url: str = Field(default="http://127.0.0.1:7416", description="Qdrant's gRPC port; https for TLS")
    qdrant_api_key: SecretStr = Field(default=SecretStr(""), description="the key with full rights; signs each tenant's own token")
