"""One client's slices: never more used than granted, never after the end, asked for when the demand is worth it."""

from dataclasses import dataclass
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenantry.slice_lane import FinishedSlice, HeldSlice, Lane


@dataclass
class Clock:
    """A clock that a test moves."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def lane_at(clock: Clock) -> tuple[Lane, list[Lane]]:
    """A lane, and who told that it lacks something."""
    told: list[Lane] = []
    return Lane(told.append, clock), told


def held(clock: Clock, granted: int, *, lease: float = 0.8, largest: int = 0) -> HeldSlice:
    """A slice of this moment."""
    return HeldSlice.from_lease(uuid4(), 1, granted, largest, clock.now, lease)


def demand(lane: Lane, clock: Clock, uses: int, quantity: int = 1, *, seconds: float = 1.0) -> None:
    """So many uses, evenly over so long."""
    for _ in range(uses):
        clock.now += seconds / uses
        lane.use(quantity)
        lane.look()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.integers(1, 12)),
        st.tuples(st.just("take"), st.integers(1, 30)),
        st.tuples(st.just("wait"), st.integers(1, 400)),
        st.tuples(st.just("look"), st.just(0)),
        st.tuples(st.just("finish"), st.just(0)),
    ),
    max_size=60,
)


@given(steps)
def test_what_is_used_is_granted_and_within_its_lease(run: list[tuple[str, int]]) -> None:
    """Of every slice: used and given back are what was granted, and nothing was used when its lease was over."""
    clock = Clock()
    lane, _ = lane_at(clock)
    taken: dict[object, HeldSlice] = {}
    used = finished_used = 0
    for name, number in run:
        match name:
            case "use":
                if lane.use(number):
                    used += number
                    assert any(clock.now < item.ends_at for item in taken.values())
            case "take":
                item = held(clock, number)
                taken[item.slice_id] = item
                lane.take(item, number, 0.8)
            case "wait":
                clock.now += number / 1000
            case "look":
                lane.look()
            case _:
                lane.finish()
    lane.finish()
    ids = [item.slice_id for item in lane.finished]
    for item in lane.finished:
        assert 0 <= item.used <= taken[item.slice_id].granted
        finished_used += item.used
    assert sorted(map(str, ids)) == sorted(map(str, taken))
    assert finished_used == used


def test_a_slice_is_over_before_the_service_thinks_so() -> None:
    """Its lease counts from before it was asked for, on a clock that may be a little slow."""
    clock = Clock()
    lane, _ = lane_at(clock)
    item = held(clock, 10, lease=0.5)
    clock.now += 0.3
    lane.take(item, 10, 0.5)
    assert lane.use(1)
    clock.now += 0.1949
    assert lane.use(1)
    clock.now += 0.0002
    assert not lane.use(1)
    lane.look()
    assert lane.finished == [FinishedSlice(item.slice_id, 1, 2)]


def test_an_answer_that_comes_too_late_is_not_used() -> None:
    """A slice whose lease ended on the way is given back whole."""
    clock = Clock()
    lane, _ = lane_at(clock)
    item = held(clock, 10, lease=0.5)
    clock.now += 1
    lane.take(item, 10, 0.5)
    assert not lane.use(1)
    lane.look()
    assert [finished.used for finished in lane.finished] == [0]


def test_a_rare_use_wants_no_slice() -> None:
    """Ten a second are asked one by one; a burst of three is no demand."""
    clock = Clock()
    lane, _ = lane_at(clock)
    demand(lane, clock, 20, seconds=2.0)
    assert lane.wanted() == 0
    demand(lane, clock, 3, seconds=0.05)
    assert lane.wanted() == 0


def test_a_high_demand_wants_what_a_slice_should_cover() -> None:
    """A thousand units a second: some hundreds, in one slice; and the next one only when half of it is used."""
    clock = Clock()
    lane, told = lane_at(clock)
    demand(lane, clock, 500, 2)
    wanted = lane.wanted()
    assert 350 <= wanted <= 450
    lane.take(held(clock, wanted), wanted, 0.8)
    assert lane.wanted() == 0
    demand(lane, clock, wanted // 4 + 1, 2, seconds=0.2)
    assert told == [lane]
    assert 350 <= lane.wanted() <= 450
    lane.is_asking = True
    assert lane.wanted() == 0


def test_a_slice_near_its_end_is_followed() -> None:
    """Also when much of it is left: the demand goes on."""
    clock = Clock()
    lane, _ = lane_at(clock)
    demand(lane, clock, 100)
    lane.take(held(clock, 10_000), 40, 0.8)
    demand(lane, clock, 45, seconds=0.45)
    assert lane.wanted() > 0


def test_a_pause_and_a_meagre_grant_ask_for_nothing() -> None:
    """What the service refused is not asked for at once again, nor where hardly anything is left."""
    clock = Clock()
    lane, _ = lane_at(clock)
    demand(lane, clock, 1000)
    lane.pause(0.1)
    assert lane.wanted() == 0
    demand(lane, clock, 150, seconds=0.15)
    assert lane.wanted() > 0
    lane.take(held(clock, 2), 400, 0.8)
    assert lane.use(2)
    assert lane.wanted() == 0


def test_what_nobody_uses_is_finished_and_forgotten() -> None:
    """A fifth of a second without a use ends the slice; two seconds end the lane."""
    clock = Clock()
    lane, _ = lane_at(clock)
    demand(lane, clock, 1000)
    lane.take(held(clock, 100), 100, 5.0)
    for seconds in (0.05, 0.25):
        clock.now += seconds
        lane.look()
    assert [item.used for item in lane.finished] == [0]
    assert not lane.is_forgotten
    lane.finished.clear()
    clock.now += 2
    assert lane.is_forgotten


def test_a_use_above_the_largest_is_left_to_the_service() -> None:
    """A rule of each request by itself is kept here, and refused there."""
    clock = Clock()
    lane, _ = lane_at(clock)
    lane.take(held(clock, 100, largest=7), 100, 0.8)
    lane.take(held(clock, 100, largest=7), 100, 0.8)
    assert lane.use(7)
    assert not lane.use(8)


@pytest.mark.parametrize("quantity", [0, -1])
def test_a_use_of_nothing_is_an_error(quantity: int) -> None:
    """It would be a slice that grows."""
    clock = Clock()
    lane, _ = lane_at(clock)
    lane.take(held(clock, 100), 100, 0.8)
    with pytest.raises(ValueError, match="at least 1"):
        lane.use(quantity)
