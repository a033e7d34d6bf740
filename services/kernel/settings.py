"""Settings every service has, from TENANTRY_* in the environment. Refuses plaintext on anything but loopback."""

import ipaddress
from typing import ClassVar, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServiceSettings(BaseSettings):
    """Read once, by a service's app. One environment name means the same in every service."""

    model_config = SettingsConfigDict(env_prefix="TENANTRY_", extra="ignore", frozen=True)

    service_name: ClassVar[str] = ""

    listen_address: str = "127.0.0.1:0"
    health_address: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""
    tls_ca_file: str = ""
    service_token: SecretStr = SecretStr("")
    peer_token_hashes: str = ""
    otlp_endpoint: str = ""
    trace_sample_ratio: float = Field(default=1.0, ge=0.0, le=1.0)
    log_level: str = "INFO"
    drain_seconds: float = Field(default=25.0, ge=0.0)
    # Between health NOT_SERVING and the end of listening: the time Kubernetes needs to take the pod out of its endpoints.
    endpoint_removal_seconds: float = Field(default=0.0, ge=0.0)
    max_connection_age_seconds: float = Field(default=300.0, gt=0.0)
    max_message_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    tenant_address: str = "127.0.0.1:7401"

    @property
    def tls_enabled(self) -> bool:
        """True when this process serves and calls with TLS."""
        return bool(self.tls_cert_file)

    def peer_hashes(self) -> dict[str, bytes]:
        """Returns service name → SHA-256 of the bearer that service presents on loopback."""
        pairs = (item.strip().partition("=") for item in self.peer_token_hashes.split(",") if item.strip())
        return {name.strip(): bytes.fromhex(digest.strip()) for name, _, digest in pairs}

    @model_validator(mode="after")
    def _refuse_half_configured_trust(self) -> Self:
        files = (self.tls_cert_file, self.tls_key_file, self.tls_ca_file)
        if any(files) and not all(files):
            msg = "TLS needs all three of TENANTRY_TLS_CERT_FILE, TENANTRY_TLS_KEY_FILE and TENANTRY_TLS_CA_FILE, or none of them"
            raise ValueError(msg)
        if not all(files) and not is_loopback(self.listen_address):
            msg = (
                f"TENANTRY_LISTEN_ADDRESS={self.listen_address} is not loopback: set TENANTRY_TLS_CERT_FILE, TENANTRY_TLS_KEY_FILE "
                "and TENANTRY_TLS_CA_FILE, or listen on 127.0.0.1"
            )
            raise ValueError(msg)
        for name, digest in self.peer_hashes().items():
            if not name or len(digest) != 32:
                msg = "TENANTRY_PEER_TOKEN_HASHES must read like tenant=<sha256 hex>,inference=<sha256 hex>"
                raise ValueError(msg)
        return self


def is_loopback(address: str) -> bool:
    """Tells whether a host:port can be reached from this machine only."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
