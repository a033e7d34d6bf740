"""Settings of the metering service; read by app alone."""

from pathlib import Path
from typing import ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

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
    is_loopback,
)
from services.kernel.webhook_signing import read_webhook_secret
from services.metering.billing.periods import LATE_USE
from services.metering.reconciliation.bucket import BucketWidth
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
    price_book_path: Path = Field(
        default=PACKAGED_PRICE_BOOK, description="the price book, YAML; read by `migrate`, `preview-price-book` and `LoadPriceBook`"
    )
    billing_plans_path: Path = Field(
        default=PACKAGED_BILLING_PLANS, description="what plans charge, YAML; read by `migrate` and `preview-billing-plans`"
    )
    invoice_grace_hours: float = Field(default=48.0, ge=0.0, description="a billing period is closed by itself this long after its end")
    invoice_poll_seconds: float = Field(default=300.0, gt=0.0, description="pause between looks for periods to close")
    reconciliation_feed: Literal["none", "anthropic", "requests"] = Field(
        default="none",
        description="the provider's own account of usage: Anthropic's usage and cost report, a feed of single requests, or none",
    )
    reconciliation_url: str = Field(
        default="", description="the server of the report, empty: Anthropic's own; or the URL of the feed of requests"
    )
    reconciliation_api_key: SecretStr = Field(
        default=SecretStr(""), description="the key for it; for Anthropic's report an Admin API key, which is not the key of calls"
    )
    reconciliation_accounts: dict[str, tuple[str, ...]] = Field(
        default={},
        description='the accounts that are compared: `{"<TENANTRY_PROVIDER_ACCOUNT of inference>": ["<id of a key or workspace>", …]}`; '
        "empty: all of the feed is one",
    )
    reconciliation_bucket: BucketWidth = Field(default=BucketWidth.HOUR, description="how much time one report is of: 1m, 1h or 1d of UTC")
    reconciliation_lag_seconds: float = Field(
        default=3600.0, ge=0.0, description="how long after a bucket's end a report of sums is taken to hold all of it"
    )
    reconciliation_poll_seconds: float = Field(
        default=0.0, ge=0.0, description="pause between reconciliations that begin by themselves; 0: they begin when an operator asks"
    )
    reconciliation_lookback_hours: float = Field(
        default=48.0, gt=0.0, le=1000.0, description="how far back those look for buckets without a complete report"
    )
    reconciliation_drift_nano_usd: int = Field(
        default=10_000_000, ge=0, description="a drift over this amount, and over the share below, raises the alarm; nano-USD"
    )
    reconciliation_drift_per_million: int = Field(
        default=10_000, ge=0, le=1_000_000, description="the share of what the larger side says, in millionths"
    )
    otlp_metrics_endpoint: str = Field(
        default="", description="where counters are sent over OTLP/gRPC, such as http://127.0.0.1:4317; empty: nowhere"
    )
    lease_seconds: LeaseSeconds = DEFAULT_LEASE_SECONDS
    sweep_seconds: float = Field(
        default=1.0, gt=0.0, description="longest pause between looks for lapsed calls; a lease that ends sooner is looked at then"
    )
    event_retention_days: int = Field(
        default=400,
        ge=LATE_USE.days,
        description="how long events of a month, and counts of refusals, are kept one by one after its end; their sums are kept for ever, "
        "and a month until every tenant in it has closed it",
    )
    rerating_resume_seconds: float = Field(
        default=60.0, gt=0.0, description="a re-rating that nobody went on with for so long is ended by the service; how often it looks"
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

    @field_validator("webhook_seal_keys")
    @classmethod
    def _refuse_other_seal_keys(cls: type[Self], value: SecretStr) -> SecretStr:
        try:
            parse_seal_keys(value.get_secret_value())
        except ValueError as error:
            msg = f"TENANTRY_WEBHOOK_SEAL_KEYS {error}"
            raise ValueError(msg) from None
        return value

    @model_validator(mode="after")
    def _refuse_half_configured_feed(self) -> Self:
        if self.reconciliation_feed == "none":
            return self
        if not self.reconciliation_api_key.get_secret_value():
            msg = f"TENANTRY_RECONCILIATION_FEED={self.reconciliation_feed} needs TENANTRY_RECONCILIATION_API_KEY"
            raise ValueError(msg)
        url = urlsplit(self.reconciliation_url)
        is_ours = self.reconciliation_feed == "anthropic" and not self.reconciliation_url
        if not is_ours and not (url.scheme == "https" or (url.scheme == "http" and is_loopback(f"{url.hostname}:0"))):
            msg = "TENANTRY_RECONCILIATION_URL must be https://, or http:// on loopback: a key goes there"
            raise ValueError(msg)
        return self

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
