"""The environment each service of the embedded stack is started with: the same variables a deployment sets."""

import hashlib
import json
import os
from dataclasses import dataclass

from devstack.addresses import Ports
from devstack.certificates import DevelopmentCertificates
from devstack.event_receiver import PATH as EVENTS_PATH
from devstack.ports import LOOPBACK
from devstack.state import SERVICES, StackState

DATABASE = "tenantry"
# Resolves to this machine without any name server.
BASE_DOMAIN = "tenantry.localhost"
# Apart from the data, as in a deployment, so that a backup of the data holds no key.
KEY_DATABASE = "tenantry_keys"
KEY_ROLE = "tenant_keys"
# The stub takes these beside the house's key: what a tenant that brings its own key would bring.
TENANTS_OWN_KEYS = ("sk-stub-a-tenants-own-key", "sk-stub-another-tenants-own-key")
# The house's account at the provider: more than this machine can call, so nobody is refused, and every call takes its share all the same.
PROVIDER_ACCOUNT = "house"
ACCOUNT_LIMITS = {"requests_per_minute": 600_000, "input_tokens_per_minute": 2_000_000_000, "output_tokens_per_minute": 400_000_000}
RECONCILIATION_POLL_SECONDS = 60
WITH_POSTGRES = frozenset({"tenant", "inference", "retrieval", "metering"})
# They make schemas and tables of tenants that live outside the pool.
WITH_PLACEMENT_ROLE = frozenset({"tenant", "inference", "retrieval"})
# It makes and drops the months of events.
WITH_PARTITIONS_ROLE = frozenset({"metering"})
WITH_JOBS_ROLE = frozenset({"inference", "metering", "retrieval", "tenant"})


@dataclass(frozen=True, slots=True)
class Provider:
    """Which model provider the mesh calls."""

    base_url: str
    api_key: str
    is_stub: bool

    @classmethod
    def choose(cls, state: StackState, ports: Ports) -> "Provider":
        """Returns the real Anthropic API when `ANTHROPIC_API_KEY` is set, else the stub."""
        real_key = os.environ.get("ANTHROPIC_API_KEY", "")
        if real_key:
            return cls("", real_key, is_stub=False)
        return cls(f"http://{ports.address('provider')}", state.secrets.provider_api_key, is_stub=True)


@dataclass(frozen=True, slots=True)
class Wiring:
    """How the parts are joined: plain or by certificates, to Postgres at once or through PgBouncer. Nothing of it is remembered."""

    certificates: DevelopmentCertificates | None = None
    pgbouncer: bool = False
    # Whether a receiver takes the webhooks of tenants' lives; without one they are kept and not sent.
    events: bool = False
    # Whether the ledger is compared with the provider stub's by itself; an operator may ask for it anyhow.
    reconciles: bool = False

    def postgres_port(self, ports: Ports) -> int:
        """Where the services find Postgres; migrations always go to the server itself."""
        return ports.pgbouncer if self.pgbouncer else ports.postgres


PLAIN = Wiring()


def role_dsn(state: StackState, ports: Ports, service: str, role: str, database: str = DATABASE, *, wiring: Wiring = PLAIN) -> str:
    """Returns the DSN by which a service logs in as one of its roles."""
    return f"postgresql://{service}_{role}:{state.secrets.role_passwords[service]}@{LOOPBACK}:{wiring.postgres_port(ports)}/{database}"


def _admin_dsn(state: StackState, ports: Ports, database: str = DATABASE) -> str:
    return f"postgresql://tenantry_admin:{state.secrets.postgres_password}@{LOOPBACK}:{ports.postgres}/{database}"


def service_environment(
    service: str, state: StackState, ports: Ports, provider: Provider, *, trace_sample_ratio: float = 1.0, wiring: Wiring = PLAIN
) -> dict[str, str]:
    """Returns the variables of one service, on top of the process's own plain ones."""
    own = {
        "TENANTRY_LISTEN_ADDRESS": ports.address(service),
        "TENANTRY_OTLP_ENDPOINT": f"http://{ports.address('traces')}" if trace_sample_ratio > 0 else "",
        "TENANTRY_TRACE_SAMPLE_RATIO": str(trace_sample_ratio),
        # Shorter than a person waits after Ctrl-C, and than the supervisor does before it kills.
        "TENANTRY_DRAIN_SECONDS": "5",
        "TENANTRY_LOG_LEVEL": os.environ.get("TENANTRY_LOG_LEVEL", "INFO"),
    }
    own |= {f"TENANTRY_{peer.upper()}_ADDRESS": ports.address(peer) for peer in SERVICES}
    own |= _identity(service, state, wiring)
    if service in WITH_POSTGRES:
        own["TENANTRY_POSTGRES_DSN"] = role_dsn(state, ports, service, "service", wiring=wiring)
        own["TENANTRY_POSTGRES_TRANSACTION_POOLING"] = str(wiring.pgbouncer).lower()
        own["TENANTRY_POSTGRES_ADMIN_DSN"] = _admin_dsn(state, ports)
    if service in WITH_JOBS_ROLE:
        own["TENANTRY_POSTGRES_JOBS_DSN"] = role_dsn(state, ports, service, "jobs", wiring=wiring)
    if service in WITH_PLACEMENT_ROLE:
        own["TENANTRY_POSTGRES_PLACEMENT_DSN"] = role_dsn(state, ports, service, "placement")
        # One server here; a deployment names the one it keeps for tenants with a database of their own.
        setting = "TENANTRY_SILO_ADMIN_DSN" if service == "tenant" else "TENANTRY_SILO_MIGRATION_DSN"
        own[setting] = own["TENANTRY_POSTGRES_ADMIN_DSN"].rpartition("/")[0] + "/postgres"
    if service in WITH_PARTITIONS_ROLE:
        own["TENANTRY_POSTGRES_PARTITIONS_DSN"] = role_dsn(state, ports, service, "partitions")
    own |= _particular(service, state, ports, provider)
    if service == "metering" and provider.is_stub:
        own |= _usage_feed(provider, wiring)
    if service == "tenant" and wiring.events:
        own["TENANTRY_EVENT_WEBHOOK_URL"] = f"http://{ports.address('events')}{EVENTS_PATH}"
        own["TENANTRY_EVENT_WEBHOOK_SECRET"] = state.secrets.webhook_secret
    return {key: value for key, value in os.environ.items() if not key.startswith(("TENANTRY_", "ANTHROPIC_"))} | own


