"""Why something is refused: the rule that binds, when it frees, and a sentence that says what to do.

Reads figures, decides nothing itself.
"""

from dataclasses import dataclass
from math import inf
from uuid import UUID

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import Forbidden, InvalidRequest, LimitExceeded, MeshError, QuotaViolation, reason_name
from services.ratelimit.calendar_periods import moment
from services.ratelimit.limit_rule import CALENDAR, SECOND_US, LimitRule, Scope, Unit, Window
from services.ratelimit.limits import Demand
from services.ratelimit.standing import Answer, LimitStatus, period_end_us, refusing, reset_us
from services.ratelimit.terms import Plan
from services.ratelimit.turn import Place

# When a running call will end is unknown: a caller may ask again after this long.
CONCURRENCY_HINT_US = SECOND_US

# Of these a hold gives back what it did not use.
_HELD_UNITS = (Unit.TOKENS, Unit.COST, Unit.RUNNING)

_WHOSE = {Scope.TENANT: "", Scope.USER: " of this user", Scope.FEATURE: " of this feature", Scope.USER_FEATURE: " of this user and feature"}


@dataclass(frozen=True, slots=True)
class Refusal:
    """The rule that frees last. `frees_us` is None when waiting does not help.

    `may_wait`: every rule in the way lets a caller wait for its turn; `for_holds`: for holds that
    come back, which no clock tells. `holds_help`: what comes back may let it in sooner than its clock, though never before `clock_us`.
    `place`: where a caller that may wait stands.
    """

    status: LimitStatus
    needed: int
    now_us: int
    frees_us: int | None
    may_wait: bool = False
    for_holds: bool = False
    holds_help: bool = False
    clock_us: int = 0
    place: Place | None = None

    @property
    def retry_after_seconds(self) -> float | None:
        """How long to wait, rounded up: a caller who waits exactly this long must not find the entry still there."""
        return None if self.frees_us is None else max(0, -(-(self.frees_us - self.now_us) // 1000)) / 1000

    @property
    def reason(self) -> error_reason_pb2.ErrorReason.ValueType:
        """The reason on the wire."""
        return _reason(self.status.rule)

    @property
    def reason_name(self) -> str:
        """The reason's name on the wire."""
        return reason_name(self.reason)

    @property
    def message(self) -> str:
        """A sentence for people: what is used up and what to do next."""
        rule, status = self.status.rule, self.status
        name = named(rule) + _WHOSE[rule.scope]
        thing = "use" if rule.unit is Unit.PRODUCT else "call"
        plan = f'move to the plan "{rule.lifting_plan}"' if rule.lifting_plan else "ask the operator for a higher limit"
        if not rule.grants:
            # No plan lifts what the tenant put on itself.
            plan = f"change the tenant's own rule {rule.name}"
        wait = self.retry_after_seconds
        if self.reason == error_reason_pb2.ERROR_REASON_FEATURE:
            return f"The plan does not include {name}: {plan}."
        if wait is None:
            why = f"This {thing} needs {self.needed} of {status.limit} {name}, more than waiting can free"
            return f"{why}: make the {thing} smaller or {plan}."
        used = f"{status.used} of {status.limit} {name} are in use and this {thing} needs {self.needed} more"
        if rule.window is Window.RUNNING:
            return f"{used}: wait for a running call to end, then try again."
        return f"{used}: try again in {wait:.3f} s, or {plan}."

    @property
    def metadata(self) -> dict[str, str]:
        """What varies, for programs."""
        status, rule = self.status, self.status.rule
        varying = {
            "reset_time": "" if status.reset_us is None else _written(status.reset_us),
            "lifting_plan": rule.lifting_plan,
            "user": status.subject.user,
            "feature": status.subject.feature,
        }
        fixed = {"rule": rule.name, "limit": str(status.limit), "used": str(status.used), "remaining": str(status.remaining)}
        fixed["decide_time"] = _written(self.now_us)
        return fixed | {key: value for key, value in varying.items() if value}

    def error(self, tenant_id: UUID) -> MeshError:
        """The refusal as callers meet it."""
        status = self.status
        if self.reason == error_reason_pb2.ERROR_REASON_FEATURE:
            return not_included(status.rule.product_unit, self.message, status.rule.lifting_plan)
        if status.rule.window is Window.REQUEST:
            field = "quantity" if status.rule.unit is Unit.PRODUCT else "amounts"
            return InvalidRequest(field, self.message, reason=self.reason, metadata=self.metadata)
        violation = f"{status.rule.name}: {status.used} of {status.limit} in use, {self.needed} needed"
        return LimitExceeded(
            self.reason, self.message, self.retry_after_seconds, [QuotaViolation(f"tenant:{tenant_id}", violation)], **self.metadata
        )


def refusal(plan: Plan, answer: Answer, demand: Demand) -> Refusal | None:
    """Names the rule that keeps the demand out longest; None when no rule does.

    A rule whose limit is below what is needed never frees, so it binds before all others.
    """
    found = _refusals(plan, answer, demand, shadow=False)
    if not found:
        return None
    binding = max(found, key=lambda item: inf if item.frees_us is None else item.frees_us)
    rules = [item.status.rule for item in found]
    may_wait = binding.frees_us is not None and all(rule.waits or rule.window in (Window.SLIDING, Window.RUNNING) for rule in rules)
    by_clock = [item.frees_us for item in found if item.frees_us is not None and item.status.rule.unit not in _HELD_UNITS]
    for_holds = may_wait and any(rule.window is not Window.SLIDING for rule in rules)
    holds_help = may_wait and len(by_clock) < len(found)
    clock_us = max(by_clock, default=answer.now_us)
    return Refusal(
        binding.status, binding.needed, binding.now_us, binding.frees_us, may_wait, for_holds, holds_help, clock_us, answer.place
    )


def shadow_refusals(plan: Plan, answer: Answer, demand: Demand) -> list[Refusal]:
    """The rules in shadow mode that would have refused."""
    return _refusals(plan, answer, demand, shadow=True)


def not_included(product_unit: str, message: str = "", lifting_plan: str = "") -> MeshError:
    """What a unit is answered that is no part of the plan."""
    lifting = {"lifting_plan": lifting_plan} if lifting_plan else {}
    message = message or f"the plan does not include {product_unit}"
    return Forbidden(error_reason_pb2.ERROR_REASON_FEATURE, message, feature=product_unit, **lifting)


def named(rule: LimitRule) -> str:
    """The rule's name for people."""
    return rule.name.removeprefix("cost_").replace("nano_usd", "nano-USD").replace("_", " ")


def needed(unit: Unit, demand: Demand) -> int:
    """How much of a unit is asked for."""
    match unit:
        case Unit.TOKENS:
            return demand.amounts.tokens
        case Unit.COST:
            return demand.amounts.cost_nano_usd
        case Unit.PRODUCT:
            return demand.quantity
        case _:
            return 1


def least(rule: LimitRule, demand: Demand) -> int:
    """The least that would do of what a rule counts: a call that may be shortened needs less."""
    need, short = needed(rule.unit, demand), demand.shortening
    if short is None or not rule.shortens:
        return need
    spared = max(0, short.max_output_tokens - max(short.min_output_tokens, rule.min_output_tokens))
    match rule.unit:
        case Unit.TOKENS:
            return need - spared
        case Unit.COST:
            return need - spared * short.output_nano_usd_per_million // 1_000_000
        case _:
            return need


def _written(us: int) -> str:
    return moment(us).isoformat().replace("+00:00", "Z")


def _refusals(plan: Plan, answer: Answer, demand: Demand, *, shadow: bool) -> list[Refusal]:
    found = []
    for place, rule, frees in refusing(plan, answer, shadow=shadow):
        used, of_log = answer.figures[3 * place], answer.figures[3 * place + 1]
        status = LimitStatus(rule, used, reset_us(rule, answer, of_log), rule.scope.of(plan.subject))
        need = needed(rule.unit, demand)
        found.append(Refusal(status, need, answer.now_us, _frees_us(rule, answer, demand, frees)))
    return found


def _frees_us(rule: LimitRule, answer: Answer, demand: Demand, of_log: int) -> int | None:
    if least(rule, demand) > rule.limit:
        return None
    if rule.window is Window.RUNNING:
        return answer.now_us + CONCURRENCY_HINT_US
    if rule.window in CALENDAR:
        return period_end_us(rule, answer)
    return of_log if of_log > 0 else None


def _reason(rule: LimitRule) -> error_reason_pb2.ErrorReason.ValueType:
    if rule.unit is Unit.PRODUCT and rule.scope is Scope.TENANT and rule.grants and not rule.limit:
        return error_reason_pb2.ERROR_REASON_FEATURE
    if rule.window is Window.REQUEST:
        return error_reason_pb2.ERROR_REASON_REQUEST_TOO_LARGE
    if rule.burst:
        return error_reason_pb2.ERROR_REASON_BURST_LIMIT
    match rule.unit:
        case Unit.COST:
            return error_reason_pb2.ERROR_REASON_BUDGET
        case Unit.RUNNING:
            return error_reason_pb2.ERROR_REASON_CONCURRENCY
        case Unit.RETRIES:
            return error_reason_pb2.ERROR_REASON_RETRY_BUDGET
        case _:
            return error_reason_pb2.ERROR_REASON_PLAN_LIMIT
