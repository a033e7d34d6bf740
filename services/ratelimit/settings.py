"""What the ratelimit service is told by its environment. Read only by app."""

from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, field_validator

from services.kernel.settings import (
    DEFAULT_CREDENTIAL_OUTAGE_SECONDS,
    DEFAULT_LEASE_SECONDS,
    CredentialOutageSeconds,
    LeaseSeconds,
    ListenAddress,
    MeteringAddress,
    ServiceSettings,
)


class ProviderAccount(BaseModel):
    """What a provider allows one account in a minute. 0: unlimited."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: int = Field(default=0, ge=0, le=1_000_000_000)
    input_tokens_per_minute: int = Field(default=0, ge=0, le=1_000_000_000_000)
    output_tokens_per_minute: int = Field(default=0, ge=0, le=1_000_000_000_000)


# Part of keys in the store, whose slot is what stands between braces.
ProviderAccountName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,99}$")]


class RatelimitSettings(ServiceSettings):
    """Its own on top of every service's."""

    service_name: ClassVar[str] = "ratelimit"

    listen_address: ListenAddress = "127.0.0.1:7402"
    credential_outage_seconds: CredentialOutageSeconds = DEFAULT_CREDENTIAL_OUTAGE_SECONDS
    metering_address: MeteringAddress = "127.0.0.1:7405"
    lease_seconds: LeaseSeconds = DEFAULT_LEASE_SECONDS
    redis_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:7412/0"), description="Redis, with its password; rediss:// for TLS; eviction must be off"
    )
    provider_accounts: dict[ProviderAccountName, ProviderAccount] = Field(
        default={},
        description="the limits of each account at a provider, shared among tenants by their weight: a JSON object of name to "
        '{"requests_per_minute", "input_tokens_per_minute", "output_tokens_per_minute"}; 0 or absent is unlimited',
    )
    redis_cluster: bool = Field(default=False, description="whether the URL names a node of a Redis Cluster")
    redis_connections: int = Field(default=2, ge=1, le=64, description="connections for decisions; each carries one batch at a time")
    redis_timeout_seconds: float = Field(default=0.04, gt=0.0, le=5.0, description="how long a decision waits for Redis")

    @field_validator("redis_url")
    @classmethod
    def _refuse_other_schemes(cls: type[Self], value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(("redis://", "rediss://")):
            msg = "TENANTRY_REDIS_URL must begin with redis:// or rediss://"
            raise ValueError(msg)
        return value
