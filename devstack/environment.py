"""The environment each service of the embedded stack is started with: the same variables a deployment sets."""

import os
from dataclasses import dataclass

from devstack.addresses import Ports
from devstack.ports import LOOPBACK
from devstack.state import SERVICES, StackState

DATABASE = "tenantry"
WITH_POSTGRES = frozenset({"tenant", "inference", "retrieval", "metering"})
WITH_JOBS_ROLE = frozenset({"metering", "retrieval", "tenant"})


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


def _role_dsn(state: StackState, ports: Ports, service: str, role: str) -> str:
    return f"postgresql://{service}_{role}:{state.secrets.role_passwords[service]}@{LOOPBACK}:{ports.postgres}/{DATABASE}"


def service_environment(
    service: str, state: StackState, ports: Ports, provider: Provider, *, trace_sample_ratio: float = 1.0
) -> dict[str, str]:
    """Returns the variables of one service, on top of the process's own plain ones."""
    own = {
        "TENANTRY_LISTEN_ADDRESS": ports.address(service),
        "TENANTRY_SERVICE_TOKEN": state.secrets.service_tokens[service],
        "TENANTRY_PEER_TOKEN_HASHES": state.secrets.peer_token_hashes,
        "TENANTRY_OTLP_ENDPOINT": f"http://{ports.address('traces')}" if trace_sample_ratio > 0 else "",
        "TENANTRY_TRACE_SAMPLE_RATIO": str(trace_sample_ratio),
        # Shorter than a person waits after Ctrl-C, and than the supervisor does before it kills.
        "TENANTRY_DRAIN_SECONDS": "5",
        "TENANTRY_LOG_LEVEL": os.environ.get("TENANTRY_LOG_LEVEL", "INFO"),
    }
    own |= {f"TENANTRY_{peer.upper()}_ADDRESS": ports.address(peer) for peer in SERVICES}
    if service in WITH_POSTGRES:
        own["TENANTRY_POSTGRES_DSN"] = _role_dsn(state, ports, service, "service")
        own["TENANTRY_POSTGRES_ADMIN_DSN"] = (
            f"postgresql://tenantry_admin:{state.secrets.postgres_password}@{LOOPBACK}:{ports.postgres}/{DATABASE}"
        )
    if service in WITH_JOBS_ROLE:
        own["TENANTRY_POSTGRES_JOBS_DSN"] = _role_dsn(state, ports, service, "jobs")
    own |= _particular(service, state, ports, provider)
    return {key: value for key, value in os.environ.items() if not key.startswith(("TENANTRY_", "ANTHROPIC_"))} | own


def _particular(service: str, state: StackState, ports: Ports, provider: Provider) -> dict[str, str]:
    if service == "tenant":
        return {
            "TENANTRY_CONTEXT_SIGNING_KEY": state.secrets.context_signing_key,
            "TENANTRY_OPERATOR_KEY_SHA256": state.secrets.operator_key_sha256,
        }
    if service == "ratelimit":
        return {"TENANTRY_REDIS_URL": f"redis://:{state.secrets.redis_password}@{LOOPBACK}:{ports.redis}/0"}
    if service == "retrieval":
        return {"TENANTRY_QDRANT_URL": f"http://{ports.address('qdrant')}", "TENANTRY_QDRANT_API_KEY": state.secrets.qdrant_api_key}
    if service == "inference":
        call_id_header = {"TENANTRY_PROVIDER_CALL_ID_HEADER": "x-tenantry-call-id"} if provider.is_stub else {}
        return {"TENANTRY_PROVIDER_BASE_URL": provider.base_url, "TENANTRY_ANTHROPIC_API_KEY": provider.api_key} | call_id_header
    return {}
