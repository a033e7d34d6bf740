"""Runs of the model on the real services: processes killed, messages late, repeated and lost, Redis emptied; the invariants hold."""

import os

import pytest

from tests.isolation.mutation import stale
from tests.protocol.mutations import PROTOCOL_MUTATIONS
from tests.protocol.runs import RUNS
from tests.protocol.stage.play import play
from tests.protocol.stage.provider_gate import ProviderGate
from tests.protocol.stage.theatre import Theatre
from tests.protocol.walk import breaks, random_run
from tests.protocol.world import Protocol, Rules

# TENANTRY_TEST_RUNS=200 plays two hundred; the first seed is TENANTRY_TEST_FIRST_RUN.
RUN_COUNT = int(os.environ.get("TENANTRY_TEST_RUNS", "3"))
FIRST_RUN = int(os.environ.get("TENANTRY_TEST_FIRST_RUN", "1"))
# Of a run in which a rule is broken for good nothing comes to rest.
REST_SECONDS = float(os.environ.get("TENANTRY_TEST_REST_SECONDS", "60"))


@pytest.mark.parametrize("rule", RUNS)
def test_a_run_goes_wrong_without_its_rule(rule: str) -> None:
    """In the model the run is possible without its rule, and ends in a state in which an invariant is broken."""
    extensions = int(rule.startswith("extension"))
    worlds = (Protocol(Rules(**{rule: False}), flushes=flushes, extensions=extensions) for flushes in range(4))
    assert any(breaks(RUNS[rule], world) for world in worlds)


def test_every_rule_has_its_run() -> None:
    """Every rule of the protocol is played."""
    assert tuple(RUNS) == Rules._fields


def test_every_rule_can_be_taken_out() -> None:
    """Each rule that is played has a mutation that takes it out of the code, and its text still fits."""
    assert stale(PROTOCOL_MUTATIONS) == []
    assert [mutation.name for mutation in PROTOCOL_MUTATIONS] == [f"the call protocol without {rule}" for rule in RUNS]


def test_a_random_run_follows_from_its_seed() -> None:
    """The same seed draws the same run, another one another."""
    assert random_run(1) == random_run(1) != random_run(2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rule", RUNS)
async def test_the_invariants_hold_in_the_run_that_needs_the_rule(stage: tuple[Theatre, ProviderGate], rule: str) -> None:
    """What goes wrong without the rule does not go wrong in the real services, which have it: at rest all books agree."""
    played = await play(*stage, RUNS[rule], REST_SECONDS)
    print(f"{rule}: {len(played.taken)} steps, passed over: {played.passed_over}")  # noqa: T201 - what the services refused
    assert played.differences == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(FIRST_RUN, FIRST_RUN + RUN_COUNT))
async def test_the_invariants_hold_in_any_run(stage: tuple[Theatre, ProviderGate], seed: int) -> None:
    """A run drawn from its seed, of two calls and two losses of data at most, leaves all books agreeing at rest."""
    labels = random_run(seed)
    played = await play(*stage, labels, REST_SECONDS)
    print(f"seed {seed}: {len(played.taken)} of {len(labels)} steps, passed over: {played.passed_over}")  # noqa: T201 - how much was proven
    assert played.differences == [], f"seed {seed}: {labels}"
