"""Provider accounts' limits in the service: beside a tenant's own rules, given back, waited for, and forgotten with the tenant."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from mesh.common.v1 import lifecycle_service_pb2 as lifecycle
from mesh.common.v1 import lifecycle_service_pb2_grpc, limit_rule_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from mesh.tenant.v1.tenant_service_pb2 import TenantConfig
from services.kernel.errors import MeshError
from services.kernel.ids import ReservationId, TenantId, new_uuid7
from services.kernel.tenant_context import TenantContext
from services.ratelimit.adapters.tenant_rules import terms_of as rules_of
from services.ratelimit.fencing import Fencing
from services.ratelimit.limits import Amounts, Demand
from services.ratelimit.open_allowance import OpenAllowance
from services.ratelimit.provider_share import CountedCall, TakenShare
from services.ratelimit.ready_counters import ReadyCounters
from services.ratelimit.request import Request
from services.ratelimit.reservation import Reservations
from services.ratelimit.terms import Terms
from tests.ratelimit.callers import AtService, AtStore, Service, running_service
from tests.ratelimit.rules import rule
from tests.ratelimit.scripted_peer import Peer, running_peer
from tests.ratelimit.test_gathered import batch, item, said
from tests.support.stores import RedisStore as RedisServer

PLENTY = rule("rate", "tokens", 60, 1_000_000)


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    """The service's peers."""
    async with running_peer() as running:
        yield running


@pytest.fixture
def account() -> str:
    """An account of this test alone."""
    return f"main-{uuid4().hex}"


@pytest.fixture
async def service(redis_server: RedisServer, peer: Peer, account: str) -> AsyncIterator[Service]:
    """A service that knows the account: 3 requests, 1,000 input and 500 output tokens a minute."""
    limits = {"requests_per_minute": 3, "input_tokens_per_minute": 1000, "output_tokens_per_minute": 500}
    # One connection: what comes in one message reaches the account in its order.
    options = {"provider_accounts": {account: limits}, "redis_timeout_seconds": 2.0, "redis_connections": 1}
    async with running_service(redis_server.url, peer, **options) as running:
        yield running


async def settle(tenant: AtService, reservation_id: UUID, tokens: int, output_tokens: int | None = None) -> None:
    """Tells what a call used, as the ledger does."""
    commit = tenant.commit_message(reservation_id, messages.COMMIT_KIND_SETTLED, tokens=tokens)
    if output_tokens is not None:
        commit.output_tokens = output_tokens
    assert await tenant.commit(commit) == [messages.COMMIT_OUTCOME_DONE]


async def refusal(tenant: AtService, tokens: int, **fields: Any) -> MeshError:
    """Why a call is refused."""
    with pytest.raises(MeshError) as refused:
        await tenant.reserve(tokens, **fields)
    return refused.value


async def test_an_account_refuses_what_its_provider_would(service: Service, account: str) -> None:
    """The account's minute holds for all tenants together; a refusal says whose limit it is and holds nothing of the tenant's."""
    one, other = service.tenant_with(PLENTY), service.tenant_with(PLENTY)
    await one.reserve(300, provider_account=account, input_tokens=100)
    await other.reserve(300, provider_account=account, input_tokens=100)
    error = await refusal(other, 300, provider_account=account, input_tokens=100)
    assert (error.reason_name, error.metadata["account"]) == ("PROVIDER_SHARE", account)
    assert error.retry_after_seconds is not None
    assert (await other.limits())["rate"].used == 300
    for _ in range(4):
        await other.reserve(300, provider_account="unheard-of", input_tokens=100)


async def test_what_a_tenants_rule_refuses_takes_nothing_of_the_account(service: Service, account: str) -> None:
    """A call that a rule keeps out leaves the account to others."""
    tenant = service.tenant_with(rule("rate", "tokens", 60, 100))
    for _ in range(10):
        assert (await refusal(tenant, 200, provider_account=account, input_tokens=10)).reason_name == "PLAN_LIMIT"
    for _ in range(3):
        await tenant.reserve(20, provider_account=account, input_tokens=10)


async def test_a_repeated_reserve_takes_its_share_once(service: Service, account: str) -> None:
    """A caller that lost the answer repeats the call: one call is one request of the account."""
    tenant, id = service.tenant_with(PLENTY), new_uuid7()
    for _ in range(5):
        await tenant.reserve(20, id=id, provider_account=account, input_tokens=10)
    await tenant.reserve(20, provider_account=account, input_tokens=10)
    await tenant.reserve(20, provider_account=account, input_tokens=10)
    assert (await refusal(tenant, 20, provider_account=account, input_tokens=10)).reason_name == "PROVIDER_SHARE"


