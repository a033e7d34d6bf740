"""What is in force for a tenant: its plan's terms with its own overrides in their place. The one place where the two are put together.

What a tenant chose for itself never reaches above its plan, whatever plan it comes to; what an operator set stands as it was set.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime

from services.kernel.ids import TenantId
from services.tenant.limit_rules import LimitRules, OwnLimits, effective_rules
from services.tenant.plan import Plan
from services.tenant.plan_rules import COUNTED_TERMS
from services.tenant.tenant_record import DEFAULT_ASSISTANT_NAME, TenantConfig

Value = int | bool | str | tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a tenant has instead of its plan's terms; None: as the plan says.

    `operator_fields` names the overrides that an operator set and that may therefore reach above the plan; `own_limits` are its rules.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    cost_nano_usd_per_month: int | None = None
    concurrent_calls: int | None = None
    context_tokens: int | None = None
    weight: int | None = None
    default_model: str | None = None
    allowed_models: tuple[str, ...] | None = None
    system_prompt_prefix: str | None = None
    assistant_name: str | None = None
    default_max_output_tokens: int | None = None
    max_output_tokens: int | None = None
    dedicated_endpoint: str | None = None
    encrypt_content: bool | None = None
    data_retention_days: int | None = None
    operator_fields: frozenset[str] = frozenset()
    own_limits: OwnLimits = field(default_factory=OwnLimits)

    def value(self, name: str) -> Value:
        """Returns one override by its name."""
        found: Value = getattr(self, name)
        return found


OVERRIDE_NAMES = tuple(part.name for part in fields(Overrides) if part.name not in ("operator_fields", "own_limits"))
# Everything that a plan has a word on too; the rest of the overrides are the tenant's alone.
_TERM_NAMES = tuple(name for name in OVERRIDE_NAMES if name in {part.name for part in fields(Plan)})


@dataclass(frozen=True, slots=True)
class StoredConfiguration:
    """What is kept of a tenant's configuration: the plan's terms in force, and the tenant's overrides. Not yet put together.

    `ladder` holds all plans in force from the smallest to the largest: what is refused in one may be had in another.
    """

    tenant_id: TenantId
    version: int
    region: str
    placement: str
    display_name: str
    plan: Plan
    overrides: Overrides
    create_time: datetime | None = None
    ladder: tuple[Plan, ...] = ()


def effective(stored: StoredConfiguration) -> TenantConfig:
    """Returns what is in force. It makes sense whenever the plan does: an override that the plan no longer carries is held to the plan."""
    overrides = stored.overrides
    terms = _held_to_plan(_with_overrides(stored), stored.plan, overrides.operator_fields)
    limit_rules = _limit_rules(stored, terms)
    return TenantConfig(
        tenant_id=stored.tenant_id,
        version=stored.version,
        region=stored.region,
        display_name=stored.display_name,
        assistant_name=overrides.assistant_name or DEFAULT_ASSISTANT_NAME,
        plan=_as_ruled(terms, limit_rules),
        limit_rules=limit_rules,
        system_prompt_prefix=overrides.system_prompt_prefix or "",
        dedicated_endpoint=overrides.dedicated_endpoint or "",
    )


def _limit_rules(stored: StoredConfiguration, terms: Plan) -> LimitRules:
    own = stored.overrides.own_limits
    overridden = frozenset(name for name in COUNTED_TERMS if stored.overrides.value(name) is not None)
    return LimitRules(
        rules=effective_rules(terms, own.rules, stored.ladder, overridden, stored.placement),
        time_zone=own.time_zone or "",
        cycle_anchor_time=own.cycle_anchor_time or stored.create_time,
        abuse_guard=own.abuse_guard or stored.plan.limit_terms.abuse_guard,
    )


def _as_ruled(terms: Plan, limit_rules: LimitRules) -> Plan:
    # A rule that an operator put in a term's place is what the term says everywhere else.
    numbers = {rule.name: rule.limit for rule in limit_rules.rules if rule.name in COUNTED_TERMS}
    return replace(terms, **numbers)  # type: ignore[arg-type] # counts for counts


def judged_terms(before: StoredConfiguration, wish: Mapping[str, Value]) -> Plan:
    """Returns what is in force with a wish taken at its word: what a change must make sense of before it is accepted."""
    plan_terms = _with_overrides(replace(before, overrides=Overrides()))
    wanted = {name: getattr(plan_terms, name) if value is None else value for name, value in wish.items() if name in _TERM_NAMES}
    return replace(effective(before).plan, **wanted)  # type: ignore[arg-type] # each value has its field's type


def _with_overrides(stored: StoredConfiguration) -> Plan:
    plan, overrides = stored.plan, stored.overrides
    own = {name: overrides.value(name) for name in _TERM_NAMES if overrides.value(name) is not None}
    encrypted = own.pop("encrypt_content", plan.encrypt_content or stored.placement == "silo")
    return replace(plan, encrypt_content=bool(encrypted), **own)  # type: ignore[arg-type] # each value has its field's type


def _held_to_plan(wished: Plan, plan: Plan, operator_fields: frozenset[str]) -> Plan:
    models = wished.allowed_models
    if "allowed_models" not in operator_fields:
        models = tuple(model for model in models if model in plan.allowed_models) or plan.allowed_models
    most = wished.max_output_tokens
    if "max_output_tokens" not in operator_fields:
        most = min(most, plan.max_output_tokens)
    days = wished.data_retention_days
    if "data_retention_days" not in operator_fields:
        days = shorter_retention(days, plan.data_retention_days)
    usual = next((model for model in (wished.default_model, plan.default_model) if model in models), models[0])
    return replace(
        wished,
        allowed_models=models,
        default_model=usual,
        max_output_tokens=most,
        default_max_output_tokens=min(wished.default_max_output_tokens, most),
        data_retention_days=days,
    )


def shorter_retention(one: int, other: int) -> int:
    """Returns the shorter of two times in days, of which 0 means for ever."""
    return min(one, other) if one and other else one or other
