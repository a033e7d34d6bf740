"""Rules of every kind, through the service: scopes, bursts, retries, single requests, shadow, and what changes when they change."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.status_pb2 import Status

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.metering.v1 import ledger_service_pb2 as ledger
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from services.ratelimit.adapters import redis_store
from tests.ratelimit.callers import AtService, AtStore, Service, now_us
from tests.ratelimit.rules import SHADOW, rule
from tests.ratelimit.scripted_peer import LedgerCall


async def refused(tenant: AtService, tokens: int = 0, cost: int = 0, **fields: object) -> MeshError:
    """The refusal of a call."""
    with pytest.raises(MeshError) as caught:
        await tenant.reserve(tokens, cost, **fields)  # type: ignore[arg-type] # fields of the message
    return caught.value


async def test_users_and_features_have_their_own_limits_within_the_tenants(service: Service) -> None:
    """Each scope counts by itself and all hold: one user's use is not another's, and all of it is the tenant's."""
    tenant = service.tenant_with(
        rule("all", "tokens", "day", 100),
        rule("each_user", "tokens", "day", 40, "user"),
        rule("chat_only", "tokens", "day", 30, "feature", feature="chat"),
        rule("pair", "requests", 60, 2, "both"),
    )
    await tenant.reserve(40, user="ada")
    assert (await refused(tenant, 1, user="ada")).metadata["rule"] == "each_user"
    await tenant.reserve(10, user="bob", feature="chat")
    await tenant.reserve(10, user="bob", feature="chat")
    assert (await refused(tenant, 1, user="bob", feature="chat")).metadata["rule"] == "pair"
    assert (await refused(tenant, 11, user="eve", feature="chat")).metadata["rule"] == "chat_only"
    await tenant.reserve(30, feature="search")
    told = (await refused(tenant, 11)).metadata
    assert (told["rule"], told["used"]) == ("all", "90")
    assert {name: status.used for name, status in (await tenant.limits(user="bob", feature="chat")).items()} == {
        "all": 90,
        "each_user": 20,
        "chat_only": 20,
        "pair": 2,
    }
    assert list(await tenant.limits()) == ["all"]


async def test_names_that_look_alike_do_not_share_counters(service: Service) -> None:
    """Whatever users are called, no two of them are counted as one."""
    tenant = service.tenant_with(rule("pair", "requests", 60, 1, "both"), rule("user", "tokens", "day", 10, "user"))
    for user, feature in (("a", "b:c"), ("a:b", "c"), ("a@1", "x"), ("a", "1@x"), ("ab", "c"), ("ä\n%d", "c")):
        await tenant.reserve(0, user=user, feature=feature)
    await tenant.reserve(10, user="ab@123")
    await tenant.reserve(10, user="ab@12")
    assert [(await tenant.limits(user=user))["user"].used for user in ("ab@123", "ab@12", "ab@1", "ab")] == [10, 10, 0, 0]


async def test_running_calls_are_counted_for_each_user(service: Service) -> None:
    """A user's slots are its own, freed when its calls end."""
    tenant = service.tenant_with(rule("slots", "running", "running", 1, "user"))
    first = new_uuid7()
    await tenant.reserve(1, id=first, user="ada")
    await tenant.reserve(1, user="bob")
    assert (await refused(tenant, 1, user="ada")).reason_name == "CONCURRENCY"
    await tenant.settled(first, 1)
    await tenant.reserve(1, user="ada")


async def test_a_burst_and_a_retry_say_what_they_are(service: Service) -> None:
    """Too much at once is BURST_LIMIT; a further attempt is no request but a retry, and its budget leaves first attempts alone."""
    tenant = service.tenant_with(rule("burst", "requests", 10, 2, burst=True), rule("retry_budget", "retries", 60, 1))
    await tenant.reserve(1)
    await tenant.reserve(1, attempt=2)
    assert (await refused(tenant, 1, attempt=3)).reason_name == "RETRY_BUDGET"
    await tenant.reserve(1)
    error = await refused(tenant, 1)
    assert (error.reason_name, error.code.name) == ("BURST_LIMIT", "RESOURCE_EXHAUSTED")
    assert error.retry_after_seconds is not None
    assert error.retry_after_seconds <= 10


async def test_a_rule_of_each_request_adds_nothing_up(service: Service) -> None:
    """As many calls as you like, none larger than the rule."""
    tenant = service.tenant_with(rule("largest", "tokens", "request", 100, lifting_plan="pro"))
    for _ in range(5):
        await tenant.reserve(100)
    error = await refused(tenant, 101)
    assert (error.code.name, error.reason_name, error.metadata["lifting_plan"]) == ("INVALID_ARGUMENT", "REQUEST_TOO_LARGE", "pro")


