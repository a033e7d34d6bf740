"""Plans are kept for those who come again, and take a bounded part of a process, whoever has how many users."""

from hypothesis import given
from hypothesis import strategies as st

from services.ratelimit.limit_rule import MINUTE_US, LimitRule, Scope, Unit, Window
from services.ratelimit.limits import Subject
from services.ratelimit.plan_shelf import PlanShelf, ShelfPart
from services.ratelimit.terms import Plan, Terms

ADDED = st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abcdef"), st.integers(1, 60)), max_size=80)


@given(ADDED)
def test_neither_one_part_nor_all_keep_more_than_their_bytes(added: list[tuple[int, str, int]]) -> None:
    """Whoever adds whatever: what is left of each is at most its bytes, of all at most theirs, and the newest of all is there."""
    shelf: PlanShelf[object] = PlanShelf(most_bytes=120)
    parts = [ShelfPart(shelf, most_bytes=80) for _ in range(4)]
    sizes: dict[int, int] = {}
    for number, key, size in added:
        value = object()
        sizes[id(value)] = size
        if parts[number].get(key) is None:
            parts[number].add(key, value, size)
            assert parts[number].get(key) is value
        left = [[size for each, size in part._values.values()] for part in parts]
        assert all(sum(of_one) <= 80 for of_one in left)
        assert sum(map(sum, left)) <= 120
        assert [part._bytes for part in parts] == [sum(of_one) for of_one in left]


def test_a_crowd_pushes_out_the_oldest_and_what_is_made_again_says_the_same() -> None:
    """More users than fit, by one set of rules, leave others' oldest no room."""
    shelf: PlanShelf[Plan] = PlanShelf(most_bytes=200_000)
    rules = [LimitRule("rpm", Unit.REQUESTS, Window.SLIDING, 10, MINUTE_US), LimitRule("day", Unit.TOKENS, Window.DAY, 9, scope=Scope.USER)]
    quiet, loud = (Terms(rules, shelf=shelf) for _ in range(2))
    plan = quiet.plan(Subject("ada"))
    assert quiet.plan(Subject("ada")) is plan
    for number in range(1_000):
        loud.plan(Subject(f"user-{number}"))
    assert loud.plan(Subject("user-999")) is loud.plan(Subject("user-999"))
    again = quiet.plan(Subject("ada"))
    assert again is not plan
    assert again == plan
    assert len(loud._plans._values) < 1_000
