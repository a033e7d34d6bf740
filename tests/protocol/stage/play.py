"""Plays a run of the model on real services: each step of the run is attempted there, then everything is brought to rest and compared.

What a step asks for may not be possible: where the rule is in force that the run does without, the services refuse it. Such a step is
passed over, as a message is that nobody ever sent.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import asyncpg

from tests.protocol.stage import ledger_steps as ledger
from tests.protocol.stage import limits_steps as limits
from tests.protocol.stage import replica_steps as replica
from tests.protocol.stage.provider_gate import ProviderGate
from tests.protocol.stage.rest import bring_to_rest
from tests.protocol.stage.scene import Scene
from tests.protocol.stage.theatre import Theatre


@dataclass
class Played:
    """Which steps of a run were taken and which were not possible, and what differed at rest."""

    taken: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


async def play(theatre: Theatre, gate: ProviderGate, labels: Sequence[str], rest_seconds: float) -> Played:
    """Plays a run with a new tenant, and brings it to rest within so many seconds."""
    await theatre.revive()
    theatre.wire.clear()
    theatre.wire.open = True
    budget = theatre.budget(extended=any("for more" in label for label in labels))
    tenant = await theatre.tenant(budget)
    # In the model the limits have their data to begin with.
    await theatre.ask_limits(tenant)
    admin = await asyncpg.connect(theatre.stack.postgres.dsn("tenantry"))
    try:
        scene, played = Scene(theatre, gate, tenant, budget, admin), Played()
        theatre.wire.open = False
        for label in labels:
            (played.taken if await _attempt(scene, label) else played.passed_over).append(label)
        played.differences = await bring_to_rest(scene, rest_seconds)
        return played
    finally:
        await admin.close()


async def _attempt(scene: Scene, label: str) -> bool:
    for pattern, attempt in _ATTEMPTS:
        if match := pattern.fullmatch(label):
            return await attempt(scene, *(int(number) for number in match.groups()))
    msg = f"no attempt for the step {label!r}"
    raise AssertionError(msg)


Attempt = Callable[..., Awaitable[bool]]
_ATTEMPTS: Sequence[tuple[re.Pattern[str], Attempt]] = [
    (re.compile(pattern), attempt)
    for pattern, attempt in (
        (r"I(\d) sends Reserve", replica.sends_reserve),
        (r"R (?:holds|repeats its answer) for call (\d)", limits.holds),
        (r"R refuses call (\d)", limits.holds),
        (r"R refuses Reserve of call (\d).*", limits.holds),
        (r"I(\d) is refused", replica.hears_reserve),
        (r"I(\d) sends Open", replica.hears_reserve),
        (r"I(\d) cancels before Open", replica.cancels_before_open),
        (r"I(\d) gives up, sends (?:Void|Release)", replica.gives_up),
        (r"I(\d) releases after Void", replica.hears_void),
        (r"I(\d) sees Open (?:acknowledged|refused)", replica.hears_open),
        (r"I(\d) dispatches", replica.dispatches),
        (r"I(\d) dispatches without Open", replica.dispatches_without_open),
        (r"I(\d) receives the reply", replica.hears_reply),
        (r"I(\d) sees Settle acknowledged", replica.hears_settled),
        (r"I(\d) cannot learn the usage, sends Interrupt", replica.interrupts),
        (r"I(\d) sees Interrupt acknowledged", replica.hears_interrupt),
        (r"I(\d) is killed", replica.is_killed),
        (r"I(\d) asks R for more", replica.asks_limits_for_more),
        (r"I(\d) asks M for more, and R not at all", replica.asks_ledger_alone),
        (r"I(\d) sees more held, asks M", replica.hears_more_is_held),
        (r"I(\d) sees more held, tells M, goes on", replica.goes_on_when_more_is_held),
        (r"P bills (\d) for call (\d)", replica.bills),
        (r"M (?:opens|refuses Open of) call (\d)", ledger.opens),
        (r"M raises (?:the|no) bound of call (\d)", ledger.raises_bound),
        (r"M voids call (\d)", ledger.voids),
        (r"M repeats that call (\d) is void", ledger.voids),
        (r"M marks call (\d) unresolved", ledger.marks_interrupted),
        (r"M acknowledges Interrupt of call (\d).*", ledger.marks_interrupted),
        (r"M settles call (\d)", ledger.settles),
        (r"M: lease of call (\d) ends, unresolved", ledger.lease_ends_at_ledger),
        (r"M answers: call (\d) is .*", ledger.answers_fence),
        (r"M begins an epoch, sends a snapshot", ledger.begins_epoch),
        (r"R holds (?:no )?more for call (\d)", limits.holds_more),
        (r"R releases call (\d)", limits.releases),
        (r"R: lease of call (\d) ends, (?:asks M|lets go)", limits.lease_ends_at_limits),
        (r"R lets go of call (\d)", limits.hears_void_or_settled),
        (r"R pins call (\d)", limits.hears_unresolved),
        (r"R commits \d for call (\d)", limits.hears_end),
        (r"R commits call (\d) without looking at the epoch", limits.hears_end),
        (r"R is told, pins call (\d)", limits.hears_pin),
        (r"R meets a newer epoch, starts over", limits.meets_newer_epoch),
        (r"R loses its data", limits.loses_data),
        (r"R asks M for a snapshot", limits.asks_for_snapshot),
        (r"R loads the snapshot of epoch (\d+)", limits.loads_snapshot),
        (r"Reserve of call (\d) expires", limits.reserve_expires),
        (r"R forgets call (\d)", limits.forgets),
    )
]