async def free_requests(tenant: AtService, account: str) -> int:
    """How many calls of a token the account has room for."""
    for count in range(10):
        try:
            await tenant.reserve(1, provider_account=account)
        except MeshError as error:
            assert error.reason_name == "PROVIDER_SHARE"
            return count
    raise AssertionError


async def test_an_id_that_comes_twice_in_a_batch_keeps_the_share_of_what_is_held(service: Service, account: str) -> None:
    """What gives its share back takes none from another attempt under the same id, be it with other amounts; larger ones are refused."""
    tenant = service.tenant_with(rule("rate", "tokens", 60, 100))
    small = service.tenant_with(rule("day", "tokens", "day", 50, "user"))
    id, other = new_uuid7(), new_uuid7()
    items = [item(tenant, tokens, id=id, provider_account=account) for tokens in (200, 20, 20, 30)]
    items += [item(small, tokens, id=other, provider_account=account, user=user) for tokens, user in ((51, "ada"), (52, ""), (40, "ada"))]
    outcomes = [said(outcome) for outcome in await batch(service, items)]
    assert outcomes == ["PLAN_LIMIT", "held", "held", "CONTENT_CONFLICT", "PLAN_LIMIT", "CONTENT_CONFLICT", "held"]
    assert await free_requests(service.tenant_with(PLENTY), account) == 1


class HalfTaken:
    """Gives the first who ask their share, and keeps the last waiting for ever; so does the giving back, once told of it."""

    def __init__(self, quick: int) -> None:
        self.quick = quick
        self.taken: list[TakenShare] = []
        self.given_back: list[TakenShare] = []
        self.waits, self.goes_on = asyncio.Event(), asyncio.Event()

    async def take(self, account: str, tenant_id: TenantId, weight: int, call_id: ReservationId, *_: object) -> TakenShare:
        if len(self.taken) == self.quick:
            self.waits.set()
            await asyncio.Event().wait()
        self.taken.append(TakenShare(account, tenant_id, call_id, len(self.taken) + 1))
        return self.taken[-1]

    async def give_back(self, shares: Sequence[TakenShare]) -> None:
        self.given_back += shares
        self.waits.set()
        await self.goes_on.wait()

    async def count(self, calls: Sequence[CountedCall]) -> None:
        raise AssertionError


async def given_up(service: Service, shares: HalfTaken, *amounts: Amounts) -> None:
    """Decides calls with these amounts, and leaves as soon as something is waited for."""
    config = TenantConfig(version=1, limit_rules=limit_rule_pb2.LimitRules(rules=[rule("largest", "tokens", "request", 100)]))
    store = await AtStore(service.stores, service.link, rules_of(config)).loaded()

    async def terms_of(context: TenantContext, at_least: int = 0) -> Terms:
        return store.terms

    unused = cast("Any", None)
    fencing = Fencing(store.store, unused)
    counters = ReadyCounters(terms_of, unused, fencing, OpenAllowance(store.store))
    reservations = Reservations(store.store, counters, fencing, shares=shares)
    context = service.peer.tenants.context(store.tenant_id)
    requests = [Request(ReservationId(new_uuid7()), Demand(each), account="main") for each in amounts]
    deciding = asyncio.ensure_future(reservations.decide(context, requests))
    await shares.waits.wait()
    deciding.cancel()
    shares.goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await deciding


async def test_shares_of_a_batch_that_is_given_up_are_given_back(service: Service) -> None:
    """Whoever leaves before all of its calls have their shares leaves none behind."""
    shares = HalfTaken(2)
    await given_up(service, shares, *[Amounts(1, 1)] * 3)
    assert shares.given_back == shares.taken != []


async def test_who_leaves_while_shares_are_given_back_leaves_none_behind(service: Service) -> None:
    """Those of all calls that are refused go at once, and not one after another."""
    shares = HalfTaken(4)
    await given_up(service, shares, Amounts(101, 1), Amounts(1, 1), Amounts(101, 1), Amounts(101, 1))
    assert shares.given_back == [shares.taken[place] for place in (0, 2, 3)]


async def test_what_a_call_did_not_use_comes_back_when_it_is_settled(service: Service, account: str) -> None:
    """Tokens that the ledger says were not used are another call's within the same minute; told again, they come back no second time."""
    tenant, id = service.tenant_with(PLENTY), new_uuid7()
    await tenant.reserve(500, id=id, provider_account=account, input_tokens=0)
    assert (await refusal(tenant, 400, provider_account=account)).reason_name == "PROVIDER_SHARE"
    await settle(tenant, id, 50, 50)
    await tenant.reserve(400, provider_account=account)
    await settle(tenant, id, 50, 50)
    assert (await refusal(tenant, 60, provider_account=account)).reason_name == "PROVIDER_SHARE"
    await tenant.reserve(50, provider_account=account)


