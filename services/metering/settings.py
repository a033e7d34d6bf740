"""Settings of the metering service; read by app alone."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, SecretStr, field_validator

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
from services.metering.webhooks.secrets import parse_seal_keys

PACKAGED_PRICE_BOOK = Path(__file__).parent / "prices.yaml"
PACKAGED_BILLING_PLANS = Path(__file__).parent / "billing_plans.yaml"


class MeteringSettings(ServiceSettings):
    """Where the ledger is, whom it tells, and how long a lease lives."""

    service_name: ClassVar[str] = "metering"

    listen_address: ListenAddress = "127.0.0.1:7405"
    credential_outage_seconds: CredentialOutageSeconds = DEFAULT_CREDENTIAL_OUTAGE_SECONDS
    postgres_dsn: PostgresDsn = SecretStr("")
    postgres_transaction_pooling: PostgresTransactionPooling = False
    postgres_jobs_dsn: PostgresJobsDsn = SecretStr("")
    postgres_admin_dsn: PostgresAdminDsn = SecretStr("")
    postgres_partitions_dsn: SecretStr = Field(
        default=SecretStr(""),
        description="Postgres, logging in as metering_partitions, for making and dropping months of events; empty: `migrate` makes them, "
        "two ahead, and none is dropped",
    )
    postgres_read_dsn: SecretStr = Field(
        default=SecretStr(""),
        description="a read replica of the same database, logging in as metering_service, for `QueryUsage`; empty: the primary",
    )
    postgres_jobs_read_dsn: SecretStr = Field(
        default=SecretStr(""), description="the same replica, logging in as metering_jobs, for `QueryUsageOfTenants`; empty: the primary"
    )
    ratelimit_address: RatelimitAddress = "127.0.0.1:7402"
    price_book_path: Path = Field(default=PACKAGED_PRICE_BOOK, description="the price book, YAML; read by `migrate`")
    billing_plans_path: Path = Field(
        default=PACKAGED_BILLING_PLANS, description="what plans charge, YAML; read by `migrate` and `preview-billing-plans`"
    )
    invoice_grace_hours: float = Field(default=48.0, ge=0.0, description="a billing period is closed by itself this long after its end")
    invoice_poll_seconds: float = Field(default=300.0, gt=0.0, description="pause between looks for periods to close")
    lease_seconds: LeaseSeconds = DEFAULT_LEASE_SECONDS
    sweep_seconds: float = Field(default=1.0, gt=0.0, description="pause between looks for lapsed calls")
    event_retention_days: int = Field(
        default=400, ge=62, description="how long a month is kept that has no events; one that has is kept for ever"
    )
    usage_fold_seconds: float = Field(
        default=1.0, gt=0.0, description="pause between folds of changes into sums of use; answers have them all, folded or not"
    )
    budget_poll_seconds: float = Field(default=0.2, gt=0.0, description="pause between looks at budgets whose usage changed")
    webhook_seal_keys: SecretStr = Field(
        default=SecretStr(""),
        description="seals the secrets of tenants' receivers: version:base64 of 32 bytes, comma separated, the first seals, the others "
        "only open; empty: nobody can make a receiver",
    )
    webhook_private_addresses: bool = Field(
        default=False, description="whether receivers may be at private, link-local or loopback addresses, and there without TLS"
    )
    webhook_max_attempts: int = Field(default=24, ge=1, description="attempts after which a delivery is given up: 24 take some 9 hours")
    webhook_poll_seconds: float = Field(default=0.5, gt=0.0, description="pause between looks for deliveries that wait")
    webhook_history_days: int = Field(default=30, ge=1, description="days that ended deliveries are kept")
    relay_poll_seconds: float = Field(default=1.0, gt=0.0, description="pause between looks for ends the limits have not taken")

    @field_validator("webhook_seal_keys")
    @classmethod
    def _refuse_other_seal_keys(cls: type[Self], value: SecretStr) -> SecretStr:
        try:
            parse_seal_keys(value.get_secret_value())
        except ValueError as error:
            msg = f"TENANTRY_WEBHOOK_SEAL_KEYS {error}"
            raise ValueError(msg) from None
        return value
