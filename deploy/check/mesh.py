"""What the code says about the mesh: services, their settings, what they register, and who may call whom. Nothing here reads a manifest."""

import ast
import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from services.kernel.request_context import EXTERNAL
from services.kernel.rpc.policy import policies_of
from services.kernel.settings import ServiceSettings

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "TENANTRY_"
# Bearers of services are for loopback; with TLS they would only be secrets to lose.
LOOPBACK_ONLY = frozenset({"service_token", "peer_token_hashes"})
MIGRATIONS_ONLY = frozenset({"postgres_admin_dsn", "key_store_admin_dsn", "silo_migration_dsn"})
# A mesh is whole without sinks of events and exports, front ends that ask for tenants, read replicas, and the provider's account of usage.
READ_REPLICAS = frozenset({"postgres_read_dsn", "postgres_jobs_read_dsn"})
OPTIONAL = READ_REPLICAS | {
    "event_webhook_url",
    "event_webhook_secret",
    "smtp_url",
    "front_key_sha256",
    "reconciliation_url",
    "reconciliation_api_key",
    "stripe_secret_key",
    "stripe_url",
    "export_endpoint_url",
    "export_endpoint_secret",
}
_REGISTERED = re.compile(r"mesh\.\w+\.v\d+\.\w+Service")
_ALWAYS_REQUIRED = frozenset({"listen_address", "health_address", "tls_cert_file", "tls_key_file", "tls_ca_file"})
_STREAM_LIMIT = re.compile(r"\w*call_deadline_seconds")


@dataclass(frozen=True, slots=True)
class Service:
    """One service as its package shows it."""

    name: str
    settings: type[ServiceSettings]
    registered: frozenset[str]
    has_schema: bool

    @property
    def fields(self) -> frozenset[str]:
        """The names of its settings."""
        return frozenset(self.settings.model_fields)

    @property
    def port(self) -> int:
        """The port it listens on unless told otherwise."""
        return port_of(str(self.settings.model_fields["listen_address"].default))

    @property
    def secret_fields(self) -> frozenset[str]:
        """The settings whose values must come from a Secret."""
        return frozenset(name for name, field in self.settings.model_fields.items() if field.annotation is SecretStr)

    @property
    def peers(self) -> frozenset[str]:
        """The services it has an address for, itself left out."""
        named = {field.removesuffix("_address") for field in self.fields if field.endswith("_address")}
        return frozenset(named - {"listen", "health", self.name})

    @property
    def dsn_fields(self) -> frozenset[str]:
        """Its connection strings of Postgres, those of migrations included and those of read replicas not."""
        return frozenset(field for field in self.fields if field.endswith("_dsn")) - READ_REPLICAS

    def required_fields(self) -> frozenset[str]:
        """Returns the settings a Deployment must give: every default of theirs is for one machine, or empty."""
        stores = {field for field in self.fields if field.endswith("_url") and not field.endswith("_base_url")}
        digests = {field for field in self.fields if field.endswith("_sha256")}
        addresses = {f"{peer}_address" for peer in self.peers}
        wanted = _ALWAYS_REQUIRED | stores | digests | addresses | self.dsn_fields | self.secret_fields
        return frozenset(wanted - LOOPBACK_ONLY - MIGRATIONS_ONLY - OPTIONAL)

    def configured(self, environment: Mapping[str, str]) -> ServiceSettings:
        """Returns the settings this environment alone makes. Raises: pydantic.ValidationError where the service would refuse to start."""
        values = {field_of(name): value for name, value in environment.items() if name.startswith(PREFIX)}
        return _blind(self.settings).model_validate(values)


def field_of(environment_name: str) -> str:
    """Returns the setting an environment name sets."""
    return environment_name.removeprefix(PREFIX).lower()


def environment_name(field: str) -> str:
    """Returns the environment name that sets a setting."""
    return PREFIX + field.upper()


def port_of(address: str) -> int:
    """Returns the port of host:port or dns:///host:port; 0 when there is none."""
    text = address.rpartition(":")[2]
    return int(text) if text.isdecimal() else 0


def longest_stream_seconds(settings: ServiceSettings) -> float:
    """Returns how long one call may last by the settings; 0 when they set no limit of their own."""
    limits = (float(getattr(settings, name)) for name in type(settings).model_fields if _STREAM_LIMIT.fullmatch(name))
    return max(limits, default=0.0)


def services_of_code() -> dict[str, Service]:
    """Reads every service package but the kernel."""
    _load_contracts()
    names = sorted(path.parent.name for path in (ROOT / "services").glob("*/settings.py") if path.parent.name != "kernel")
    return {name: _service(name) for name in names}


def edges(services: Iterable[Service]) -> frozenset[tuple[str, str]]:
    """Returns caller → service for every call some contract allows; callers outside are `external`."""
    found: set[tuple[str, str]] = set()
    for service in services:
        for policy in policies_of(service.registered).values():
            found |= {(caller, service.name) for caller in policy.callers if caller != service.name}
    return frozenset(found)


def callers_of(service: str, all_edges: Iterable[tuple[str, str]]) -> tuple[frozenset[str], bool]:
    """Returns the services that may call this one, and whether callers outside may."""
    callers = {caller for caller, callee in all_edges if callee == service}
    return frozenset(callers - {EXTERNAL}), EXTERNAL in callers


def registered_services(root: Path) -> frozenset[str]:
    """Reads the full names a composition root, a module or a package, registers without building it: building opens stores."""
    trees = [ast.parse(module.read_text()) for module in (sorted(root.glob("*.py")) if root.is_dir() else [root])]
    constants = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return frozenset(value for value in constants if isinstance(value, str) and _REGISTERED.fullmatch(value))


def _service(name: str) -> Service:
    package = ROOT / "services" / name
    module = importlib.import_module(f"services.{name}.settings")
    types = [item for item in vars(module).values() if isinstance(item, type) and issubclass(item, ServiceSettings)]
    settings = next(item for item in types if item.service_name == name)
    app = package / "app"
    registered = registered_services(app if app.is_dir() else app.with_suffix(".py"))
    return Service(name, settings, registered, any((package / "migrations").glob("*.sql")))


def _load_contracts() -> None:
    generated = ROOT / "protos" / "gen"
    for path in sorted((generated / "mesh").rglob("*_service_pb2.py")):
        importlib.import_module(".".join(path.relative_to(generated).with_suffix("").parts))


def _blind(settings: type[ServiceSettings]) -> type[ServiceSettings]:
    # This process's own environment must not fill what a manifest forgot.
    class Given(settings):  # type: ignore[valid-type,misc] # the base is known at run time only
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **others: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings,)

    return Given
