"""The scripts against the oracle: any run of reserves, extensions, ends, losses and rebuilds gives equal decisions and counters."""

from dataclasses import replace
from datetime import UTC
from itertools import takewhile
from typing import Any
from zoneinfo import ZoneInfo

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.kernel.ids import ReservationId, new_uuid7
from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.calendar_periods import Calendar
from services.ratelimit.counter import Family
from services.ratelimit.fencing import FenceVerdict
from services.ratelimit.limit_rule import CALENDAR, SECOND_US, LimitRule, Scope, Unit, Window
from services.ratelimit.limits import NOBODY, Amounts, Demand, Shortening, Subject
from services.ratelimit.rebuild import CountedCall, CountedState, CountedSum
from services.ratelimit.settlement import CommitKind
from services.ratelimit.standing import Answer, Verdict, refusing
from services.ratelimit.terms import Terms
from tests.ratelimit.callers import AtStore, Stores, now_us
from tests.ratelimit.oracle import Oracle, OracleCall

HOUR_US = 3600 * SECOND_US
UNITS = {
    Unit.REQUESTS: (Window.SLIDING, Window.DAY, Window.MONTH),
    Unit.TOKENS: (Window.SLIDING, Window.DAY, Window.MONTH, Window.CYCLE, Window.REQUEST),
    Unit.COST: (Window.DAY, Window.MONTH, Window.REQUEST),
    Unit.RUNNING: (Window.RUNNING,),
    Unit.RETRIES: (Window.SLIDING, Window.DAY),
    Unit.PRODUCT: (Window.SLIDING,),
}
FEW = (Unit.REQUESTS, Unit.RUNNING, Unit.RETRIES)

small = st.integers(0, 60)
subjects = st.builds(Subject, st.sampled_from(("", "ada", "bob")), st.sampled_from(("", "chat")))


@st.composite
def a_rule(draw: st.DrawFn) -> LimitRule:
    """Any rule that the contract allows, small enough to be met."""
    unit = draw(st.sampled_from(list(UNITS)))
    window = draw(st.sampled_from(UNITS[unit]))
    scope = draw(st.sampled_from(list(Scope)))
    return LimitRule(
        "rule",
        unit,
        window,
        draw(st.integers(0, 8 if unit in FEW else 200)),
        HOUR_US if window is Window.SLIDING else 0,
        scope,
        product_unit="interviews" if unit is Unit.PRODUCT else "",
        user=draw(st.sampled_from(("", "ada"))) if scope in (Scope.USER, Scope.USER_FEATURE) else "",
        shadow=draw(st.booleans()),
        fails_open=draw(st.booleans()),
        shortens=draw(st.booleans()),
        min_output_tokens=draw(st.integers(1, 20)),
    )


rule_sets = st.lists(a_rule(), min_size=1, max_size=8).map(
    lambda rules: [replace(rule, name=f"rule_{place}") for place, rule in enumerate(rules)]
)
shortenings = st.one_of(st.none(), st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 3_000_000)))
steps = st.one_of(
    st.tuples(st.just("reserve"), small, small, subjects, st.sampled_from((1, 1, 2)), shortenings),
    st.tuples(st.just("reserve"), small, small, subjects, st.sampled_from((1, 1, 2)), shortenings),
    st.tuples(st.just("repeat"), small, small),
    st.tuples(st.just("extend"), small, small, small, st.sampled_from((0, 0, 0, 1))),
    st.tuples(st.just("use"), st.integers(1, 60), subjects),
    st.tuples(st.just("commit"), small, small, st.sampled_from(list(CommitKind)), st.sampled_from((0, 0, 0, 0, -1, 1))),
    st.tuples(st.just("release"), small),
    st.tuples(st.just("expire"), small),
    st.tuples(st.just("renew"), small),
    st.tuples(st.just("fence"), small, st.sampled_from(list(FenceVerdict)), st.sampled_from((0, 0, -1))),
    st.tuples(st.just("lose")),
    st.tuples(st.just("load"), small, small, subjects),
)


