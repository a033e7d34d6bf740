"""Compares the books after a run: a pure function of what was read, whose answer is one sentence for each thing that differs."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from services.metering.billing.periods import BillingPeriod
from tests.chaos.billing import billing_differences
from tests.chaos.bookkeeper import Bills
from tests.chaos.books import OPEN, SETTLED, UNRESOLVED, VOID, Billed, Call, Entry, Ledger, Limits, cost_nano_usd
from tests.chaos.callers import UNIT, Diary

# Ids, numbers, and what follows a bracket.
_FIGURES = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|\d+|[(\[].*")


@dataclass(frozen=True, slots=True)
class Report:
    """A usage report, as the service gives it."""

    cost_nano_usd: int
    settled_count: int
    void_count: int
    open_count: int
    unresolved_count: int
    outstanding_nano_usd: int


@dataclass(frozen=True, slots=True)
class Books:
    """Everything that has to agree. Diaries, limits, reports, budgets and bills are by tenant id.

    `runaways` are calls past their `max_tokens`; `months` are those that are billed.
    """

    provider: Sequence[Billed]
    ledger: Ledger
    limits: Mapping[str, Limits]
    reports: Mapping[str, Report]
    diaries: Mapping[str, Diary]
    budgets: Mapping[str, int]
    runaways: frozenset[str] = frozenset()
    bills: Mapping[str, Bills] = field(default_factory=dict)
    months: Sequence[BillingPeriod] = ()


def differences(books: Books) -> list[str]:
    """Names everything that does not agree; nothing when all is well and nothing is left to happen."""
    return [
        *_unfinished(books.ledger),
        *_provider_and_ledger(books),
        *_ledger_itself(books.ledger),
        *_callers_and_ledger(books),
        *_units(books),
        *_events(books),
        *(line for tenant_id in books.limits for line in _limits_and_ledger(books, tenant_id)),
        *(line for tenant_id, report in books.reports.items() for line in _report(books.ledger, tenant_id, report)),
        *(line for tenant_id, bills in books.bills.items() for line in billing_differences(books.ledger, tenant_id, bills, books.months)),
    ]


def kind_of(difference: str) -> str:
    """The sentence without its figures and names: what differences of one kind have in common."""
    return _FIGURES.sub("…", difference)


def _unfinished(ledger: Ledger) -> Iterator[str]:
    still_open = [call.reservation_id for call in ledger.calls if call.state == OPEN]
    if still_open:
        yield f"{len(still_open)} calls are still open, such as {still_open[0]}"
    if ledger.waiting:
        yield f"{ledger.waiting} ends of calls or leases wait in the ledger"


def _provider_and_ledger(books: Books) -> Iterator[str]:
    """As multisets: what the provider billed is what is settled and what is unresolved, call by call."""
    by_call: dict[str, list[Billed]] = defaultdict(list)
    for billed in books.provider:
        by_call[billed.call_id].append(billed)
    settled, unresolved = _live(books.ledger, SETTLED), _live(books.ledger, UNRESOLVED)
    entries = {entry.reservation_id: entry for entry in books.ledger.entries}
    theirs, ours = Counter[tuple[object, ...]](), Counter[tuple[object, ...]]()
    for call_id, call in settled.items():
        if entry := entries.get(call.reservation_id):
            ours[(call_id, entry.model, entry.tokens, entry.cost_nano_usd)] += 1
    for call_id, lines in by_call.items():
        if call_id in settled:
            prices = books.ledger.prices[settled[call_id].price_version, settled[call_id].model]
            theirs.update((call_id, line.model, line.tokens, cost_nano_usd(line.tokens, prices)) for line in lines)
        elif call_id not in unresolved:
            yield f"call {call_id} was billed by the provider, and the ledger has it neither settled nor unresolved"
    yield from (f"the provider billed {line}, and the ledger did not" for line in (theirs - ours).elements())
    yield from (f"the ledger settled {line}, and the provider did not" for line in (ours - theirs).elements())
    yield from (line for call_id, call in unresolved.items() for line in _within_its_bound(books.ledger, call, by_call[call_id]))
    yield from _budgets(books, by_call)


def _live(ledger: Ledger, state: int) -> dict[str, Call]:
    return {call.call_id: call for call in ledger.calls if call.state == state and call.call_id is not None}


def _within_its_bound(ledger: Ledger, call: Call, lines: Sequence[Billed]) -> Iterator[str]:
    if len(lines) > 1:
        yield f"call {call.call_id} was billed {len(lines)} times by the provider"
    prices = ledger.prices[call.price_version, call.model]
    cost, tokens = sum(cost_nano_usd(line.tokens, prices) for line in lines), sum(sum(line.tokens) for line in lines)
    if cost > call.bound_nano_usd or tokens > call.bound_tokens:
        yield (
            f"unresolved call {call.call_id} was billed {tokens} tokens, {cost} nano-USD, "
            f"and is held at {call.bound_tokens} tokens, {call.bound_nano_usd} nano-USD"
        )


def _budgets(books: Books, by_call: Mapping[str, Sequence[Billed]]) -> Iterator[str]:
    for tenant_id, budget in books.budgets.items():
        spent = sum(
            cost_nano_usd(line.tokens, books.ledger.prices[call.price_version, call.model])
            for call in books.ledger.calls
            if call.tenant_id == tenant_id and call.call_id is not None and call.state in (SETTLED, UNRESOLVED)
            for line in by_call.get(call.call_id, ())
        )
        if spent > budget:
            yield f"the provider billed tenant {tenant_id} {spent} nano-USD of a budget of {budget}"


def _ledger_itself(ledger: Ledger) -> Iterator[str]:
    """Each settled call has one entry, whose cost follows from its tokens and its price version, and no other call has any."""
    counts = Counter((entry.tenant_id, entry.reservation_id) for entry in ledger.entries)
    billed = {(call.tenant_id, call.reservation_id) for call in ledger.calls if call.state == SETTLED}
    if counts != Counter(billed):
        yield f"entries and settled calls differ: {len(counts)} calls with {counts.total()} entries, {len(billed)} settled"
    for entry in ledger.entries:
        cost = cost_nano_usd(entry.tokens, ledger.prices[entry.price_version, entry.model])
        if (entry.cost_nano_usd, entry.total_tokens) != (cost, sum(entry.tokens)):
            yield f"entry of {entry.reservation_id} says {entry.cost_nano_usd} nano-USD, its tokens cost {cost}"
    for call_id, count in Counter(call.call_id for call in ledger.calls if call.state in (SETTLED, UNRESOLVED)).items():
        if count > 1:
            yield f"call {call_id} is on the ledger {count} times"


def _callers_and_ledger(books: Books) -> Iterator[str]:
    """What a caller was told of a call is what the ledger settled."""
    settled = _live(books.ledger, SETTLED)
    entries = {entry.reservation_id: entry for entry in books.ledger.entries}
    for diary in books.diaries.values():
        for call_id, told in diary.answered.items():
            entry = entries.get(settled[call_id].reservation_id) if call_id in settled else None
            found = None if entry is None else (entry.tokens.input, entry.tokens.output, entry.cost_nano_usd)
            if found != (told.input_tokens, told.output_tokens, told.cost_nano_usd):
                yield f"the caller of {call_id} was told {told}, the ledger has {found}"
    asked = {call_id for diary in books.diaries.values() for call_id in diary.asked}
    yield from (f"nobody made the call {call.call_id}" for call in books.ledger.calls if call.call_id and call.call_id not in asked)


def _units(books: Books) -> Iterator[str]:
    """Every use that was answered is on record once with its quantity, and no other that nobody asked for."""
    for tenant_id, diary in books.diaries.items():
        recorded = {use.id: use.quantity for use in books.ledger.units if use.tenant_id == tenant_id}
        for use_id in diary.units_used - recorded.keys():
            yield f"use {use_id} was answered and is not on record"
        for use_id, quantity in recorded.items():
            if diary.units_asked.get(use_id) != quantity:
                yield f"use {use_id} is on record with {quantity}, asked for was {diary.units_asked.get(use_id)}"


def _events(books: Books) -> Iterator[str]:
    """Every event that was answered is on record once, and so is every reversal; nothing is that nobody asked for."""
    for tenant_id, diary in books.diaries.items():
        own = [event for event in books.ledger.events if event.tenant_id == tenant_id]
        for ups, asked, answered, what in (
            (True, diary.events_asked.keys(), diary.events_recorded, "event"),
            (False, diary.reversals_asked, diary.events_reversed, "reversal of event"),
        ):
            recorded = Counter(event.id for event in own if (event.quantity > 0) is ups)
            yield from (f"{what} {name} was answered and is not on record" for name in answered - recorded.keys())
            yield from (f"{what} {name} is on record {count} times" for name, count in recorded.items() if count > 1)
            yield from (f"nobody asked for {what} {name}" for name in recorded.keys() - asked)
        for event in own:
            if abs(event.quantity) != diary.events_asked.get(event.id):
                yield f"event {event.id} is on record with {event.quantity}, asked for was {diary.events_asked.get(event.id)}"


def _limits_and_ledger(books: Books, tenant_id: str) -> Iterator[str]:
    """The limits hold the unresolved calls at their bounds and nothing else, and their counters are what is billed and held."""
    limits, ledger = books.limits[tenant_id], books.ledger
    unresolved = {c.reservation_id: c for c in ledger.calls if c.tenant_id == tenant_id and c.state == UNRESOLVED}
    holds = {hold.reservation_id: hold for hold in limits.holds}
    if limits.lease_count:
        yield f"{limits.lease_count} leases are left of tenant {tenant_id}"
    for reservation_id in holds.keys() ^ unresolved.keys():
        whose = "the limits hold" if reservation_id in holds else "the ledger alone has as unresolved"
        yield f"{whose} {reservation_id} of tenant {tenant_id}"
    for reservation_id in holds.keys() & unresolved.keys():
        hold, call = holds[reservation_id], unresolved[reservation_id]
        held, bound = (hold.tokens, hold.cost_nano_usd), (call.bound_tokens, call.bound_nano_usd)
        # More may be held than the ledger was asked to raise its bound to, until the call's end or a rebuild.
        if held != bound and not (call.call_id in books.runaways and held >= bound):
            yield f"{reservation_id} is held at {held}, the ledger's bound is {bound}"
        if not hold.pinned:
            yield f"{reservation_id} is held without its being unresolved"
    yield from _counters(books, tenant_id, unresolved)


def _counters(books: Books, tenant_id: str, unresolved: Mapping[str, Call]) -> Iterator[str]:
    limits, ledger = books.limits[tenant_id], books.ledger
    day = ledger.now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    used: Counter[str] = Counter()
    amounts = [(entry.reserve_time, entry.total_tokens, entry.cost_nano_usd) for entry in ledger.entries if entry.tenant_id == tenant_id]
    for hold in limits.holds:
        if call := unresolved.get(hold.reservation_id):
            amounts.append((_known(call.reserve_time), hold.tokens, hold.cost_nano_usd))
    for time, tokens, cost in amounts:
        if time >= day:
            used.update(tokens_per_day=tokens, cost_nano_usd_per_day=cost)
        if time >= day.replace(day=1):
            used.update(tokens_per_month=tokens, cost_nano_usd_per_month=cost)
    used[UNIT] = sum(use.quantity for use in ledger.units if use.tenant_id == tenant_id)
    for rule in ("tokens_per_day", "tokens_per_month", "cost_nano_usd_per_day", "cost_nano_usd_per_month", "concurrent_calls", UNIT):
        if rule in limits.used and limits.used[rule] != used[rule]:
            yield f"{rule} of tenant {tenant_id} says {limits.used[rule]}, the ledger {used[rule]}"


def _known(time: datetime | None) -> datetime:
    assert time is not None, "an unresolved call was opened, and so reserved"
    return time


def _report(ledger: Ledger, tenant_id: str, report: Report) -> Iterator[str]:
    """The usage report is what the entries add up to."""
    own = [call for call in ledger.calls if call.tenant_id == tenant_id and call.call_id is not None]
    states = Counter(call.state for call in own)
    recomputed = Report(
        cost_nano_usd=sum(_recomputed(ledger, entry) for entry in ledger.entries if entry.tenant_id == tenant_id),
        settled_count=states[SETTLED],
        void_count=states[VOID],
        open_count=states[OPEN],
        unresolved_count=states[UNRESOLVED],
        outstanding_nano_usd=sum(call.bound_nano_usd for call in own if call.state in (OPEN, UNRESOLVED)),
    )
    if report != recomputed:
        yield f"the usage report of tenant {tenant_id} is {report}, recomputed it is {recomputed}"


def _recomputed(ledger: Ledger, entry: Entry) -> int:
    return cost_nano_usd(entry.tokens, ledger.prices[entry.price_version, entry.model])
