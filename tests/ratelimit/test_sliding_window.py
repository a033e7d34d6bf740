"""Windows that slide: the compact log against one that keeps everything, and the scripts against the compact log."""

from dataclasses import dataclass, field
from typing import cast
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.adapters.scripts import make_script, read_part
from services.ratelimit.adapters.tenant_scripts import KINDS
from services.ratelimit.packing import unpacked
from services.ratelimit.sliding_window import MOST_ENTRIES, SlidingWindow

WINDOW_US = 1_000_000
QUANTUM_US = WINDOW_US // MOST_ENTRIES
# Each step waits, and then adds, corrects something added before, or looks.
waits = st.one_of(st.integers(0, 3), st.integers(0, 2000), st.integers(0, 300_000))
steps = st.tuples(waits, st.sampled_from(("add", "add", "add", "adjust", "look")), st.integers(0, 200), st.integers(0, 50))
# Bursts fill the log beyond what it keeps exactly.
bursts = st.integers(1, 300).map(lambda count: [(37 + count * 11, "add", 0, 1)] * count)
runs = st.lists(st.one_of(steps.map(lambda step: [step]), bursts), max_size=12)


@dataclass
class ExactLog:
    """Every amount at its own time, for ever."""

    entries: list[list[int]] = field(default_factory=list)

    def used(self, now_us: int, late_us: int = 0) -> int:
        return sum(amount for time_us, amount in self.entries if time_us > now_us - WINDOW_US - late_us)


@dataclass
class Both:
    """The compact log and the exact one through the same steps."""

    compact: SlidingWindow = field(default_factory=lambda: SlidingWindow(WINDOW_US))
    exact: ExactLog = field(default_factory=ExactLog)
    now_us: int = 10_000_000
    longest: int = 0
    # The compact log as the last step that changed it left it.
    at_last: SlidingWindow = field(default_factory=lambda: SlidingWindow(WINDOW_US))

    def take(self, wait: int, name: str, number: int, amount: int) -> tuple[str, int, int] | None:
        """One step; what it was, for scripts to repeat."""
        self.now_us += wait
        taken = None
        if name == "add":
            self.compact.add(self.now_us, amount)
            self.exact.entries.append([self.now_us, amount])
            taken = ("add", self.now_us, amount)
        elif name == "adjust" and self.exact.entries:
            entry = self.exact.entries[number % len(self.exact.entries)]
            difference = amount - entry[1]
            self.compact.adjust(entry[0], self.now_us, difference)
            if entry[0] > self.now_us - WINDOW_US:
                entry[1] = amount
            taken = (f"adjust {entry[0]}", self.now_us, difference)
        if taken is not None:
            self.at_last = SlidingWindow(WINDOW_US, list(self.compact.times), list(self.compact.amounts))
        self.longest = max(self.longest, len(self.compact.times))
        return taken


@settings(deadline=None, max_examples=40)
@given(runs)
def test_the_compact_log_never_counts_less_and_is_exact_until_it_is_full(run: list[list[tuple[int, str, int, int]]]) -> None:
    """It admits nothing that an exact log refuses; up to 128 entries it is one; and it stays small."""
    both = Both()
    for step in (step for part in run for step in part):
        both.take(*step)
        compact, exact = both.compact.used(both.now_us), both.exact.used(both.now_us)
        assert exact <= compact <= both.exact.used(both.now_us, QUANTUM_US)
        if both.longest < MOST_ENTRIES:
            assert compact == exact
        assert both.compact.times == sorted(set(both.compact.times))
        assert all(amount > 0 for amount in both.compact.amounts)
        assert len(both.compact.times) <= 2 * MOST_ENTRIES + 1


