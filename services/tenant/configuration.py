"""Changes of a tenant's configuration: who may change what, and what makes no sense. Refuses as a whole, before anything is written."""

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol
from urllib.parse import urlsplit

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import Forbidden, InvalidRequest, MeshError, NotFound, WrongState
from services.kernel.ids import TenantId
from services.kernel.paging import cut_page, decode_page_token, encode_page_token, page_size, refused_page_token
from services.tenant.actor import Actor
from services.tenant.effective_config import OVERRIDE_NAMES, StoredConfiguration, Value, judged_terms, shorter_retention
from services.tenant.limit_changes import GROUP as LIMIT_RULES
from services.tenant.limit_changes import (
    RULES_PATH,
    LimitWish,
    changed_limit_paths,
    is_limit_path,
    limit_value_at,
    refuse_two_numbers,
    with_limits,
)
from services.tenant.plan import Plan, sense_problem, unknown_plan
from services.tenant.rule_pace import refuse_hurry
from services.tenant.scopes import OPERATOR_SCOPE

LIMIT_NAMES = OVERRIDE_NAMES[:8]
_TOP_NAMES = ("encrypt_content", "data_retention_days")
# Path → the override's own name; a path is what callers, the audit log and the history speak of.
PATHS: Mapping[str, str] = {
    **{f"limits.{name}": name for name in LIMIT_NAMES},
    **{f"ai.{name}": name for name in OVERRIDE_NAMES if name not in (*LIMIT_NAMES, *_TOP_NAMES)},
    **{name: name for name in _TOP_NAMES},
}
PATH_OF: Mapping[str, str] = {name: path for path, name in PATHS.items()}
GROUPS = ("limits", "ai")
PLAN_PATH = "plan"
# The plan is their ceiling: a tenant stays below it, an operator may go beyond, and what an operator set the tenant leaves alone.
_CEILINGS = frozenset(("allowed_models", "max_output_tokens", "data_retention_days"))
_OPERATORS_ALONE = frozenset((*LIMIT_NAMES, "dedicated_endpoint", "encrypt_content"))
_LISTING = "configuration_changes"


@dataclass(frozen=True, slots=True)
class ConfigurationChange:
    """One change as the history keeps it; `before` and `after` are JSON objects by path."""

    version: int
    change_time: datetime
    subject: str
    reason: str
    changed_paths: tuple[str, ...]
    before_json: str
    after_json: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """A configuration after a change, and the paths that differ from before; none when there was nothing to change."""

    stored: StoredConfiguration
    changed_paths: tuple[str, ...]


# Given the configuration and every plan by name, what is wanted instead. Pure; called while nobody else can change it.
Decide = Callable[[StoredConfiguration, Mapping[str, Plan]], StoredConfiguration]


# Given how many seconds ago the tenant itself changed its own limits, newest first, refuses one more change by raising.
Pace = Callable[[TenantId, Sequence[float]], None]


class ConfigurationStore(Protocol):
    """Where configurations are kept, with their history."""

    async def read(self, tenant_id: TenantId) -> StoredConfiguration | None:
        """Returns the newest configuration in one round trip."""
        ...

    async def change(
        self, tenant_id: TenantId, decide: Decide, actor: Actor, *, validate_only: bool, pace: Pace | None = None
    ) -> Outcome | None:
        """Writes what is decided, with history, audit record and announcement in one transaction; None for no such tenant.

        `pace` is asked before a change of the tenant's own limits is written.
        """
        ...

    async def list_changes(self, tenant_id: TenantId, before_version: int, limit: int) -> Sequence[ConfigurationChange]:
        """Returns changes older than a version, newest first."""
        ...


