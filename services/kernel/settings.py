"""Settings every service has, from TENANTRY_* in the environment. Refuses plaintext on anything but loopback."""

import ipaddress
from typing import Annotated, ClassVar, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

# Names shared by several services mean the same in each: their words stand here once.
ListenAddress = Annotated[str, Field(description="host:port to serve on; beyond loopback only with TLS")]
PostgresDsn = Annotated[SecretStr, Field(description="Postgres, logging in as <service>_service")]
PostgresJobsDsn = Annotated[SecretStr, Field(description="Postgres, logging in as <service>_jobs, for work over all tenants")]
PostgresTransactionPooling = Annotated[
    bool, Field(description="true when the DSNs lead to a pooler in transaction mode, such as PgBouncer; `migrate` always goes past it")
]
PostgresAdminDsn = Annotated[SecretStr, Field(description="Postgres, as a role that may create roles and schemas; for `migrate` alone")]
PostgresPlacementDsn = Annotated[
    SecretStr, Field(description="Postgres, logging in as <service>_placement, for making what tenants outside the pool have of their own")
]
SiloAdminDsn = Annotated[
    SecretStr, Field(description="Postgres server of tenants with a database of their own, as a role that may create databases and roles")
]
SiloMigrationDsn = Annotated[
    SecretStr, Field(description="the same server, as a role that may become each database's owner; for `migrate` alone, and empty: none")
]
MaxSiloPools = Annotated[
    int, Field(ge=1, description="connection pools to databases of single tenants in this process; the one unused for longest makes room")
]
DEFAULT_SILO_POOLS = 50
RatelimitAddress = Annotated[str, Field(description="the ratelimit service")]
InferenceAddress = Annotated[str, Field(description="the inference service")]
RetrievalAddress = Annotated[str, Field(description="the retrieval service")]
MeteringAddress = Annotated[str, Field(description="the metering service")]

LeaseSeconds = Annotated[
    float, Field(gt=0.0, le=60.0, description="how long a hold and its open call live without being renewed; the same at both services")
]
DEFAULT_LEASE_SECONDS = 5.0

CredentialOutageSeconds = Annotated[
    float,
    Field(
        ge=0.0,
        le=300.0,
        description="how long known credentials go on working while the tenant service does not answer; 0 refuses them at once",
    ),
]
DEFAULT_CREDENTIAL_OUTAGE_SECONDS = 300.0


class ServiceSettings(BaseSettings):
    """Read once, by a service's app. One environment name means the same in every service."""

    model_config = SettingsConfigDict(env_prefix="TENANTRY_", extra="ignore", frozen=True)

    service_name: ClassVar[str] = ""

    listen_address: ListenAddress = "127.0.0.1:0"
    health_address: str = Field(
        default="", description="host:port of a second, plaintext port that answers health checks alone; empty: none"
    )
    tls_cert_file: str = Field(default="", description="this service's certificate chain, PEM; with the other two files, or none of them")
    tls_key_file: str = Field(default="", description="the certificate's private key, PEM")
    tls_ca_file: str = Field(default="", description="the authority every peer's certificate must be signed by, PEM")
    service_token: SecretStr = Field(
        default=SecretStr(""), description="the bearer by which this service proves itself to the others on loopback"
    )
    peer_token_hashes: str = Field(
        default="", description="whose bearers are known on loopback: tenant=<sha256 hex>,inference=<sha256 hex>,…"
    )
    otlp_endpoint: str = Field(
        default="", description="where traces are sent over OTLP/gRPC, such as http://127.0.0.1:4317; empty: nowhere"
    )
    trace_sample_ratio: float = Field(default=1.0, ge=0.0, le=1.0, description="share of calls that begin a sampled trace here, 0 to 1")
    log_level: str = Field(default="INFO", description="DEBUG, INFO, WARNING or ERROR")
    drain_seconds: float = Field(default=25.0, ge=0.0, description="how long calls may go on after SIGTERM")
    endpoint_removal_seconds: float = Field(
        default=0.0, ge=0.0, description="pause between NOT_SERVING and the end of listening, for the pod to leave its endpoints"
    )
    max_connection_age_seconds: float = Field(default=300.0, gt=0.0, description="after this a client connects anew and sees new replicas")
    max_message_bytes: int = Field(default=4 * 1024 * 1024, ge=1024, description="largest message taken or sent")
    tenant_address: Annotated[str, Field(description="the tenant service")] = "127.0.0.1:7401"
    region: str = Field(default="local", description="where this cell keeps its tenants' data; tenants of another region are refused")
    cells: str = Field(default="", description="where other regions' tenants are served: eu-west=eu.example:443,…")

    @property
    def tls_enabled(self) -> bool:
        """True when this process serves and calls with TLS."""
        return bool(self.tls_cert_file)

    def peer_hashes(self) -> dict[str, bytes]:
        """Returns service name → SHA-256 of the bearer that service presents on loopback."""
        pairs = (item.strip().partition("=") for item in self.peer_token_hashes.split(",") if item.strip())
        return {name.strip(): bytes.fromhex(digest.strip()) for name, _, digest in pairs}

    def cell_addresses(self) -> dict[str, str]:
        """Returns region → address of the cell that serves it."""
        pairs = (item.strip().partition("=") for item in self.cells.split(",") if item.strip())
        return {region.strip(): address.strip() for region, _, address in pairs}

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
        if not all(region and address for region, address in self.cell_addresses().items()):
            msg = "TENANTRY_CELLS must read like eu-west=eu.example:443,us-east=us.example:443"
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
