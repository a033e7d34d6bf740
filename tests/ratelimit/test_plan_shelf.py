"""Plans are kept for those who come again, and take a bounded part of a process, whoever has how many users."""

from hypothesis import given
from hypothesis import strategies as st

from mesh.tenant.v1.tenant_service_pb2 import TenantConfig
from services.ratelimit.adapters.tenant_rules import terms_of
from services.ratelimit.limits import Subject
from services.ratelimit.plan_shelf import PlanShelf, TenantPlans
from services.ratelimit.terms import Plan
from tests.ratelimit.test_limit_messages import RULES

ADDED = st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abcdef"), st.integers(1, 60)), max_size=80)


@given(ADDED)
def test_neither_one_tenant_nor_all_keep_more_than_their_bytes(added: list[tuple[int, str, int]]) -> None:
    """Whoever adds whatever: what is left of each is at most its bytes, of all at most theirs, and the newest of all is there."""
    shelf: PlanShelf[object] = PlanShelf(most_bytes=120)
    tenants = [TenantPlans(shelf, most_bytes=80) for _ in range(4)]
    sizes: dict[int, int] = {}
    for number, key, size in added:
        value = object()
        sizes[id(value)] = size
        if tenants[number].get(key) is None:
            tenants[number].add(key, value, size)
            assert tenants[number].get(key) is value
        left = [[size for each, size in tenant._values.values()] for tenant in tenants]
        assert all(sum(of_one) <= 80 for of_one in left)
        assert sum(map(sum, left)) <= 120
        assert [tenant._bytes for tenant in tenants] == [sum(of_one) for of_one in left]


def test_a_crowd_of_one_tenant_pushes_out_the_oldest_and_all_plans_are_as_before() -> None:
    """A tenant with more users than fit leaves its own first ones, then others' oldest; made again they say the same."""
    shelf: PlanShelf[Plan] = PlanShelf(most_bytes=200_000)
    config = TenantConfig(version=1)
    config.limit_rules.rules.extend(RULES)
    quiet, loud = terms_of(config, shelf), terms_of(config, shelf)
    plan = quiet.plan(Subject("ada"))
    assert quiet.plan(Subject("ada")) is plan
    for number in range(1_000):
        loud.plan(Subject(f"user-{number}"))
    assert loud.plan(Subject("user-999")) is loud.plan(Subject("user-999"))
    again = quiet.plan(Subject("ada"))
    assert again is not plan
    assert again == plan
    assert len(loud._plans._values) < 1_000
