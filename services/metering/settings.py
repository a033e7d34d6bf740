"""Settings of the metering service; read by app alone."""

from pathlib import Path
from typing import ClassVar, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator

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
from services.kernel.webhook_signing import read_webhook_secret

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
    stripe_secret_key: SecretStr = Field(
        default=SecretStr(""), description="Stripe's secret or restricted key, for meter events; empty: what is to be told there waits"
    )
    stripe_url: str = Field(default="https://api.stripe.com", description="Stripe's API, or what stands for it")
    export_endpoint_url: str = Field(
        default="", description="where use is told as CloudEvents, once `SetEndpointExport` turned it on; empty: what is to be told waits"
    )
    export_endpoint_secret: SecretStr = Field(
        default=SecretStr(""), description="signs them: whsec_<base64> of at least 24 bytes, or any text as long; needed with the URL"
    )
    export_max_attempts: int = Field(default=24, ge=1, description="attempts after which an export is given up")
    export_poll_seconds: float = Field(default=1.0, gt=0.0, description="pause between looks for exports that wait")
    relay_poll_seconds: float = Field(default=1.0, gt=0.0, description="pause between looks for ends the limits have not taken")

    def export_signing_key(self) -> bytes:
        """Returns the key that signs what the endpoint is told. Raises: ValueError when the secret holds none."""
        try:
            return read_webhook_secret(self.export_endpoint_secret.get_secret_value())
        except ValueError as error:
            msg = f"TENANTRY_EXPORT_ENDPOINT_SECRET {error}"
            raise ValueError(msg) from None

    @model_validator(mode="after")
    def _refuse_half_configured_exports(self) -> Self:
        for name, url in (("STRIPE_URL", self.stripe_url), ("EXPORT_ENDPOINT_URL", self.export_endpoint_url)):
            if url and urlsplit(url).scheme not in ("http", "https"):
                msg = f"TENANTRY_{name} must begin with https:// or http://"
                raise ValueError(msg)
        if self.export_endpoint_url:
            self.export_signing_key()
        return self