async def test_a_limit_of_nothing_refuses_everything(service: Service) -> None:
    """0 is a limit like any other; what is unlimited has no rule."""
    tenant = service.tenant_with(rule("none", "requests", "day", 0))
    assert (await refused(tenant, 1)).retry_after_seconds is None


async def test_shadow_refuses_nobody_and_says_so(service: Service) -> None:
    """The answer names the shadow rules that would have refused, with the sentence they would have said."""
    tenant = service.tenant_with(rule("trial", "requests", 60, 1, mode=SHADOW, lifting_plan="pro"), rule("real", "requests", 60, 3))
    assert not (await tenant.reserve(1)).shadow_refusals
    for _ in range(2):
        (shadow,) = (await tenant.reserve(1)).shadow_refusals
        assert (shadow.status.rule, shadow.status.used, shadow.status.mode, shadow.lifting_plan) == ("trial", 1, SHADOW, "pro")
        assert "1 of 1 trial are in use" in shadow.message
    assert (await refused(tenant, 1)).metadata["rule"] == "real"
    assert {name: status.used for name, status in (await tenant.limits()).items()} == {"trial": 1, "real": 3}


async def test_changed_numbers_hold_at_once_and_rebuild_nothing(service: Service) -> None:
    """Limits are looked at anew in each decision: a raised or lowered one needs no new count."""
    tenant = service.tenant_with(rule("day", "tokens", "day", 10))
    await tenant.reserve(10)
    await refused(tenant, 1)
    change(service, tenant, 2, rule("month", "tokens", "month", 30), rule("day", "tokens", "day", 20))
    await tenant.reserve(10)
    change(service, tenant, 3, rule("day", "tokens", "day", 5))
    assert (await refused(tenant, 1)).metadata["used"] == "20"
    assert service.peer.ledger.epoch_count == 1


async def test_a_new_kind_of_rule_counts_what_was_used_before_it(service: Service) -> None:
    """A rule over another window or scope is loaded from the ledger, and holds for what each user has used already."""
    tenant = service.tenant_with(rule("day", "tokens", "day", 100))
    for user, tokens in (("ada", 30), ("bob", 5)):
        reservation_id = new_uuid7()
        held = await tenant.reserve(tokens, id=reservation_id, user=user)
        service.peer.ledger.of(tenant.tenant_id).calls[reservation_id.bytes] = LedgerCall(
            ledger.CALL_STATE_SETTLED, held.reserve_time.ToMicroseconds(), tokens, user=user
        )
    change(service, tenant, 2, rule("day", "tokens", "day", 100), rule("each", "tokens", "month", 31, "user"))
    await tenant.reserve(1, user="ada")
    assert (await refused(tenant, 1, user="ada")).metadata["rule"] == "each"
    assert (await tenant.limits(user="bob"))["each"].used == 5
    assert service.peer.ledger.epoch_count == 2


async def test_a_replica_with_older_rules_decides_by_the_newer_ones(service: Service) -> None:
    """While two versions are about, counters loaded for the newer are not thrown away by the older: its caller is decided by the newer."""
    tenant = service.tenant_with(rule("day", "tokens", "day", 100))
    old = tenant.context
    await tenant.reserve(1)
    change(service, tenant, 2, rule("each", "tokens", "month", 3, "user"))
    await tenant.reserve(1, user="ada")
    tenant.context = old
    assert (await refused(tenant, 3, user="ada")).metadata["rule"] == "each"
    assert service.peer.ledger.epoch_count == 2


async def test_days_are_those_of_the_tenants_place_and_cycles_those_of_its_subscription(service: Service) -> None:
    """Kiritimati is 26 hours from Baker Island: what is today there and here is counted there, and the reset is its midnight."""
    zone = rules.LimitRules(rules=[rule("day", "tokens", "day", 100), rule("cycle", "cost", "cycle", 100)], time_zone="Pacific/Kiritimati")
    zone.cycle_anchor_time.CopyFrom(Timestamp(seconds=1_735_689_600))
    tenant = service.tenant_with(rule("day", "tokens", "day", 100))
    tenant.context = service.peer.tenants.context(tenant.tenant_id, zone)
    await tenant.reserve(7, 9)
    limits = await tenant.limits()
    assert {name: status.used for name, status in limits.items()} == {"day": 7, "cycle": 9}
    shift = 14 * 3600
    assert (limits["day"].reset_time.seconds + shift) % 86_400 == 0
    assert 0 < limits["day"].reset_time.ToMicroseconds() - now_us() <= 86_400 * 10**6
    assert limits["cycle"].reset_time.ToMicroseconds() - now_us() <= 31 * 86_400 * 10**6


