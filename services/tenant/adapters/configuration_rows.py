"""Plans and configurations as they come out of Postgres: one JSON object of terms, one of features, one of a tenant's settings."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import asyncpg

from services.kernel.ids import TenantId
from services.tenant.effective_config import OVERRIDE_NAMES, Overrides, StoredConfiguration
from services.tenant.limit_rule import rule_of, terms_of
from services.tenant.limit_rules import OwnLimits, OwnRule
from services.tenant.plan import Plan
from services.tenant.plan_rules import Feature, guard_of, limit_terms_of

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
    return _plan(json.loads(row["terms"]), json.loads(row["features"] or "{}"))


def _plan(terms: Mapping[str, Any], features: Mapping[str, Any]) -> Plan:
    return Plan(
        name=terms["plan"],
        default_model=terms["default_model"],
        allowed_models=tuple(terms["allowed_models"]),
        encrypt_content=terms["encrypt_content"],
        isolation=tuple(terms["isolation"]),
        features=tuple(Feature(name, features[name]["enabled"], features[name]["limit"]) for name in sorted(features)),
        limit_terms=limit_terms_of(terms["limit_terms"]),
        **{name: terms[name] for name in _COUNTS},
    )


def configuration_of(row: asyncpg.Record) -> StoredConfiguration:
    """Builds what is kept of a tenant's configuration from the columns of `tenant.get_limited_config`."""
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
            own_limits=_own_limits(settings),
            **own,
        ),
        create_time=row["create_time"],
        ladder=tuple(_plan(plan["terms"], plan["features"] or {}) for plan in json.loads(row["ladder"])),
    )


def own_rules_form(rules: tuple[OwnRule, ...]) -> str:
    """Returns a tenant's own rules as they are kept."""
    return json.dumps([{**terms_of(kept.rule), "by_operator": kept.by_operator} for kept in rules])


def _own_limits(settings: Mapping[str, Any]) -> OwnLimits:
    anchor = settings.get("cycle_anchor_time")
    return OwnLimits(
        rules=tuple(OwnRule(rule_of(rule), rule["by_operator"]) for rule in settings.get("limit_rules", ())),
        time_zone=settings.get("time_zone"),
        cycle_anchor_time=None if anchor is None else datetime.fromisoformat(anchor),
        abuse_guard=guard_of(settings.get("abuse_guard")),
    )