@pytest.mark.parametrize("next_us", [QUANTUM_US // 2, 5 * QUANTUM_US, None])
@pytest.mark.parametrize("before_us", [QUANTUM_US // 4, 5 * QUANTUM_US])
async def test_a_hold_of_nothing_that_is_raised_leaves_with_its_own_quantum(
    link: PipelinedLink, before_us: int, next_us: int | None
) -> None:
    """In a full log it has no entry of its own, and none that comes much later takes it along: neither by the rules nor in the scripts."""
    start_us = 10_000_000
    held_us = start_us + 10 * QUANTUM_US * MOST_ENTRIES // 20 + 1
    times = [start_us + number for number in range(MOST_ENTRIES)]
    times += [held_us - before_us, *([] if next_us is None else [held_us + next_us])]
    now_us = held_us + 10 * QUANTUM_US
    both = Both(now_us=start_us)
    arguments: list[str | int] = []
    for time_us in sorted([*times, held_us]):
        both.take(time_us - both.now_us, "add", 0, 0 if time_us == held_us else 1)
        arguments += ["add", time_us, 0 if time_us == held_us else 1, 0]
    place = [time_us for time_us, _ in both.exact.entries].index(held_us)
    both.take(now_us - both.now_us, "adjust", place, 43)
    out_us = held_us + WINDOW_US + QUANTUM_US + 1
    left = sum(time_us + WINDOW_US + QUANTUM_US > out_us for time_us in times)
    assert both.compact.used(held_us + WINDOW_US - 1) >= 43
    assert both.compact.used(out_us) <= left
    arguments += ["adjust", now_us, 43, held_us, "add", out_us, 0, 0]
    used, _ = cast("list[int]", await _run_on_log(link, f"{{{uuid4()}}}:", arguments))
    assert used == both.compact.used(out_us)


@settings(deadline=None, max_examples=40)
@given(runs, st.integers(1, 10_000))
def test_room_comes_when_it_is_promised_and_not_a_microsecond_earlier(run: list[list[tuple[int, str, int, int]]], excess: int) -> None:
    """At the promised time so much has left; the microsecond before it has not."""
    both = Both()
    for step in (step for part in run for step in part):
        both.take(*step)
    used = both.compact.used(both.now_us)
    frees_us = both.compact.frees_us(both.now_us, excess)
    if not frees_us:
        assert excess > used
    else:
        earlier = SlidingWindow(WINDOW_US, list(both.compact.times), list(both.compact.amounts))
        assert used - earlier.used(frees_us - 1) < excess
        assert used - both.compact.used(frees_us) >= excess


_HARNESS = """
for i = 1, #ARGV, 4 do
  local now = tonumber(ARGV[i + 1])
  book.log = nil
  read({ 'log' }, { 1000000 }, now)
  if ARGV[i] == 'add' then
    add(book.log, now, tonumber(ARGV[i + 2]))
  else
    adjust(book.log, tonumber(ARGV[i + 3]), now, tonumber(ARGV[i + 2]))
  end
  write()
end
book.log = nil
read({ 'log' }, { 1000000 }, tonumber(ARGV[#ARGV - 2]))
return { book.log[USED], frees_us(book.log, 100) }
"""


async def test_a_log_is_written_without_what_has_left_it(link: PipelinedLink) -> None:
    """Its times are distances from the first that is left, and it is as short as if the others had never been."""
    entries = ((1_000_000, 5), (1_400_000, 6), (1_500_000, 7), (2_450_000, 8))
    await _run_on_log(link, prefix := f"{{{uuid4()}}}:", [argument for time, amount in entries for argument in ("add", time, amount, 0)])
    packed = await link.send("HGET", f"{prefix}counters", "log")
    assert isinstance(packed, bytes)
    assert unpacked(packed) == [1_500_000, 0, 7, 950_000, 8]


@settings(max_examples=60, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(runs)
async def test_the_scripts_keep_the_same_log(link: PipelinedLink, run: list[list[tuple[int, str, int, int]]]) -> None:
    """Entry by entry, whatever was added and corrected."""
    both = Both()
    arguments: list[str | int] = []
    for step in (step for part in run for step in part):
        taken = both.take(*step)
        if taken is not None:
            name, _, reserve_us = taken[0].partition(" ")
            arguments += [name, taken[1], taken[2], reserve_us or 0]
    if not arguments:
        return
    prefix = f"{{{uuid4()}}}:"
    told = await _run_on_log(link, prefix, arguments)
    packed = await link.send("HGET", f"{prefix}counters", "log")
    first, *rest = cast("list[int]", unpacked(packed) if isinstance(packed, bytes) else [0])
    last_us = int(arguments[-3])
    # What has left the window may lie there until the log is next written.
    entries = [(first + rest[i], rest[i + 1]) for i in range(0, len(rest), 2) if first + rest[i] > last_us - WINDOW_US]
    assert told == [both.at_last.used(last_us), both.at_last.frees_us(last_us, 100)]
    assert entries == list(zip(both.at_last.times, both.at_last.amounts, strict=True))


async def _run_on_log(link: PipelinedLink, prefix: str, arguments: list[str | int]) -> object:
    """Makes the steps, by fours, in a script of its own; returns what is used then, and when 100 are free."""
    counting = make_script("counting", "\n".join((read_part("common"), read_part("book"), _HARNESS)))
    return await link.send("EVAL", counting.text, len(KINDS), *(prefix + kind for kind in KINDS), *arguments)
