"""What is asked in every run: rules that never bind, tenants with users, and calls of one size."""

from dataclasses import dataclass
from uuid import UUID

from mesh.common.v1 import limit_rule_pb2 as pb
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from mesh.tenant.v1.tenant_service_pb2 import TenantConfig
from services.kernel.ids import ReservationId, TenantId, new_uuid7
from services.ratelimit.adapters.tenant_rules import terms_of
from services.ratelimit.limits import Amounts, Demand, Subject
from services.ratelimit.request import Ask
from services.ratelimit.terms import Terms

LIMIT = 1_000_000_000_000
DEMAND = Demand(Amounts(1_200, 3_000_000))
FEATURE = "chat"
USERS = tuple(f"user-{number}" for number in range(20))

_Window = tuple[str, pb.LimitUnit.ValueType, pb.LimitWindow.ValueType, int]
_REQUESTS: _Window = ("requests_per_minute", pb.LIMIT_UNIT_REQUESTS, pb.LIMIT_WINDOW_SLIDING, 60)
_TOKENS: _Window = ("tokens_per_minute", pb.LIMIT_UNIT_TOKENS, pb.LIMIT_WINDOW_SLIDING, 60)
_DAY: _Window = ("tokens_per_day", pb.LIMIT_UNIT_TOKENS, pb.LIMIT_WINDOW_DAY, 0)
_MONTH: _Window = ("cost_nano_usd_per_month", pb.LIMIT_UNIT_COST_NANO_USD, pb.LIMIT_WINDOW_MONTH, 0)
_RUNNING: _Window = ("concurrent_calls", pb.LIMIT_UNIT_CONCURRENT_CALLS, pb.LIMIT_WINDOW_RUNNING, 0)
_COST_DAY: _Window = ("cost_nano_usd_per_day", pb.LIMIT_UNIT_COST_NANO_USD, pb.LIMIT_WINDOW_DAY, 0)

_STANDARD = (_REQUESTS, _TOKENS, _DAY, _MONTH, _RUNNING)
# Of a user and of a feature: what runs is left out, as its rules look at every living hold and here thousands live at once.
_NESTED = (_REQUESTS, _TOKENS, _DAY, _MONTH, _COST_DAY)


def rules_of(count: int) -> pb.LimitRules:
    """One rule, the five of a plan, or fifteen: those, and five each of user and feature."""
    whole = [_rule(window) for window in _STANDARD]
    nested = [
        _rule(window, scope, word)
        for scope, word in ((pb.LIMIT_SCOPE_USER, "user_"), (pb.LIMIT_SCOPE_FEATURE, "feature_"))
        for window in _NESTED
    ]
    return pb.LimitRules(rules=[*whole, *nested][:count])


def terms_for(rules: pb.LimitRules) -> Terms:
    """The same as the service makes ready for decisions."""
    return terms_of(TenantConfig(version=1, limit_rules=rules))


def subject(number: int) -> Subject:
    """Whom a call serves."""
    return Subject(USERS[number % len(USERS)], FEATURE)


def request(number: int) -> messages.ReserveRequest:
    """One call, as a caller asks for it."""
    whom = subject(number)
    amounts = messages.Amounts(tokens=DEMAND.amounts.tokens, cost_nano_usd=DEMAND.amounts.cost_nano_usd)
    return messages.ReserveRequest(reservation_id=str(new_uuid7()), amounts=amounts, user=whom.user, feature=whom.feature)


def ask(terms: Terms, number: int, reservation_id: UUID) -> Ask:
    """One call, as the store is asked."""
    return Ask(ReservationId(reservation_id), (reservation_id.int >> 80) * 1000, terms.plan(subject(number)), DEMAND)


@dataclass(frozen=True, slots=True)
class Shape:
    """What one comparison is made with."""

    rule_count: int
    tenant_ids: tuple[TenantId, ...]
    rules: pb.LimitRules
    terms: Terms

    @classmethod
    def of(cls, rule_count: int, tenant_count: int) -> "Shape":
        """New tenants under so many rules."""
        rules = rules_of(rule_count)
        return cls(rule_count, tuple(TenantId(new_uuid7()) for _ in range(tenant_count)), rules, terms_for(rules))


def _rule(window: _Window, scope: pb.LimitScope.ValueType = pb.LIMIT_SCOPE_TENANT, prefix: str = "") -> pb.LimitRule:
    name, unit, kind, seconds = window
    return pb.LimitRule(name=prefix + name, unit=unit, window=kind, window_seconds=seconds, limit=LIMIT, scope=scope)
