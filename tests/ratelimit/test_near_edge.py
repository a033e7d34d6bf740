"""What happens where a call does not fit any more: it is shortened where its rules allow that, and grown where it still fits."""

from typing import Any

import pytest

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from tests.ratelimit.callers import AtService, Service
from tests.ratelimit.rules import SHADOW, rule

SHORTEN = rules.NearEdge(shorten=True, min_output_tokens=10)


async def refused(tenant: AtService, *amounts: int, **fields: Any) -> MeshError:
    """The refusal of a call."""
    with pytest.raises(MeshError) as caught:
        await tenant.reserve(*amounts, **fields)
    return caught.value


def shorten(most: int, fewest: int = 1, price: int = 0) -> messages.Shorten:
    """How a call may be shortened."""
    return messages.Shorten(max_output_tokens=most, min_output_tokens=fewest, output_nano_usd_per_million=price)


async def test_a_call_is_shortened_to_what_is_left(service: Service) -> None:
    """It gets the largest output that fits all rules at once, is told so, and holds no more than that."""
    tenant = service.tenant_with(
        rule("tokens", "tokens", "day", 1000, near_edge=SHORTEN), rule("money", "cost", "month", 900, near_edge=SHORTEN)
    )
    held = await tenant.reserve(500, 5000, shorten=shorten(400, price=12_000_000))
    # 12 nano-USD a token: 342 tokens left out save the 4100 that do not fit, rounded so that money is never short.
    assert (held.granted.tokens, held.granted.cost_nano_usd, held.granted_output_tokens, held.shortened) == (158, 896, 58, True)
    assert {name: status.used for name, status in (await tenant.limits()).items()} == {"tokens": 158, "money": 896}


async def test_a_call_that_fits_is_not_shortened(service: Service) -> None:
    """What may be shortened is not, as long as it fits whole."""
    tenant = service.tenant_with(rule("tokens", "tokens", "day", 1000, near_edge=SHORTEN))
    held = await tenant.reserve(1000, shorten=shorten(400))
    assert (held.granted.tokens, held.granted_output_tokens, held.shortened) == (1000, 400, False)


@pytest.mark.parametrize(("fewest", "left", "fits"), [(1, 110, True), (1, 109, False), (20, 120, True), (20, 119, False)])
async def test_a_call_is_never_shortened_below_what_is_of_use(service: Service, fewest: int, left: int, fits: bool) -> None:
    """The larger of the caller's and the rule's minimum must fit; otherwise it is refused whole and nothing is held."""
    tenant = service.tenant_with(rule("tokens", "tokens", "day", left, near_edge=SHORTEN))
    if fits:
        assert (await tenant.reserve(500, shorten=shorten(400, fewest))).granted_output_tokens == max(fewest, 10)
    else:
        await refused(tenant, 500, shorten=shorten(400, fewest))
        assert (await tenant.limits())["tokens"].used == 0


async def test_every_rule_in_the_way_must_allow_it(service: Service) -> None:
    """One rule that does not allow shortening, or that no shorter output helps, refuses the call."""
    tenant = service.tenant_with(rule("soft", "tokens", "day", 100, near_edge=SHORTEN), rule("hard", "tokens", "month", 300))
    assert (await refused(tenant, 500, shorten=shorten(480))).metadata["rule"] in ("soft", "hard")
    assert (await tenant.reserve(250, shorten=shorten(240))).granted.tokens == 100
    slots = service.tenant_with(rule("soft", "tokens", "day", 100, near_edge=SHORTEN), rule("slots", "running", "running", 0))
    await refused(slots, 500, shorten=shorten(480))


async def test_a_caller_that_cannot_be_shortened_is_refused(service: Service) -> None:
    """Shortening is offered by the caller: without, the rule refuses."""
    tenant = service.tenant_with(rule("tokens", "tokens", "day", 100, near_edge=SHORTEN))
    assert (await refused(tenant, 101)).reason_name == "PLAN_LIMIT"