class TenantConfiguration:
    """Reads and changes configurations."""

    def __init__(self, store: ConfigurationStore) -> None:
        self._store = store

    async def get(self, tenant_id: TenantId) -> StoredConfiguration:
        """Returns the newest configuration. Raises: NotFound."""
        stored = await self._store.read(tenant_id)
        if stored is None:
            raise NotFound("tenant")
        return stored

    async def update(
        self,
        tenant_id: TenantId,
        wish: Mapping[str, Value],
        limits: LimitWish,
        actor: Actor,
        *,
        by_operator: bool,
        expected_version: int,
        validate_only: bool,
    ) -> Outcome:
        """Sets each named override, or takes it back where the value is None; likewise the tenant's own limits.

        Raises: InvalidRequest, Forbidden(SCOPE_MISSING | MODEL_TIER), WrongState for another version than the expected one, NotFound,
        LimitExceeded(PLAN_LIMIT) where the tenant changes its own limits too often.
        """

        def decide(stored: StoredConfiguration, plans: Mapping[str, Plan]) -> StoredConfiguration:
            _refuse_other_version(stored, expected_version)
            return updated(stored, plans, wish, limits, by_operator=by_operator)

        pace = None if by_operator else refuse_hurry
        return _found(await self._store.change(tenant_id, decide, actor, validate_only=validate_only, pace=pace))

    async def change_plan(
        self, tenant_id: TenantId, plan_name: str, actor: Actor, *, expected_version: int, validate_only: bool
    ) -> Outcome:
        """Puts the tenant on another plan. Raises: NotFound for an unknown plan, WrongState for placement or version."""

        def decide(stored: StoredConfiguration, plans: Mapping[str, Plan]) -> StoredConfiguration:
            _refuse_other_version(stored, expected_version)
            return moved(stored, plans, plan_name)

        return _found(await self._store.change(tenant_id, decide, actor, validate_only=validate_only))

    async def changes(self, tenant_id: TenantId, asked_size: int, token: str) -> tuple[Sequence[ConfigurationChange], str]:
        """Returns a page of the history, newest first, and the token of the next. Raises: InvalidRequest(page_token)."""
        size, listing = page_size(asked_size), f"{_LISTING}:{tenant_id}"
        position = decode_page_token(token, listing, 1)
        before = _MOST_VERSIONS if position is None else _version_of(position[0])
        found = await self._store.list_changes(tenant_id, before, size + 1)
        return cut_page(found, size, lambda last: encode_page_token(listing, [str(last.version)]))


_MOST_VERSIONS = 2**63 - 1


def updated(
    stored: StoredConfiguration, plans: Mapping[str, Plan], wish: Mapping[str, Value], limits: LimitWish, *, by_operator: bool
) -> StoredConfiguration:
    """Returns the configuration with the wish in it. Raises: InvalidRequest, Forbidden."""
    for name, value in wish.items():
        if not by_operator:
            _refuse_tenants_reach(stored, name, value)
        _refuse_bad_value(plans, name, value)
    marked = set(stored.overrides.operator_fields)
    for name in _CEILINGS & set(wish):
        # A value taken back is nobody's: the plan's stands again, and the tenant may narrow it.
        marked = marked | {name} if by_operator and wish[name] is not None else marked - {name}
    own_limits = with_limits(stored.overrides.own_limits, limits, list(plans.values()), by_operator=by_operator)
    overrides = replace(stored.overrides, **wish, operator_fields=frozenset(marked), own_limits=own_limits)  # type: ignore[arg-type] # checked by the contract
    refuse_two_numbers(own_limits, [name for name in LIMIT_NAMES if overrides.value(name) is not None])
    problem = sense_problem(judged_terms(stored, wish))
    if problem is not None:
        raise InvalidRequest(_field(problem.field), f"with this change, {problem.field} {problem.rule}")
    return replace(stored, overrides=overrides)


def moved(stored: StoredConfiguration, plans: Mapping[str, Plan], plan_name: str) -> StoredConfiguration:
    """Returns the configuration on another plan. Raises: NotFound, WrongState."""
    plan = plans.get(plan_name)
    if plan is None:
        raise unknown_plan()
    if stored.placement not in plan.isolation:
        raise WrongState(
            "tenant",
            stored.placement.upper(),
            f"the plan {plan_name} allows {', '.join(plan.isolation)} and the tenant is in a {stored.placement}; move it first",
        )
    return replace(stored, plan=plan)


def changed_paths(before: StoredConfiguration, after: StoredConfiguration) -> tuple[str, ...]:
    """Returns the paths that differ, sorted; a change of who set a value counts as a change of the value."""
    marks = before.overrides.operator_fields ^ after.overrides.operator_fields
    differing = {path for path, name in PATHS.items() if before.overrides.value(name) != after.overrides.value(name) or name in marks}
    differing |= changed_limit_paths(before.overrides.own_limits, after.overrides.own_limits)
    if before.plan.name != after.plan.name:
        differing.add(PLAN_PATH)
    return tuple(sorted(differing))


def audited_paths(paths: Sequence[str]) -> tuple[str, ...]:
    """Returns what the audit log, which outlives the tenant, is told of the paths: no name that a tenant made up."""
    return tuple(sorted({RULES_PATH if path.startswith(f"{RULES_PATH}.") else path for path in paths}))


