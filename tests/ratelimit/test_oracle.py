"""The scripts against the oracle: any run of reserves, ends, expiries, losses and rebuilds gives equal decisions and counters."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.kernel.ids import ReservationId, new_uuid7
from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.adapters.redis_store import RedisStore
from services.ratelimit.fencing import FenceVerdict
from services.ratelimit.limits import Limits
from services.ratelimit.rebuild import CountedCall, CountedState
from services.ratelimit.reservation import CommitKind
from tests.ratelimit.callers import AtStore, now_us
from tests.ratelimit.oracle import Oracle, OracleCall

small = st.integers(0, 60)
any_limits = st.builds(Limits, *(st.one_of(st.just(0), st.integers(1, 12 if few else 200)) for few in (True, False, False, False, True)))
steps = st.one_of(
    st.tuples(st.just("reserve"), small, small),
    st.tuples(st.just("reserve"), small, small),
    st.tuples(st.just("repeat"), small, small),
    st.tuples(st.just("commit"), small, small, st.sampled_from(list(CommitKind)), st.sampled_from((0, 0, 0, 0, -1, 1))),
    st.tuples(st.just("release"), small),
    st.tuples(st.just("expire"), small),
    st.tuples(st.just("renew"), small),
    st.tuples(st.just("fence"), small, st.sampled_from(list(FenceVerdict)), st.sampled_from((0, 0, -1))),
    st.tuples(st.just("lose")),
    st.tuples(st.just("load"), small, small),
)


class Run:
    """One tenant at the store and at the oracle, led through the same steps."""

    def __init__(self, link: PipelinedLink, limits: Limits) -> None:
        self.tenant = AtStore(RedisStore(link, link, window_seconds=3600.0), link, limits)
        self.oracle = Oracle(limits, 3600 * 1_000_000)
        self.ids: list[ReservationId] = []

    def pick(self, number: int) -> ReservationId:
        """One of the ids used so far, or one that was never used."""
        return self.ids[number % len(self.ids)] if self.ids else ReservationId(new_uuid7())

    async def reserve(self, tokens: int, cost: int, reservation_id: ReservationId | None = None) -> None:
        reservation_id, answer = await self.tenant.reserve(tokens, cost, id=reservation_id)
        self.ids.append(reservation_id)
        reserved_us = answer.usage.now_us if answer.usage is not None else now_us()
        assert self.oracle.reserve(reservation_id, tokens, cost, reserved_us) == answer.verdict.value

    async def repeat(self, number: int, tokens: int) -> None:
        known = (self.oracle.calls or {}).get(self.pick(number)) if self.ids else None
        if known is not None:
            await self.reserve(known.tokens if tokens % 2 else tokens, known.cost, self.pick(number))

    async def commit(self, number: int, tokens: int, kind: CommitKind, shift: int) -> None:
        reservation_id, epoch = self.pick(number), max(0, self.oracle.epoch + shift)
        done = await self.tenant.commit(reservation_id, kind, tokens, tokens * 3, epoch)
        assert done == self.oracle.commit(reservation_id, kind.value, tokens, tokens * 3, epoch)

    async def release(self, number: int) -> None:
        await self.tenant.store.release(self.tenant.tenant_id, self.pick(number), self.oracle.epoch)
        self.oracle.end(self.pick(number), "released", 0, 0, counted=False, only_held=True)

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
            self.oracle.end(self.pick(number), "released", 0, 0, counted=False, only_held=True)

    async def lose(self) -> None:
        await self.tenant.lose()
        self.oracle.lose()

    async def load(self, tokens: int, cost: int) -> None:
        """Loses everything and loads a snapshot with one call in each state and some older use."""
        await self.lose()
        now = now_us()
        calls = {
            ReservationId(new_uuid7()): OracleCall(state.value, now, *((0, 0) if state is CountedState.VOID else (tokens, cost)))
            for state in CountedState
        }
        self.ids += calls
        self.oracle.load(self.oracle.epoch + 1, calls, tokens + 50, cost + 50)
        self.tenant.epoch = self.oracle.epoch
        counted = [CountedCall(each, CountedState(call.state), call.reserve_us, call.tokens, call.cost) for each, call in calls.items()]
        day, month = next(iter(self.oracle.base_tokens)), next(iter(self.oracle.base_cost))
        await self.tenant.loaded(*counted, days={day: tokens + 50}, months={month: cost + 50})

    async def agree(self) -> None:
        """Compares every counter."""
        if self.oracle.calls is None:
            assert await self.tenant.dump() == [None] * 5
        else:
            assert await self.tenant.used() == self.oracle.used(now_us())


@settings(max_examples=120, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(any_limits, st.lists(steps, min_size=5, max_size=25))
async def test_scripts_and_oracle_agree(link: PipelinedLink, limits: Limits, taken: list[tuple[Any, ...]]) -> None:
    """Whatever happens in whatever order, every decision and every counter is the oracle's."""
    run = Run(link, limits)
    await run.load(0, 0)
    for name, *arguments in taken:
        await getattr(run, name)(*arguments)
        await run.agree()
