"""Plans and configurations as they come out of Postgres: one JSON object of terms, one of features, one of a tenant's settings."""

import json
from typing import Any

import asyncpg

from services.kernel.ids import TenantId
from services.tenant.effective_config import OVERRIDE_NAMES, Overrides, StoredConfiguration
from services.tenant.plan import Feature, Plan

_COUNTS = (
    "requests_per_minute",
    "tokens_per_minute",
    "tokens_per_day",
    "tokens_per_month",
    "cost_nano_usd_per_month",
    "concurrent_calls",
    "context_tokens",
    "weight",
    "default_max_output_tokens",
    "max_output_tokens",
    "data_retention_days",
)


def plan_of(row: asyncpg.Record) -> Plan:
    """Builds a plan from the columns `terms` and `features`. JSON keeps every whole number exactly."""
    terms: dict[str, Any] = json.loads(row["terms"])
    features: dict[str, Any] = json.loads(row["features"] or "{}")
    return Plan(
        name=terms["plan"],
        default_model=terms["default_model"],
        allowed_models=tuple(terms["allowed_models"]),
        encrypt_content=terms["encrypt_content"],
        isolation=tuple(terms["isolation"]),
        features=tuple(Feature(name, features[name]["enabled"], features[name]["limit"]) for name in sorted(features)),
        **{name: terms[name] for name in _COUNTS},
    )


def configuration_of(row: asyncpg.Record) -> StoredConfiguration:
    """Builds what is kept of a tenant's configuration from the columns of `tenant.get_config`."""
    # Settings are written one step after the tenant: a service that asks in between finds none.
    settings: dict[str, Any] = json.loads(row["settings"] or "{}")
    own = {name: settings.get(name) for name in OVERRIDE_NAMES}
    models = own.pop("allowed_models")
    # Written at the tenant's creation for everybody, and empty once it was taken back.
    own["assistant_name"] = own["assistant_name"] or None
    return StoredConfiguration(
        tenant_id=TenantId(row["tenant_id"]),
        version=row["version"],
        region=row["region"],
        placement=row["placement"],
        display_name=row["display_name"],
        plan=plan_of(row),
        overrides=Overrides(
            allowed_models=None if models is None else tuple(models),
            operator_fields=frozenset(settings.get("operator_fields", ())),
            **own,
        ),
    )
