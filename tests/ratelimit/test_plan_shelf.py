"""Plans are kept for those who come again, and take a bounded part of a process, whoever has how many users."""

from hypothesis import given
from hypothesis import strategies as st

from services.ratelimit.limit_rule import MINUTE_US, LimitRule, Scope, Unit, Window
from services.ratelimit.limits import Subject
from services.ratelimit.plan_shelf import PlanShelf, ShelfPart
from services.ratelimit.terms import Plan, Terms

ADDED = st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abcdef"), st.integers(1, 60)), max_size=80)


@given(ADDED)
def test_all_together_keep_no_more_than_their_bytes(added: list[tuple[int, str, int]]) -> None:
    """Whoever adds whatever: what is kept is at most so much, nobody who keeps little loses anything to one who keeps more."""
    shelf: PlanShelf[object] = PlanShelf(most_bytes=120)
    parts = [ShelfPart(shelf) for _ in range(4)]
    for number, key, size in added:
        if parts[number].get(key) is not None:
            continue
        before = [part.kept_bytes for part in parts]
        value = object()
        parts[number].add(key, value, size)
        before[number] += size
        assert [part.kept_bytes for part in parts] == [sum(size for _, size in part._values.values()) for part in parts]
        assert sum(part.kept_bytes for part in parts) <= 120
        assert all(part.kept_bytes == size for part, size in zip(parts, before, strict=True) if size < max(before) and size * 4 < 120)


def test_a_crowd_pushes_out_its_own_and_what_is_made_again_says_the_same() -> None:
    """More users than fit, by one set of rules, leave those of others alone."""
    shelf: PlanShelf[Plan] = PlanShelf(most_bytes=200_000)
    rules = [LimitRule("rpm", Unit.REQUESTS, Window.SLIDING, 10, MINUTE_US), LimitRule("day", Unit.TOKENS, Window.DAY, 9, scope=Scope.USER)]
    quiet, loud = (Terms(rules, shelf=shelf) for _ in range(2))
    kept, first = quiet.plan(Subject("ada")), loud.plan(Subject("user-0"))
    for number in range(1_000):
        loud.plan(Subject(f"user-{number}"))
    assert loud.plan(Subject("user-999")) is loud.plan(Subject("user-999"))
    assert quiet.plan(Subject("ada")) is kept
    again = loud.plan(Subject("user-0"))
    assert again is not first
    assert again == first
    assert len(loud._plans._values) < 1_000