async def test_a_batch_decides_each_item_by_itself_and_in_order(service: Service) -> None:
    """Held, refused and failed beside each other, each of its own tenant; a bad token fails alone."""
    first, second = service.tenant_with(rule("two", "requests", 60, 2)), service.tenant_with(rule("day", "tokens", "day", 10))
    items = [batch_item(first, 1), batch_item(second, 11), batch_item(first, 1), batch_item(first, 1), batch_item(second, 10)]
    items.append(messages.ReserveBatchItem(context_token="x.y", request=items[0].request))
    items.append(batch_item(first, 1, id="0190a0a0-0000-4000-8000-000000000000"))
    answer = await service.inference.unary(first.stub.ReserveBatch, messages.ReserveBatchRequest(items=items), timeout_seconds=5)
    assert [item.WhichOneof("outcome") for item in answer.outcomes] == [
        "held",
        "refused",
        "held",
        "refused",
        "held",
        "error_status",
        "error_status",
    ]
    assert (answer.outcomes[3].refused.reason, answer.outcomes[3].refused.status.rule) == ("PLAN_LIMIT", "two")
    assert answer.outcomes[1].refused.status.rule == "day"
    assert (await first.limits())["two"].used == 2


async def test_an_item_that_makes_no_sense_fails_alone_in_a_batch(service: Service) -> None:
    """Also where it is its tenant's only one: another tenant's item is decided."""
    first, other = service.tenant_with(rule("rate", "tokens", 60, 10)), service.tenant_with(rule("rate", "tokens", 60, 10))
    items = [batch_item(first, 1), batch_item(other, 1)]
    items[0].request.user = "a\x00b"
    answer = await service.inference.unary(first.stub.ReserveBatch, messages.ReserveBatchRequest(items=items), timeout_seconds=5)
    assert [outcome.WhichOneof("outcome") for outcome in answer.outcomes] == ["error_status", "held"]


async def test_a_token_that_proves_no_tenant_fails_alone_in_a_batch(service: Service) -> None:
    """An operator's context acts for nobody here; the items beside it are decided."""
    tenant = service.tenant_with(rule("rate", "tokens", 60, 10))
    items = [batch_item(tenant, 1), batch_item(tenant, 1), batch_item(tenant, 1)]
    items[1].context_token = service.peer.tenants.operator().context_token
    answer = await service.inference.unary(tenant.stub.ReserveBatch, messages.ReserveBatchRequest(items=items), timeout_seconds=5)
    assert [outcome.WhichOneof("outcome") for outcome in answer.outcomes] == ["held", "error_status", "held"]
    assert Status.FromString(answer.outcomes[1].error_status).code == grpc.StatusCode.UNAUTHENTICATED.value[0]
    assert (await tenant.limits())["rate"].used == 2


def batch_item(tenant: AtService, tokens: int, id: str = "") -> messages.ReserveBatchItem:
    """One reservation of a batch."""
    request = messages.ReserveRequest(reservation_id=id or str(new_uuid7()), amounts=messages.Amounts(tokens=tokens))
    return messages.ReserveBatchItem(context_token=tenant.context.token, request=request)


def change(service: Service, tenant: AtService, version: int, *limit_rules: rules.LimitRule) -> None:
    """Gives the tenant other rules under a new version."""
    tenant.context = service.peer.tenants.context(tenant.tenant_id, rules.LimitRules(rules=limit_rules), version)


async def test_a_clock_that_is_days_off_is_put_right_once_for_all_who_ask(
    at_store: Callable[..., AtStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many decisions find at the same time that this process does not know the day, each is decided by the store's day."""

    class DaysAhead(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override] # a plain datetime is what callers want
            return datetime.now(tz) + timedelta(days=3)

    tenant = at_store(tokens_per_day=100)
    await tenant.loaded()
    monkeypatch.setattr(redis_store, "datetime", DaysAhead)
    for _ in range(2):
        async with asyncio.TaskGroup() as group:
            looks = [group.create_task(tenant.used()) for _ in range(50)]
        assert {look.result() for look in looks} == {(0, 0, 0, 0, 0)}
    assert abs(tenant.store._ahead_us + 3 * 86_400 * 10**6) < 60 * 10**6