def _identity(service: str, state: StackState, wiring: Wiring) -> dict[str, str]:
    if wiring.certificates is None:
        tokens = state.secrets
        return {"TENANTRY_SERVICE_TOKEN": tokens.service_tokens[service], "TENANTRY_PEER_TOKEN_HASHES": tokens.peer_token_hashes}
    leaf = wiring.certificates.files(service)
    return {
        "TENANTRY_TLS_CERT_FILE": str(leaf.certificate.resolve()),
        "TENANTRY_TLS_KEY_FILE": str(leaf.key.resolve()),
        "TENANTRY_TLS_CA_FILE": str(leaf.authorities.resolve()),
    }


def _usage_feed(provider: Provider, wiring: Wiring) -> dict[str, str]:
    # As the stub's ledger tells keys apart. Tenants' own keys are in it too, and are not the house's to pay.
    house = hashlib.sha256(provider.api_key.encode()).hexdigest()[:16]
    return {
        "TENANTRY_RECONCILIATION_FEED": "requests",
        "TENANTRY_RECONCILIATION_URL": f"{provider.base_url}/stub/ledger",
        "TENANTRY_RECONCILIATION_API_KEY": provider.api_key,
        "TENANTRY_RECONCILIATION_ACCOUNTS": json.dumps({PROVIDER_ACCOUNT: [house]}),
        "TENANTRY_RECONCILIATION_POLL_SECONDS": str(RECONCILIATION_POLL_SECONDS if wiring.reconciles else 0),
    }


def _particular(service: str, state: StackState, ports: Ports, provider: Provider) -> dict[str, str]:
    if service == "tenant":
        return {
            "TENANTRY_CONTEXT_SIGNING_KEY": state.secrets.context_signing_key,
            "TENANTRY_OPERATOR_KEY_SHA256": state.secrets.operator_key_sha256,
            "TENANTRY_BASE_DOMAINS": BASE_DOMAIN,
            # An issuer to try things with is on this machine.
            "TENANTRY_JWKS_PRIVATE_ADDRESSES": "true",
            "TENANTRY_KEY_STORE_DSN": role_dsn(state, ports, KEY_ROLE, "service", KEY_DATABASE),
            "TENANTRY_KEY_STORE_ADMIN_DSN": _admin_dsn(state, ports, KEY_DATABASE),
            "TENANTRY_MASTER_KEYS": state.secrets.master_keys,
            "TENANTRY_MOVE_GRACE_SECONDS": "3",
        }
    if service == "ratelimit":
        return {
            "TENANTRY_REDIS_URL": f"redis://:{state.secrets.redis_password}@{LOOPBACK}:{ports.redis}/0",
            "TENANTRY_PROVIDER_ACCOUNTS": json.dumps({PROVIDER_ACCOUNT: ACCOUNT_LIMITS}),
        }
    if service == "metering":
        # A receiver to try things with is on this machine.
        return {"TENANTRY_WEBHOOK_SEAL_KEYS": state.secrets.webhook_seal_keys, "TENANTRY_WEBHOOK_PRIVATE_ADDRESSES": "true"}
    if service == "retrieval":
        return {"TENANTRY_QDRANT_URL": f"http://{ports.address('qdrant')}", "TENANTRY_QDRANT_API_KEY": state.secrets.qdrant_api_key}
    if service == "inference":
        call_id_header = {"TENANTRY_PROVIDER_CALL_ID_HEADER": "x-tenantry-call-id"} if provider.is_stub else {}
        own_account = {"TENANTRY_ANTHROPIC_API_KEY": provider.api_key, "TENANTRY_PROVIDER_ACCOUNT": PROVIDER_ACCOUNT}
        return {"TENANTRY_PROVIDER_BASE_URL": provider.base_url} | own_account | call_id_header
    return {}
