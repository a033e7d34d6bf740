"""How large holds ahead are and how many there may be, against every rule and every size."""

from hypothesis import given
from hypothesis import strategies as st

from mesh.common.v1 import limit_rule_pb2
from services.inference.call import LimitLeft
from services.inference.hold_bundle import COVERED_SECONDS, Bundle, CallRate
from services.inference.hold_room import LEFT_PARTS, Ahead, is_near, room, rounded_up
from services.inference.worst_case import Price, make_hold

PRICE = Price("v", 1_000_000_000, 5_000_000_000)
HOLD = make_hold(1_000, 100, PRICE, spare_tokens=50)
REQUESTS, TOKENS = limit_rule_pb2.LIMIT_UNIT_REQUESTS, limit_rule_pb2.LIMIT_UNIT_TOKENS
COST, CALLS = limit_rule_pb2.LIMIT_UNIT_COST_NANO_USD, limit_rule_pb2.LIMIT_UNIT_CONCURRENT_CALLS
HOT = 20.0


@given(st.integers(1, 200_000))
def test_a_size_covers_its_call_by_at_most_a_quarter_more(tokens: int) -> None:
    """Rounded up is never below, at most a quarter above, and a size of its own is not rounded again."""
    size = rounded_up(tokens)
    assert tokens <= size <= tokens + tokens // 4
    assert rounded_up(size) == size


@given(
    st.lists(st.tuples(st.sampled_from([REQUESTS, TOKENS, COST, CALLS]), st.integers(0, 10**9)), min_size=1),
    st.integers(0, 100),
)
def test_what_lies_ahead_is_never_more_than_its_part_of_any_rule(rules: list[tuple[int, int]], lying: int) -> None:
    """However many lie ahead already: with those that there is room for, no rule has more than a sixteenth of what it has left ahead."""
    limits = [LimitLeft("rule", remaining + 1, remaining, unit) for unit, remaining in rules]  # type: ignore[arg-type]
    before = Ahead.of([(HOLD, lying)])
    more = room(limits, HOLD, before)
    assert more is not None
    after = Ahead.of([(HOLD, lying + more)])
    for limit in limits:
        counted = {REQUESTS: after.count, CALLS: after.count, TOKENS: after.tokens, COST: after.cost_nano_usd}[limit.unit]
        assert not more or counted <= limit.remaining // LEFT_PARTS
    assert not more or not is_near(limits, after)


def test_a_rule_of_each_request_by_itself_leaves_no_less_room() -> None:
    """What counts nothing has nothing in use after a hold: it keeps nobody's hold from lying ahead."""
    by_itself = LimitLeft("tokens_per_request", 4_000, 4_000, TOKENS)
    assert room([by_itself], HOLD, Ahead()) is None
    assert room([by_itself, LimitLeft("requests_per_minute", 1_000, 999, REQUESTS)], HOLD, Ahead()) == 999 // LEFT_PARTS


def test_an_edge_is_near_when_an_eighth_of_what_is_left_lies_ahead() -> None:
    """Of 80 calls left ten may lie ahead before they are let go, and none of none."""
    left = LimitLeft("requests_per_minute", 1_000, 80, REQUESTS)
    assert not is_near([left], Ahead.of([(HOLD, 10)]))
    assert is_near([left], Ahead.of([(HOLD, 11)]))
    assert is_near([LimitLeft("requests_per_minute", 1_000, 0, REQUESTS)], Ahead.of([(HOLD, 1)]))


def test_a_pace_is_known_after_a_second_and_never_from_a_burst() -> None:
    """Sixty calls at once are no pace; 40 a second are one of about 40 once they have come for a second, and none after a pause."""
    burst = CallRate(0.0)
    for _ in range(60):
        burst.seen(0.0)
    assert burst.lasting(0.0) == 0.0
    assert burst.lasting(3.0) < HOT
    rate = CallRate(0.0)
    for number in range(1, 200):
        rate.seen(number / 40)
    assert 36 < rate.lasting(199 / 40) < 44
    rate.seen(199 / 40 + 2.0)
    assert rate.lasting(199 / 40 + 2.0) == 0.0


def test_a_bundle_is_filled_once_half_of_what_it_covers_is_used() -> None:
    """It lacks nothing while the pace is low, while it has more than half, or while some are on their way."""
    slow, hot = Bundle(HOLD, CallRate(0.0)), Bundle(HOLD, CallRate(0.0))
    for number in range(1, 400):
        hot.rate.seen(number / 100)
        if number % 10 == 0:
            slow.rate.seen(number / 100)
    now = 4.0
    assert slow.lacks(now, HOT) == 0
    lacking = hot.lacks(now, HOT)
    assert 100 * COVERED_SECONDS * 0.9 < lacking < 100 * COVERED_SECONDS * 1.1
    hot.asked = lacking
    assert hot.lacks(now, HOT) == 0
