"""The limits' own code against the oracle: whatever happens, in whatever order and when, decisions, counters and figures are equal."""

import asyncio
import os
from itertools import takewhile

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from pydantic import SecretStr

from services.kernel.rpc.channel import MeshChannel
from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.counter import Family
from services.ratelimit.limit_rule import SECOND_US, LimitRule, Scope, Unit, Window
from services.ratelimit.limits import Subject
from services.ratelimit.terms import Terms
from tests.ratelimit.callers import TOKENS, InferenceSettings
from tests.ratelimit.limits_by_hand import Backing
from tests.ratelimit.limits_machine import LimitsMachine
from tests.ratelimit.scripted_peer import running_peer

EXAMPLES = int(os.environ.get("TENANTRY_TEST_EXAMPLES", "15"))
HOUR_US = 3600 * SECOND_US


@pytest.mark.timeout(300)
async def test_the_limits_and_the_oracle_agree(link: PipelinedLink) -> None:
    """Whatever rules there are and whatever happens, on a clock that passes each edge of a window to the microsecond."""
    loop = asyncio.get_running_loop()
    async with running_peer() as peer:
        channel = MeshChannel(
            peer.address, settings=InferenceSettings(service_token=SecretStr(TOKENS["inference"])), target_service="metering"
        )
        backing, begun = Backing(link, peer, channel), 0

        def machine() -> LimitsMachine:
            nonlocal begun
            begun += 1
            return LimitsMachine(loop, backing)

        await asyncio.to_thread(
            run_state_machine_as_test,
            machine,
            settings=settings(
                max_examples=EXAMPLES, stateful_step_count=50, database=None, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
        await channel.close()
    # What differs is raised by the machine's own steps.
    assert begun >= EXAMPLES


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
