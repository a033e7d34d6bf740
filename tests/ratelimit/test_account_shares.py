"""Provider accounts' limits in the service: beside a tenant's own rules, given back, waited for, and forgotten with the tenant."""

import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from mesh.common.v1 import lifecycle_service_pb2 as lifecycle
from mesh.common.v1 import lifecycle_service_pb2_grpc
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.errors import MeshError
from services.kernel.ids import ReservationId, new_uuid7
from services.kernel.tenant_context import TenantContext
from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.adapters.redis_shares import RedisShares
from services.ratelimit.adapters.redis_tickets import RedisTickets
from services.ratelimit.fencing import Fencing
from services.ratelimit.limits import Amounts, Demand
from services.ratelimit.open_allowance import OpenAllowance
from services.ratelimit.provider_share import AccountUse, ProviderShares
from services.ratelimit.ready_counters import ReadyCounters
from services.ratelimit.rebuild import Rebuilder
from services.ratelimit.reservation import Held, Request, Reservations
from services.ratelimit.terms import Terms
from services.ratelimit.waiting_room import WaitingRoom
from tests.ratelimit.callers import AtService, AtStore, Service, Stores, running_service, standard_terms
from tests.ratelimit.rules import rule
from tests.ratelimit.scripted_peer import Peer, running_peer
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
    async with running_service(redis_server.url, peer, provider_accounts={account: limits}, redis_timeout_seconds=2.0) as running:
        yield running


async def give_back(tenant: AtService, account: str, held: messages.ReserveResponse, **unused: int) -> None:
    """Gives back what a call did not use."""
    share = messages.ReturnedShare(
        tenant_id=tenant.tenant_id.bytes, account=account, take_time=held.share_take_time, request_unsent=False, **unused
    )
    await tenant.inference.unary(tenant.stub.ReturnShares, messages.ReturnSharesRequest(shares=[share]), timeout_seconds=5)


async def refusal(tenant: AtService, tokens: int, **fields: Any) -> MeshError:
    """Why a call is refused."""
    with pytest.raises(MeshError) as refused:
        await tenant.reserve(tokens, **fields)
    return refused.value


async def test_an_account_refuses_what_its_provider_would(service: Service, account: str) -> None:
    """The account's minute holds for all tenants together; a refusal says whose limit it is and holds nothing of the tenant's."""
    one, other = service.tenant_with(PLENTY), service.tenant_with(PLENTY)
    held = await one.reserve(300, provider_account=account, input_tokens=100)
    assert held.HasField("share_take_time")
    await other.reserve(300, provider_account=account, input_tokens=100)
    error = await refusal(other, 300, provider_account=account, input_tokens=100)
    assert (error.reason_name, error.metadata["account"]) == ("PROVIDER_SHARE", account)
    assert error.retry_after_seconds is not None
    assert (await other.limits())["rate"].used == 300
    assert not (await other.reserve(300, provider_account="unheard-of")).HasField("share_take_time")


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


async def test_what_a_call_did_not_use_is_given_back(service: Service, account: str) -> None:
    """Tokens given back are another call's within the same minute; no more is given back than was taken."""
    tenant = service.tenant_with(PLENTY)
    held = await tenant.reserve(500, provider_account=account, input_tokens=0)
    assert (await refusal(tenant, 400, provider_account=account)).reason_name == "PROVIDER_SHARE"
    await give_back(tenant, account, held, output_tokens=450)
    await tenant.reserve(400, provider_account=account)
    await give_back(tenant, account, held, output_tokens=10_000)
    assert (await refusal(tenant, 501, provider_account=account)).reason_name == "PROVIDER_SHARE"


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


async def test_a_share_is_waited_for(link: PipelinedLink, peer: Peer, account: str) -> None:
    """A call that may wait waits until the account has room, and is admitted then. The minute is short here."""
    window_us = 1_200_000
    stores = Stores(link)
    tenant = await AtStore(stores, link, standard_terms(tokens_per_minute=1000)).loaded()

    async def terms_of(context: TenantContext, at_least: int = 0) -> Terms:
        return tenant.terms

    fencing = Fencing(stores.decisions, None)  # type: ignore[arg-type] # no lease ends here
    rebuilder = Rebuilder(stores.snapshots, None)  # type: ignore[arg-type] # it is loaded already
    counters = ReadyCounters(terms_of, rebuilder, fencing, OpenAllowance(stores.decisions))
    shares = ProviderShares(RedisShares(link, window_us=window_us), {account: AccountUse(1, 0, 0)})
    reservations = Reservations(stores.decisions, counters, fencing, shares=shares, room=WaitingRoom(RedisTickets(stores.scripts)))
    context = peer.tenants.context(tenant.tenant_id)

    def request(max_wait_seconds: float) -> Request:
        return Request(ReservationId(new_uuid7()), Demand(Amounts(10, 0)), account=account, max_wait_seconds=max_wait_seconds)

    first = await reservations.reserve(context, request(0))
    with pytest.raises(MeshError):
        await reservations.reserve(context, request(0.2))
    began = time.monotonic()
    held = await reservations.reserve(context, request(5))
    assert isinstance(held, Held)
    assert held.answer.reserve_us - first.answer.reserve_us >= window_us
    assert held.waited_seconds > 0
    assert time.monotonic() - began < 3
    assert await tenant.link.send("EXISTS", f"{{{tenant.tenant_id}}}:waiters") == 0