async def test_a_shortened_call_repeated_is_the_same_hold(service: Service) -> None:
    """The same request gets the same grant, though less would fit by then."""
    tenant = service.tenant_with(rule("tokens", "tokens", "day", 100, near_edge=SHORTEN))
    reservation_id = new_uuid7()
    first = await tenant.reserve(500, id=reservation_id, shorten=shorten(480))
    again = await tenant.reserve(500, id=reservation_id, shorten=shorten(480))
    assert (again.granted, again.granted_output_tokens, again.shortened) == (first.granted, first.granted_output_tokens, True)


async def test_prices_beyond_what_a_double_multiplies_are_exact(service: Service) -> None:
    """A million output tokens at a price of 10^9 nano-USD each are taken apart without losing one."""
    price = 999_999_999_999_999
    budget = 123_456_789_012_345
    tenant = service.tenant_with(rule("money", "cost", "month", budget, near_edge=SHORTEN))
    held = await tenant.reserve(1_000_000, 10**15, shorten=shorten(1_000_000, price=price))
    left_out = 1_000_000 - held.granted_output_tokens
    assert held.granted.cost_nano_usd == 10**15 - left_out * price // 1_000_000 <= budget
    assert 10**15 - (left_out - 1) * price // 1_000_000 > budget


@pytest.mark.parametrize(
    ("short", "amounts", "field"),
    [
        (shorten(10, 11), (100, 100), "shorten.min_output_tokens"),
        (shorten(101), (100, 100), "shorten.max_output_tokens"),
        (shorten(100, price=2_000_000), (100, 100), "shorten.output_nano_usd_per_million"),
    ],
)
async def test_amounts_must_hold_the_output_they_are_shortened_by(
    service: Service, short: messages.Shorten, amounts: tuple[int, int], field: str
) -> None:
    """What does not add up is the caller's fault and holds nothing."""
    tenant = service.tenant_with(rule("tokens", "tokens", "day", 10, near_edge=SHORTEN))
    error = await refused(tenant, *amounts, shorten=short)
    assert (error.code.name, error.metadata["field"]) == ("INVALID_ARGUMENT", field)
    assert set(await tenant.store.dump()) == {None}


async def test_a_stream_is_extended_under_every_rule_or_not_at_all(service: Service) -> None:
    """More is held where all rules have room; where one has not, nothing changes and the refusal names it."""
    tenant = service.tenant_with(rule("tokens", "tokens", "day", 100, lifting_plan="pro"), rule("money", "cost", "month", 1000))
    reservation_id = new_uuid7()
    await tenant.reserve(40, 400, id=reservation_id, user="ada", feature="chat")
    extended = await tenant.extend(reservation_id, 60, 500)
    assert (extended.granted.tokens, extended.granted.cost_nano_usd) == (60, 500)
    for tokens, cost, name in ((101, 500, "tokens"), (60, 1001, "money"), (70, 1001, "money")):
        before = await tenant.store.dump()
        with pytest.raises(MeshError) as caught:
            await tenant.extend(reservation_id, tokens, cost)
        assert (caught.value.code.name, caught.value.metadata["rule"]) == ("RESOURCE_EXHAUSTED", name)
        assert await tenant.store.dump() == before
    for tokens, cost in ((60, 500), (10, 10), (100, 1000), (100, 1000)):
        extended = await tenant.extend(reservation_id, tokens, cost)
    assert {name: status.used for name, status in (await tenant.limits()).items()} == {"tokens": 100, "money": 1000}
    await tenant.settled(reservation_id, 70, 600)
    assert {name: status.used for name, status in (await tenant.limits()).items()} == {"tokens": 70, "money": 600}


