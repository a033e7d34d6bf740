"""Settings of the inference service, from TENANTRY_* in the environment."""

from typing import ClassVar

from pydantic import Field, SecretStr

from services.kernel.settings import (
    DEFAULT_CREDENTIAL_OUTAGE_SECONDS,
    DEFAULT_SILO_POOLS,
    CredentialOutageSeconds,
    ListenAddress,
    MaxSiloPools,
    MeteringAddress,
    PostgresAdminDsn,
    PostgresDsn,
    PostgresJobsDsn,
    PostgresPlacementDsn,
    PostgresTransactionPooling,
    RatelimitAddress,
    RetrievalAddress,
    ServiceSettings,
    SiloMigrationDsn,
)


class InferenceSettings(ServiceSettings):
    """Read once, by the app."""

    service_name: ClassVar[str] = "inference"

    listen_address: ListenAddress = "127.0.0.1:7403"
    credential_outage_seconds: CredentialOutageSeconds = DEFAULT_CREDENTIAL_OUTAGE_SECONDS
    postgres_dsn: PostgresDsn = SecretStr("")
    postgres_transaction_pooling: PostgresTransactionPooling = False
    postgres_jobs_dsn: PostgresJobsDsn = SecretStr("")
    postgres_admin_dsn: PostgresAdminDsn = SecretStr("")
    postgres_placement_dsn: PostgresPlacementDsn = SecretStr("")
    silo_migration_dsn: SiloMigrationDsn = SecretStr("")
    max_silo_pools: MaxSiloPools = DEFAULT_SILO_POOLS
    ratelimit_address: RatelimitAddress = "127.0.0.1:7402"
    retrieval_address: RetrievalAddress = "127.0.0.1:7404"
    metering_address: MeteringAddress = "127.0.0.1:7405"
    provider_base_url: str = Field(default="", description="whatever speaks Anthropic's Messages API; empty: Anthropic's own")
    anthropic_api_key: SecretStr = Field(default=SecretStr(""), description="the provider account's key")
    provider_call_id_header: str = Field(default="", description="request header that carries the call id to the provider; empty: none")
    provider_account: str = Field(
        default="",
        max_length=100,
        description="names the account the key is of, where its own limits are shared among tenants; empty: they are not",
    )
    provider_in_flight_tokens: int = Field(
        default=192, ge=0, le=100_000, description="output a stream may bring between the decision to end it and its end at the provider"
    )
    ahead_calls_per_second: float = Field(
        default=20.0, ge=0.0, description="pace of like calls of a tenant, from which on their holds are taken before they come; 0: never"
    )
    max_holds_ahead: int = Field(default=1024, ge=0, description="holds of this process, of all tenants, that may lie ahead of calls")
    max_concurrent_provider_calls: int = Field(
        default=256, ge=1, description="provider calls under way in this process; others wait their turn"
    )
    max_waiting_calls: int = Field(default=1024, ge=0, description="calls that may wait for their turn; more are refused")
    default_call_deadline_seconds: float = Field(
        default=120.0, gt=0.0, description="the longest a call may take; a caller's shorter deadline wins"
    )
    postgres_pool_size: int = Field(default=8, ge=1, description="connections to Postgres")