class Run:
    """One tenant at the store and at the oracle, led through the same steps."""

    def __init__(self, link: PipelinedLink, rules: list[LimitRule], calendar: Calendar) -> None:
        self.tenant = AtStore(Stores(link), link, Terms(rules, calendar))
        self.oracle = Oracle(rules, calendar)
        self.ids: list[ReservationId] = []

    def pick(self, number: int) -> ReservationId:
        """One of the ids used so far, or one that was never used."""
        return self.ids[number % len(self.ids)] if self.ids else ReservationId(new_uuid7())

    async def reserve(self, tokens: int, cost: int, subject: Subject, attempt: int, short: tuple[int, int, int] | None) -> None:
        shortening = None
        if short is not None and short[1] <= short[0] <= tokens:
            shortening = Shortening(*short)
            cost += -(-short[0] * short[2] // 1_000_000)
        await self._reserve(ReservationId(new_uuid7()), Demand(Amounts(tokens, cost), attempt, 0, shortening), subject)

    async def _reserve(self, reservation_id: ReservationId, demand: Demand, subject: Subject) -> None:
        ask = self.tenant.ask(reservation_id, demand, subject)
        (answer,) = await self.tenant.store.reserve(self.tenant.tenant_id, self.tenant.terms, [ask])
        self.ids.append(reservation_id)
        told = self.oracle.reserve(reservation_id, demand, answer.now_us or now_us(), subject)
        assert told.verdict == answer.verdict.name.lower()
        if answer.verdict is Verdict.HELD:
            assert answer.granted == told.amounts
        if answer.verdict is Verdict.HELD and told.output_tokens:
            assert answer.output_tokens == told.output_tokens
        if told.verdict == "held":
            assert self._shadow(answer, subject) >= told.shadow_refusals

    def _shadow(self, answer: Answer, subject: Subject) -> set[str]:
        return {rule.name for _, rule, _ in refusing(self.tenant.terms.plan(subject), answer, shadow=True)}

    async def repeat(self, number: int, tokens: int) -> None:
        known = (self.oracle.calls or {}).get(self.pick(number)) if self.ids else None
        if known is not None and not known.product_unit:
            amounts = Amounts(known.demand.amounts.tokens if tokens % 2 else tokens, known.demand.amounts.cost_nano_usd)
            await self._reserve(self.pick(number), Demand(amounts, known.demand.attempt), known.subject)

    async def use(self, quantity: int, subject: Subject) -> None:
        reservation_id = ReservationId(new_uuid7())
        demand = Demand(attempt=0, quantity=quantity)
        answer = await self.tenant.use("interviews", quantity, id=reservation_id, subject=subject)
        told = self.oracle.reserve(reservation_id, demand, answer.now_us or now_us(), subject, "interviews")
        assert told.verdict == answer.verdict.name.lower()

    async def extend(self, number: int, tokens: int, cost: int, shift: int) -> None:
        known = (self.oracle.calls or {}).get(self.pick(number))
        subject = NOBODY if known is None else known.subject
        plan, epoch = self.tenant.terms.plan(subject), self.oracle.epoch + shift
        amounts = Amounts(tokens, cost)
        answer = await self.tenant.store.extend(self.tenant.tenant_id, self.tenant.terms, plan, self.pick(number), epoch, amounts)
        assert self.oracle.extend(self.pick(number), amounts, epoch, answer.now_us or now_us()) == answer.verdict.name.lower()

    async def commit(self, number: int, tokens: int, kind: CommitKind, shift: int) -> None:
        reservation_id, epoch = self.pick(number), max(0, self.oracle.epoch + shift)
        done = await self.tenant.commit(reservation_id, kind, tokens, tokens * 3, epoch)
        assert done == self.oracle.commit(reservation_id, kind.value, Amounts(tokens, tokens * 3), epoch)

    async def release(self, number: int) -> None:
        await self.tenant.store.release(self.tenant.tenant_id, self.pick(number), self.oracle.epoch)
        self.oracle.end(self.pick(number), "released", Amounts(0, 0), counted=False, only_held=True)

    async def expire(self, number: int) -> None:
        await self.tenant.end_lease(self.pick(number))
        call = (self.oracle.calls or {}).get(self.pick(number))
        if call is not None:
            call.leased = False

    async def renew(self, number: int) -> None:
        call = (self.oracle.calls or {}).get(self.pick(number))
        lives = call is not None and call.state == "held" and call.leased
        assert await self.tenant.store.renew([(self.tenant.tenant_id, self.pick(number))]) == [lives]

    async def fence(self, number: int, verdict: FenceVerdict, shift: int) -> None:
        epoch = self.oracle.epoch + shift
        await self.tenant.store.apply_fences(self.tenant.tenant_id, epoch, [(self.pick(number), verdict)])
        if shift:
            return
        if verdict is FenceVerdict.UNRESOLVED:
            self.oracle.pin(self.pick(number))
        elif verdict is not FenceVerdict.SETTLED:
            self.oracle.end(self.pick(number), "released", Amounts(0, 0), counted=False, only_held=True)

    async def lose(self) -> None:
        await self.tenant.lose()
        self.oracle.lose()

    async def load(self, tokens: int, cost: int, subject: Subject) -> None:
        """Loses everything and loads a snapshot with one call in each state and some older use."""
        await self.lose()
        now = now_us()
        calls = {}
        for state in CountedState:
            amounts = Amounts(0, 0) if state is CountedState.VOID else Amounts(tokens, cost)
            calls[ReservationId(new_uuid7())] = OracleCall(state.value, now, amounts, Demand(amounts), subject)
        self.ids += calls
        sums: dict[tuple[Unit, Window], int] = {}
        counted = []
        for family in dict.fromkeys((*self.tenant.terms.families,)):
            if family.window in CALENDAR and family.scope is Scope.TENANT:
                amount = sums.setdefault((family.unit, family.window), tokens + 50)
                start, _ = self.oracle.calendar.period(family.window, now)
                counted.append(CountedSum([family], start, amount))
        self.oracle.load(self.oracle.epoch + 1, calls, sums, now)
        self.tenant.epoch = self.oracle.epoch
        told = [
            CountedCall(each, CountedState(call.state), call.reserve_us, call.amounts.tokens, call.amounts.cost_nano_usd, subject)
            for each, call in calls.items()
        ]
        await self.tenant.loaded(*told, sums=counted)

    async def agree(self) -> None:
        """Compares every counter of every subject."""
        if self.oracle.calls is None:
            assert set(await self.tenant.dump()) == {None}
            return
        for subject in (NOBODY, Subject("ada", "chat"), Subject("bob")):
            for unit in ("", "interviews"):
                plan, now = self.tenant.terms.plan(subject, unit), now_us()
                if plan.rules:
                    counted = tuple(self.oracle.used(rule, subject, now) for rule in plan.rules)
                    assert await self.tenant.used_by(subject, unit) == counted


@settings(max_examples=120, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(rule_sets, st.sampled_from((Calendar(UTC, 31), Calendar(ZoneInfo("Asia/Kathmandu"), 5))), st.lists(steps, min_size=5, max_size=25))
async def test_scripts_and_oracle_agree(
    link: PipelinedLink, rules: list[LimitRule], calendar: Calendar, taken: list[tuple[Any, ...]]
) -> None:
    """Whatever rules there are and whatever happens in whatever order, every decision and every counter is the oracle's."""
    run = Run(link, rules, calendar)
    await run.load(0, 0, NOBODY)
    for name, *arguments in taken:
        await getattr(run, name)(*arguments)
        await run.agree()


def test_families_are_those_of_the_rules_and_the_standard_ones() -> None:
    """Numbers, names and modes of answer change no family; another window, scope or mode of counting does."""
    rule = LimitRule("a", Unit.TOKENS, Window.SLIDING, 10, HOUR_US)
    base = Terms([rule]).families_digest
    assert Terms([LimitRule("b", Unit.TOKENS, Window.SLIDING, 20, HOUR_US, burst=True)]).families_digest == base
    for other in (
        LimitRule("a", Unit.TOKENS, Window.SLIDING, 10, HOUR_US // 2),
        LimitRule("a", Unit.TOKENS, Window.SLIDING, 10, HOUR_US, Scope.USER),
        LimitRule("a", Unit.TOKENS, Window.SLIDING, 10, HOUR_US, shadow=True),
        LimitRule("a", Unit.REQUESTS, Window.SLIDING, 10, HOUR_US),
    ):
        assert Terms([other]).families_digest != base
    assert Terms([rule], calendar_name="Europe/Berlin|1").families_digest != base
    assert Family(Unit.TOKENS, Window.DAY) in Terms([]).families


def test_a_tenant_with_many_rules_and_users_takes_a_bounded_part_of_the_process() -> None:
    """What is made ready for many users with long names under a hundred rules is kept for the latest few, and made again as it was."""
    terms = Terms([LimitRule(f"r{n}", Unit.TOKENS, Window.SLIDING, 9, n * SECOND_US, Scope.USER) for n in range(1, 101)])
    users = [Subject(f"{n:04}" + "\N{ELEPHANT}" * 196) for n in range(150)]
    made = [(user, terms.plan(user)) for user in users]
    kept = list(takewhile(lambda item: terms.plan(item[0]) is item[1], reversed(made)))
    assert 1024 * 1024 < sum(len(plan.packed) for _, plan in kept) <= 8 * 1024 * 1024
    assert terms.plan(users[0]) == made[0][1]