async def test_input_that_was_not_used_comes_back(service: Service, account: str) -> None:
    """Input and output are limits of their own: each comes back by what was used of it."""
    tenant, id = service.tenant_with(PLENTY), new_uuid7()
    await tenant.reserve(1100, id=id, provider_account=account, input_tokens=900)
    assert (await refusal(tenant, 300, provider_account=account, input_tokens=200)).reason_name == "PROVIDER_SHARE"
    await settle(tenant, id, 350, 200)
    await tenant.reserve(900, provider_account=account, input_tokens=850)
    assert (await refusal(tenant, 10, provider_account=account, input_tokens=10)).metadata["limit"] == "1000"


async def test_a_ledger_that_does_not_tell_leaves_the_worst_case(service: Service, account: str) -> None:
    """Without the figure nothing comes back: too much is counted until the minute ends, never too little."""
    tenant, id = service.tenant_with(PLENTY), new_uuid7()
    await tenant.reserve(500, id=id, provider_account=account, input_tokens=0)
    await settle(tenant, id, 50)
    assert (await refusal(tenant, 400, provider_account=account)).reason_name == "PROVIDER_SHARE"


async def test_a_release_gives_back_nothing_of_a_call_that_was_settled(service: Service, account: str) -> None:
    """A late Release, of whatever epoch, or one of another epoch while the call runs, is ignored: the account counts what it was."""
    tenant, settled, running = service.tenant_with(PLENTY), new_uuid7(), new_uuid7()
    await tenant.reserve(300, id=settled, provider_account=account)
    await settle(tenant, settled, 300, 300)
    await tenant.reserve(200, id=running, provider_account=account)
    for id, epoch in ((settled, 1), (settled, 0), (running, 0), (running, 99)):
        release = messages.ReleaseRequest(reservation_id=str(id), epoch=epoch)
        await tenant.inference.unary(tenant.stub.Release, release, timeout_seconds=5, tenant=tenant.context)
    assert (await refusal(tenant, 1, provider_account=account)).metadata["used"] == "500"


async def test_tokens_of_a_call_that_was_not_billed_come_back(service: Service, account: str) -> None:
    """Voided or let go, a call leaves its request counted, as the provider may have seen it; one that may have been billed leaves all."""
    tenant, void, released, pinned = service.tenant_with(PLENTY), new_uuid7(), new_uuid7(), new_uuid7()
    await tenant.reserve(500, id=void, provider_account=account)
    await tenant.commit(tenant.commit_message(void, messages.COMMIT_KIND_VOID))
    await tenant.reserve(500, id=released, provider_account=account)
    release = messages.ReleaseRequest(reservation_id=str(released), epoch=1)
    await tenant.inference.unary(tenant.stub.Release, release, timeout_seconds=5, tenant=tenant.context)
    await tenant.reserve(500, id=pinned, provider_account=account)
    await tenant.commit(tenant.commit_message(pinned, messages.COMMIT_KIND_PIN))
    error = await refusal(tenant, 10, provider_account=account)
    assert (error.metadata["limit"], error.metadata["used"]) == ("3", "3")


async def test_no_other_tenant_gives_back_what_a_call_took(service: Service, account: str) -> None:
    """A call is known by its tenant and its id: a stranger's settlement of the very same id changes nothing here."""
    tenant, stranger, id = service.tenant_with(PLENTY), service.tenant_with(PLENTY), new_uuid7()
    await tenant.reserve(500, id=id, provider_account=account)
    await settle(stranger, id, 0, 0)
    assert (await refusal(stranger, 10, provider_account=account)).reason_name == "PROVIDER_SHARE"


async def test_an_erased_tenant_is_forgotten_in_every_account(service: Service, account: str) -> None:
    """A scan finds a tenant in the accounts it used, and after its erasure nowhere."""
    tenant = service.tenant_with(PLENTY)
    await tenant.reserve(20, provider_account=account, input_tokens=10)
    stub = lifecycle_service_pb2_grpc.TenantLifecycleServiceStub(service.tenant.channel)

    async def found() -> int:
        response = await service.tenant.unary(stub.ScanTenant, lifecycle.ScanTenantRequest(), timeout_seconds=10, tenant=tenant.context)
        return {store.store: store.found_count for store in response.stores}["redis:accounts"]

    assert await found() == 1
    erased = await service.tenant.unary(stub.EraseTenant, lifecycle.EraseTenantRequest(), timeout_seconds=10, tenant=tenant.context)
    assert {item.kind: item.count for item in erased.erased}["redis:accounts"] == 1
    assert await found() == 0
