"""What the retrieval service is told by its environment."""

from typing import ClassVar

from pydantic import SecretStr

from services.kernel.settings import ServiceSettings


class RetrievalSettings(ServiceSettings):
    """Settings of the retrieval service, from TENANTRY_*."""

    service_name: ClassVar[str] = "retrieval"

    listen_address: str = "127.0.0.1:7404"
    postgres_dsn: SecretStr = SecretStr("")
    postgres_jobs_dsn: SecretStr = SecretStr("")
    postgres_admin_dsn: SecretStr = SecretStr("")
    qdrant_url: str = "http://127.0.0.1:7416"
    qdrant_api_key: SecretStr = SecretStr("")
