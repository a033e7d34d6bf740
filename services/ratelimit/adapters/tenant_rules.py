"""A tenant's rules out of its configuration, made ready once for each version, and for all tenants of whom they say the same."""

from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, tzinfo
from weakref import WeakValueDictionary

from mesh.common.v1 import limit_rule_pb2 as messages
from mesh.tenant.v1.tenant_service_pb2 import TenantConfig
from services.kernel.change_feed import ChangeFeed
from services.kernel.ids import TenantId
from services.kernel.tenant_config import CONFIG_CHANGES, TenantConfigCache
from services.kernel.tenant_context import TenantContext
from services.ratelimit.calendar_periods import Calendar, moment, time_zone
from services.ratelimit.limit_rule import CALENDAR, SECOND_US, LimitRule, Scope, Unit, Window, rules_of_plan
from services.ratelimit.plan_shelf import PlanShelf
from services.ratelimit.terms import GuardTerms, Plan, Terms

_CAPACITY = 10_000
_SCOPES = {
    messages.LIMIT_SCOPE_TENANT: Scope.TENANT,
    messages.LIMIT_SCOPE_USER: Scope.USER,
    messages.LIMIT_SCOPE_FEATURE: Scope.FEATURE,
    messages.LIMIT_SCOPE_USER_FEATURE: Scope.USER_FEATURE,
}


class TenantRules:
    """Implements TermsOf."""

    def __init__(self, configs: TenantConfigCache, *, feed: ChangeFeed | None = None) -> None:
        self._configs = configs
        self._shared = SharedTerms()
        self._known: OrderedDict[tuple[TenantId | None, int], Terms] = OrderedDict()
        if feed is not None:
            feed.forget_on(CONFIG_CHANGES, self._forget)

    async def __call__(self, context: TenantContext, at_least: int = 0) -> Terms:
        """Returns the rules of the context's tenant, of its configuration's version, of `at_least`, or newer. Raises: MeshError."""
        wanted = (context.tenant_id, max(at_least, context.config_version))
        terms = self._known.get(wanted)
        if terms is not None:
            return terms
        config = await self._configs.get(context, at_least)
        terms = self._known.get((context.tenant_id, config.version)) or self._shared.of(config)
        for version in {wanted[1], config.version}:
            self._known[context.tenant_id, version] = terms
        while len(self._known) > _CAPACITY:
            self._known.popitem(last=False)
        return terms

    def known(self, context: TenantContext) -> Terms | None:
        """Returns the same where it need not ask for it."""
        return self._known.get((context.tenant_id, context.config_version))

    def _forget(self, tenant_id: TenantId | None) -> None:
        # An older token must not bring older rules back: its version is asked for anew, and answered with what is in force.
        for key in [key for key in self._known if tenant_id in (None, key[0])]:
            del self._known[key]


@dataclass(frozen=True, slots=True)
class _Content:
    """All that a configuration says of the limits."""

    version: int
    rules: tuple[LimitRule, ...]
    zone: tzinfo = UTC
    anchor_day: int = 1
    calendar_name: str = "UTC|1"
    features: frozenset[str] = frozenset()
    guard: GuardTerms | None = None
    weight: int = 1


class SharedTerms:
    """Makes one Terms of all configurations that say the same, as those of tenants on one plan do.

    What a decision reads is then in the processor's caches, and not once for each tenant in memory.
    """

    def __init__(self) -> None:
        self._shelf: PlanShelf[Plan] = PlanShelf()
        self._made: WeakValueDictionary[_Content, Terms] = WeakValueDictionary()

    def of(self, config: TenantConfig) -> Terms:
        """The rules of a configuration; of one without rules, those that its plan's numbers stand for."""
        content = _content_of(config)
        terms = self._made.get(content)
        if terms is None:
            terms = self._made[content] = Terms(
                content.rules,
                Calendar(content.zone, content.anchor_day),
                version=content.version,
                calendar_name=content.calendar_name,
                features=content.features,
                guard=content.guard,
                weight=content.weight,
                shelf=self._shelf,
            )
        return terms


def terms_of(config: TenantConfig) -> Terms:
    """The same, shared with nobody."""
    return SharedTerms().of(config)


def _content_of(config: TenantConfig) -> _Content:
    if not config.HasField("limit_rules"):
        return _Content(config.version, rules_of_plan(config.limits))
    told = config.limit_rules
    zone = time_zone(told.time_zone)
    anchor_day = 1
    if told.HasField("cycle_anchor_time"):
        anchor_day = moment(told.cycle_anchor_time.ToMicroseconds()).astimezone(zone).day
    return _Content(
        config.version,
        tuple(_rule(rule) for rule in told.rules),
        zone,
        anchor_day,
        # The names of calendars' sums: those of another zone or day are others.
        f"{told.time_zone or 'UTC'}|{anchor_day}",
        frozenset(name for name, feature in config.features.items() if feature.enabled),
        _guard(told),
        max(1, told.weight),
    )


def _guard(told: messages.LimitRules) -> GuardTerms | None:
    guard = told.abuse_guard
    if not guard.refusals_per_minute and not guard.auth_failures_per_minute:
        return None
    return GuardTerms(guard.refusals_per_minute, guard.auth_failures_per_minute, max(1, guard.first_seconds), max(1, guard.most_seconds))


def _rule(rule: messages.LimitRule) -> LimitRule:
    unit = Unit(rule.unit)
    window = Window.RUNNING if unit is Unit.RUNNING else Window(rule.window)
    closed = unit is Unit.COST or window in CALENDAR
    return LimitRule(
        name=rule.name,
        unit=unit,
        window=window,
        limit=rule.limit,
        window_us=max(1, rule.window_seconds) * SECOND_US if window is Window.SLIDING else 0,
        scope=_SCOPES[rule.scope],
        product_unit=rule.product_unit,
        user=rule.user,
        feature=rule.feature,
        shadow=rule.mode == messages.LIMIT_MODE_SHADOW,
        # Money and calendars are always closed: a local allowance knows neither what was spent nor what the ledger has.
        fails_open=rule.on_store_failure == messages.LIMIT_STORE_FAILURE_OPEN and not closed,
        shortens=rule.near_edge.shorten,
        min_output_tokens=max(1, rule.near_edge.min_output_tokens),
        waits=rule.near_edge.wait,
        burst=rule.burst,
        lifting_plan=rule.lifting_plan,
        grants=rule.origin != messages.LIMIT_RULE_ORIGIN_TENANT,
    )