async def test_an_extension_beyond_a_rule_of_each_call_is_told_the_whole_call(service: Service) -> None:
    """Such a rule looks at all that the call would hold, and not at what is added: the sentence says so much."""
    tenant, reservation_id = service.tenant_with(rule("tokens_per_call", "tokens", "request", 600)), new_uuid7()
    await tenant.reserve(500, id=reservation_id)
    with pytest.raises(MeshError) as caught:
        await tenant.extend(reservation_id, 700)
    assert caught.value.reason_name == "REQUEST_TOO_LARGE"
    assert caught.value.message.startswith("amounts: This call needs 700 of 600 tokens per call")


@pytest.mark.parametrize("user", ["ada", "ada@1", "a:b@1790000000", "@0"])
@pytest.mark.parametrize("window", [60, "day"])
async def test_an_extension_is_bound_whatever_its_user_is_called(service: Service, user: str, window: int | str) -> None:
    """A name that looks like the end of a counter's name is a name: the user's rule refuses what does not fit."""
    tenant = service.tenant_with(rule("each", "tokens", window, 100, "user"))
    reservation_id = new_uuid7()
    await tenant.reserve(40, id=reservation_id, user=user)
    with pytest.raises(MeshError) as caught:
        await tenant.extend(reservation_id, 101)
    assert (caught.value.code.name, caught.value.metadata["rule"]) == ("RESOURCE_EXHAUSTED", "each")
    assert (await tenant.limits(user=user))["each"].used == 40


async def test_an_extended_call_is_told_of_rules_that_do_not_count_it(service: Service) -> None:
    """A retry is no further request, yet it is told how many of them were made."""
    tenant = service.tenant_with(
        rule("requests", "requests", 60, 10),
        rule("day", "requests", "day", 10),
        rule("retries", "retries", 60, 10),
        rule("all", "tokens", 60, 100),
    )
    await tenant.reserve(1)
    retry = new_uuid7()
    await tenant.reserve(1, id=retry, attempt=2)
    extended = await tenant.extend(retry, 5)
    assert {status.rule: status.used for status in extended.limits} == {"requests": 1, "day": 1, "retries": 1, "all": 6}


async def test_only_a_living_hold_of_this_epoch_is_extended(service: Service) -> None:
    """An unknown, ended, lapsed or older hold is RESERVATION_LOST: its stream must not go past what it held."""
    tenant = service.tenant_with(rule("tokens", "tokens", "day", 1000))
    settled, lapsed, held = new_uuid7(), new_uuid7(), new_uuid7()
    for reservation_id in (settled, lapsed, held):
        await tenant.reserve(10, id=reservation_id)
    await tenant.settled(settled, 10)
    await tenant.store.end_lease(lapsed)
    for reservation_id, epoch in ((new_uuid7(), 1), (settled, 1), (lapsed, 1), (held, 0), (held, 2)):
        with pytest.raises(MeshError) as caught:
            await tenant.extend(reservation_id, 20, epoch=epoch)
        assert caught.value.reason_name == "RESERVATION_LOST"


async def test_an_extension_that_only_dead_holds_keep_out_asks_about_them_first(service: Service) -> None:
    """A stream is not stopped for the hold of a caller that is gone."""
    tenant = service.tenant_with(rule("tokens", "tokens", "day", 100))
    dead, living = new_uuid7(), new_uuid7()
    await tenant.reserve(60, id=dead)
    await tenant.reserve(40, id=living)
    await tenant.store.end_lease(dead)
    assert (await tenant.extend(living, 100)).granted.tokens == 100


async def test_shadow_rules_shorten_for_themselves_alone(service: Service) -> None:
    """A shadow rule that would have shortened counts the shorter call, and grants the whole one."""
    tenant = service.tenant_with(rule("trial", "tokens", "day", 100, near_edge=SHORTEN, mode=SHADOW))
    held = await tenant.reserve(500, shorten=shorten(480))
    assert (held.granted.tokens, held.shortened, len(held.shadow_refusals)) == (500, False, 0)
    assert (await tenant.limits())["trial"].used == 100
