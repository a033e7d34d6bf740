"""Settings of the inference service, from TENANTRY_* in the environment."""

from typing import ClassVar

from pydantic import Field, SecretStr

from services.kernel.settings import ServiceSettings


class InferenceSettings(ServiceSettings):
    """Read once, by the app."""

    service_name: ClassVar[str] = "inference"

    listen_address: str = "127.0.0.1:7403"
    postgres_dsn: SecretStr = SecretStr("")
    postgres_jobs_dsn: SecretStr = SecretStr("")
    postgres_admin_dsn: SecretStr = SecretStr("")
    ratelimit_address: str = "127.0.0.1:7402"
    retrieval_address: str = "127.0.0.1:7404"
    metering_address: str = "127.0.0.1:7405"
    # Empty is Anthropic's own.
    provider_base_url: str = ""
    anthropic_api_key: SecretStr = SecretStr("")
    # The request header that carries the call id to the provider; empty sends none.
    provider_call_id_header: str = ""
    max_concurrent_provider_calls: int = Field(default=256, ge=1)
    max_waiting_calls: int = Field(default=1024, ge=0)
    default_call_deadline_seconds: float = Field(default=120.0, gt=0.0)
    postgres_pool_size: int = Field(default=8, ge=1)
