"""Settings of the metering service; read by app alone."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field, SecretStr

from services.kernel.settings import (
    DEFAULT_CREDENTIAL_OUTAGE_SECONDS,
    DEFAULT_LEASE_SECONDS,
    CredentialOutageSeconds,
    LeaseSeconds,
    ListenAddress,
    PostgresAdminDsn,
    PostgresDsn,
    PostgresJobsDsn,
    PostgresTransactionPooling,
    RatelimitAddress,
    ServiceSettings,
)

PACKAGED_PRICE_BOOK = Path(__file__).parent / "prices.yaml"


class MeteringSettings(ServiceSettings):
    """Where the ledger is, whom it tells, and how long a lease lives."""

    service_name: ClassVar[str] = "metering"

    listen_address: ListenAddress = "127.0.0.1:7405"
    credential_outage_seconds: CredentialOutageSeconds = DEFAULT_CREDENTIAL_OUTAGE_SECONDS
    postgres_dsn: PostgresDsn = SecretStr("")
    postgres_transaction_pooling: PostgresTransactionPooling = False
    postgres_jobs_dsn: PostgresJobsDsn = SecretStr("")
    postgres_admin_dsn: PostgresAdminDsn = SecretStr("")
    postgres_read_dsn: SecretStr = Field(
        default=SecretStr(""),
        description="a read replica of the same database, logging in as metering_service, for `QueryUsage`; empty: the primary",
    )
    postgres_jobs_read_dsn: SecretStr = Field(
        default=SecretStr(""), description="the same replica, logging in as metering_jobs, for `QueryUsageOfTenants`; empty: the primary"
    )
    ratelimit_address: RatelimitAddress = "127.0.0.1:7402"
    price_book_path: Path = Field(default=PACKAGED_PRICE_BOOK, description="the price book, YAML; read by `migrate`")
    lease_seconds: LeaseSeconds = DEFAULT_LEASE_SECONDS
    sweep_seconds: float = Field(default=1.0, gt=0.0, description="pause between looks for lapsed calls")
    usage_fold_seconds: float = Field(
        default=1.0, gt=0.0, description="pause between folds of changes into sums of use; answers have them all, folded or not"
    )
    relay_poll_seconds: float = Field(default=1.0, gt=0.0, description="pause between looks for ends the limits have not taken")
