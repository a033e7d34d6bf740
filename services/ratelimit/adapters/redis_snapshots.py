"""Rebuilds in Redis: whose snapshot may be loaded, and its loading in parts that appear at once."""

from collections.abc import Sequence
from typing import cast

from services.kernel.ids import TenantId
from services.ratelimit.adapters.tenant_scripts import Argument, TenantScripts
from services.ratelimit.counter import Family
from services.ratelimit.limit_rule import CALENDAR, SECOND_US, Unit
from services.ratelimit.limits import Subject
from services.ratelimit.packing import Packable, packed
from services.ratelimit.rebuild import Begin, CountedCall, CountedState, CountedSum, Snapshot
from services.ratelimit.terms import Terms

_CALLS_A_SCRIPT = 100
_SUMS_A_SCRIPT = 200
# Another's request for a snapshot is respected this long; an unanswered one lives this long.
_YOUNG_NONCE_US = SECOND_US
_NONCE_LIFE_MILLISECONDS = 10_000
_STATES = {CountedState.HELD: 1, CountedState.PINNED: 2, CountedState.SETTLED: 3, CountedState.VOID: 4}
_SHADED = 10


class RedisSnapshots:
    """Implements the store of rebuilds."""

    def __init__(self, scripts: TenantScripts, *, lease_seconds: float = 5.0) -> None:
        self._scripts = scripts
        self._lease_us = int(lease_seconds * SECOND_US)

    async def begin(self, tenant_id: TenantId, nonce: str, terms: Terms) -> tuple[Begin, int]:
        """Writes down the nonce of the only snapshot that may be loaded, unless its counters are there or another asked; and the time."""
        answer = await self._scripts.run(
            "begin", tenant_id, nonce, _YOUNG_NONCE_US, _NONCE_LIFE_MILLISECONDS, terms.version, terms.families_digest
        )
        word, now_us = cast("tuple[bytes, int]", answer)
        return Begin(word.decode()), now_us

    async def load(self, tenant_id: TenantId, nonce: str, snapshot: Snapshot, terms: Terms) -> bool:
        """Replaces everything by the snapshot; False when another request was made since."""
        sums = [values for item in snapshot.sums for values in _sums(item)]
        # Logs of windows take their entries in the order of time.
        calls = [_call(item, snapshot.epoch, terms) for item in sorted(snapshot.calls, key=lambda call: call.reserve_us)]
        parts = max(1, -(-len(calls) // _CALLS_A_SCRIPT), -(-len(sums) // _SUMS_A_SCRIPT))
        for part in range(parts):
            own_sums = sums[part * _SUMS_A_SCRIPT : (part + 1) * _SUMS_A_SCRIPT]
            own_calls = calls[part * _CALLS_A_SCRIPT : (part + 1) * _CALLS_A_SCRIPT]
            head = (
                nonce,
                snapshot.epoch,
                self._lease_us,
                part,
                int(part == parts - 1),
                terms.version,
                terms.families_digest,
                ",".join(terms.unit_stems),
                len(own_sums),
            )
            if await self._scripts.run("load", tenant_id, *head, *_flat(own_sums), *_flat(own_calls), bulk=True) != 1:
                return False
        return True


def record_of(call: CountedCall, epoch: int, terms: Terms) -> bytes:
    """A call as scripts keep it, with every counter it is charged to."""
    user, feature = call.subject.user, call.subject.feature
    amounts = (call.tokens, call.cost_nano_usd)
    charges: list[Packable] = []
    for family in terms.families_for(call.product_unit):
        if family.scope.covers(call.subject) and _counted(family, call):
            charges += (_name(family, call, terms), family.unit + (_SHADED if family.shadow else 0), family.window_us)
    return packed(
        (
            *(_STATES[call.state], epoch, call.reserve_us, *amounts, call.quantity, user, feature, call.attempt, call.product_unit),
            *(*amounts, 0, *amounts, charges),
        )
    )


def _counted(family: Family, call: CountedCall) -> bool:
    if family.unit is Unit.REQUESTS:
        return call.attempt == 1
    return family.unit is not Unit.RETRIES or call.attempt > 1


def _name(family: Family, call: CountedCall, terms: Terms) -> str:
    if family.window not in CALENDAR:
        return family.counter(call.subject)
    start_us, _ = terms.calendar.period(family.window, call.reserve_us)
    return family.of_period(call.subject, start_us)


def _call(call: CountedCall, epoch: int, terms: Terms) -> tuple[Argument, Argument]:
    return call.reservation_id.bytes, record_of(call, epoch, terms)


def _sums(item: CountedSum) -> list[tuple[Argument, Argument]]:
    subject = Subject(item.user, item.feature)
    return [(family.of_period(subject, item.start_us), item.amount) for family in item.families]


def _flat(pairs: Sequence[tuple[Argument, Argument]]) -> list[Argument]:
    return [value for pair in pairs for value in pair]