def values_at(stored: StoredConfiguration, paths: Sequence[str]) -> dict[str, object]:
    """Returns what the history keeps of a configuration: the values at the paths that a change touches."""
    return {path: _value_at(stored, path) for path in paths}


def _value_at(stored: StoredConfiguration, path: str) -> object:
    if path == PLAN_PATH:
        return stored.plan.name
    if is_limit_path(path):
        return limit_value_at(stored.overrides.own_limits, path)
    return stored.overrides.value(PATHS[path])


def expand_paths(paths: Sequence[str]) -> tuple[str, ...]:
    """Returns the override names that a mask's paths stand for; those of a tenant's own limits are passed over.

    Raises: InvalidRequest(update_mask).
    """
    names: dict[str, None] = {}
    for path in paths:
        if is_limit_path(path):
            continue
        if path in GROUPS:
            names |= dict.fromkeys(name for known, name in PATHS.items() if known.startswith(f"{path}."))
        elif path in PATHS:
            names[PATHS[path]] = None
        else:
            raise InvalidRequest("update_mask", f"knows no such path; the paths are {', '.join((*GROUPS, *PATHS, LIMIT_RULES))}")
    if not paths:
        raise InvalidRequest("update_mask", "must name at least one path")
    return tuple(names)


def _refuse_tenants_reach(stored: StoredConfiguration, name: str, value: Value) -> None:
    if name in _OPERATORS_ALONE or name in stored.overrides.operator_fields:
        raise _operators_alone(name, "only an operator may set it")
    plan = stored.plan
    if name == "allowed_models" and isinstance(value, tuple):
        for model in value:
            if model not in plan.allowed_models:
                raise Forbidden(
                    error_reason_pb2.ERROR_REASON_MODEL_TIER,
                    f"the plan {plan.name} does not include {model}; choose among {', '.join(plan.allowed_models)}, or ask the operator",
                    model=model,
                    tier=plan.name,
                )
    if name == "max_output_tokens" and isinstance(value, int) and value > plan.max_output_tokens:
        raise _operators_alone(name, f"only an operator may raise it above the plan's {plan.max_output_tokens}")
    if name == "data_retention_days" and isinstance(value, int) and shorter_retention(value, plan.data_retention_days) != value:
        raise _operators_alone(name, f"only an operator may make it longer than the plan's {plan.data_retention_days} days")


def _refuse_bad_value(plans: Mapping[str, Plan], name: str, value: Value) -> None:
    if name == "dedicated_endpoint" and isinstance(value, str) and not is_endpoint(value):
        raise InvalidRequest(_field(name), "must be an https URL (http on loopback alone) without user, query and fragment")
    known = {model for plan in plans.values() for model in plan.allowed_models}
    models = value if name == "allowed_models" and isinstance(value, tuple) else (value,) if name == "default_model" and value else ()
    for model in models:
        if model not in known:
            raise InvalidRequest(
                _field(name),
                f"no plan knows the model {model}; known are {', '.join(sorted(known))}",
                reason=error_reason_pb2.ERROR_REASON_UNKNOWN_MODEL,
                metadata={"model": str(model)},
            )


def is_endpoint(text: str) -> bool:
    """Tells whether calls may be sent there: an absolute https URL, or http to loopback, that carries no secret and no query."""
    if not text.isascii() or any(character.isspace() or not character.isprintable() for character in text):
        return False
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    if not host or parts.username is not None or parts.password is not None or "?" in text or "#" in text:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse_other_version(stored: StoredConfiguration, expected_version: int) -> None:
    if expected_version not in (0, stored.version):
        raise WrongState(
            "configuration",
            f"VERSION_{stored.version}",
            f"the configuration is at version {stored.version}, not {expected_version}; read it again and repeat the change",
        )


def _operators_alone(name: str, why: str) -> MeshError:
    path = PATH_OF[name]
    return Forbidden(error_reason_pb2.ERROR_REASON_SCOPE_MISSING, f"{path}: {why}", scope=OPERATOR_SCOPE, field=path)


def _field(name: str) -> str:
    return f"overrides.{PATH_OF.get(name, name)}"


def _version_of(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise refused_page_token()
    return int(text)


def _found(outcome: Outcome | None) -> Outcome:
    if outcome is None:
        raise NotFound("tenant")
    return outcome
