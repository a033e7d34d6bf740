"""Batch methods, called by the right service with one tenant's id and another tenant's reservation: nothing crosses."""

import asyncio
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

import pytest

from mesh.metering.v1 import ledger_service_pb2 as ledger
from mesh.metering.v1 import price_service_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2 as limits
from services.kernel.ids import TenantId, new_uuid7
from tests.isolation.attack_cases import aimed_at
from tests.isolation.credentials_forged import Inside
from tests.isolation.fingerprint import fingerprint
from tests.isolation.rounds import MTLS, PGBOUNCER, PLAIN, over
from tests.isolation.surface import Surface
from tests.isolation.target import Target, in_seconds, plant
from tests.support.mesh import Mesh

# Through PgBouncer as well: batches name their tenants one by one, on sessions that have been left with the attacked one.
pytestmark = over(PLAIN, MTLS, PGBOUNCER)

MODEL = "claude-haiku-4-5-20251001"
CATCH_UP_SECONDS = 5.0
BOUND_TOKENS = 1000
BOUND_NANO_USD = 5_000_000


@pytest.fixture
def victim(resident: Target) -> Target:
    """The attacked tenant: these attacks are the same wherever its content lives."""
    return resident


@pytest.fixture
async def attacker(mesh: Mesh, surface: Surface) -> Target:
    """A newcomer: who has begun epochs that its limits did not hear of is told STALE_EPOCH until they catch up."""
    return await plant(mesh, surface)


@dataclass(frozen=True, slots=True)
class Running:
    """A call of a tenant that is reserved at the limits and, once opened, recorded in the ledger."""

    tenant_id: UUID
    reservation_id: UUID
    call_id: UUID
    epoch: int
    context: str

    @property
    def ref(self) -> dict[str, bytes]:
        """As batches name it."""
        return {"tenant_id": self.tenant_id.bytes, "reservation_id": self.reservation_id.bytes}


class Protocol:
    """The call protocol, spoken as the services speak it."""

    def __init__(self, surface: Surface, inside: Inside) -> None:
        self._surface = surface
        self._inside = inside

    async def say(self, port: str, method: str, service: str, **fields: Any) -> Any:
        """One batch call by this service, as a message."""
        rpc = self._surface.find(port, method)
        answer = await self._surface.call(rpc, rpc.request_type(**fields), self._inside.as_service(service))
        assert answer.code == "OK", (method, answer)
        return answer.messages[0]

    async def reserve(self, target: Target) -> Running:
        """Takes a hold for a tenant."""
        context, reservation_id = await self._inside.context_of(target.tenant.api_key), new_uuid7()
        rpc = self._surface.find("ratelimit", "RateLimitService/Reserve")
        amounts = limits.Amounts(tokens=BOUND_TOKENS, cost_nano_usd=BOUND_NANO_USD)
        request = limits.ReserveRequest(reservation_id=str(reservation_id), amounts=amounts)
        metadata = self._inside.as_service("inference", context=context, tenant_id=target.tenant_id)
        while (answer := await self._surface.call(rpc, request, metadata)).reason == "LIMITS_REBUILDING":
            continue
        assert answer.code == "OK", answer
        epoch = answer.messages[0].epoch  # type: ignore[attr-defined] # a class of the reflected pool
        return Running(target.tenant_id, reservation_id, uuid4(), epoch, context)

    async def open(self, *calls: Running) -> list[int]:
        """Opens calls in one batch and returns each one's outcome."""
        book = self._surface.find("metering", "PriceService/GetPriceBook")
        prices = await self._surface.call(book, price_service_pb2.GetPriceBookRequest(), self._inside.as_service("inference"))
        version = prices.messages[0].version  # type: ignore[attr-defined] # a class of the reflected pool
        items = [
            {
                "ref": call.ref,
                "context_token": call.context,
                "call_id": call.call_id.bytes,
                "attempt": 1,
                "epoch": call.epoch,
                "reserve_time": in_seconds(0),
                "bound_tokens": BOUND_TOKENS,
                "bound_nano_usd": BOUND_NANO_USD,
                "price_version": version,
                "provider": "anthropic",
                "model": MODEL,
                "dispatch_deadline": in_seconds(30),
            }
            for call in calls
        ]
        opened = await self.say("metering", "LedgerService/OpenCalls", "inference", calls=items)
        return [result.outcome for result in opened.results]

    async def state_of(self, target: Target, call: Running) -> int:
        """Where the ledger has the call, for its own tenant; 0 when it has none."""
        rpc = self._surface.find("metering", "UsageService/GetCall")
        answer = await self._surface.call(rpc, rpc.request_type(call_id=str(call.call_id)), target.metadata)
        return int(answer.messages[0].attempts[0].state) if answer.messages else 0  # type: ignore[attr-defined] # as above

    async def used(self, target: Target) -> dict[str, int]:
        """What a tenant's limits count now."""
        rpc = self._surface.find("ratelimit", "RateLimitService/ListLimits")
        answer = await self._surface.call(rpc, rpc.request_type(), target.metadata)
        return {status.rule: status.used for status in answer.messages[0].limits}  # type: ignore[attr-defined] # as above


async def test_a_batch_opens_only_what_its_own_token_proves(surface: Surface, inside: Inside, victim: Target, attacker: Target) -> None:
    """An item whose token is of another tenant, forged or absent is TENANT_NOT_PROVEN and leaves no row; its neighbours are opened."""
    protocol = Protocol(surface, inside)
    # The one that is opened last: on a busy machine its lease would end while the other is taken.
    other, good = await protocol.reserve(victim), await protocol.reserve(attacker)
    stolen = replace(other, context=good.context)
    damaged = replace(other, context=other.context[:-4] + "AAAA")
    outcomes = await protocol.open(stolen, good, damaged, replace(other, context=""), replace(good, tenant_id=victim.tenant_id))
    refused = ledger.OPEN_OUTCOME_TENANT_NOT_PROVEN
    assert outcomes == [refused, ledger.OPEN_OUTCOME_OPENED, refused, refused, refused]
    assert await protocol.state_of(victim, other) == 0
    assert await protocol.state_of(attacker, good) == ledger.CALL_STATE_OPEN
    await protocol.say("metering", "LedgerService/VoidCalls", "inference", calls=[{"ref": good.ref, "kind": 1, "cause": "done"}])


async def test_a_batch_records_only_what_its_own_token_proves(mesh: Mesh, surface: Surface, inside: Inside, victim: Target) -> None:
    """A use of units whose token is of another tenant or absent is TENANT_NOT_PROVEN and leaves no row; its neighbour is recorded."""
    attacker = await plant(mesh, surface)
    protocol = Protocol(surface, inside)
    before = await fingerprint(mesh.stack, TenantId(victim.tenant_id))
    own = {
        "context_token": await inside.context_of(attacker.tenant.api_key),
        "epoch": 2**40,
        "reserve_time": in_seconds(0),
        "product_unit": "ai_interviews",
        "quantity": 5,
    }
    owners = (victim.tenant_id, attacker.tenant_id, victim.tenant_id)
    items = [own | {"ref": {"tenant_id": owner.bytes, "reservation_id": new_uuid7().bytes}} for owner in owners]
    items[2]["context_token"] = ""
    recorded = await protocol.say("metering", "LedgerService/RecordUnits", "ratelimit", items=items)
    refused = ledger.RECORD_UNITS_OUTCOME_TENANT_NOT_PROVEN
    assert list(recorded.outcomes) == [refused, ledger.RECORD_UNITS_OUTCOME_RECORDED, refused]
    assert await fingerprint(mesh.stack, TenantId(victim.tenant_id)) == before


async def test_another_tenants_reservation_cannot_be_moved(
    mesh: Mesh, surface: Surface, inside: Inside, victim: Target, attacker: Target
) -> None:
    """Settle, extend, void, renew, fence, commit and release under the wrong tenant change nothing of the call's own tenant."""
    protocol = Protocol(surface, inside)
    running = await protocol.reserve(victim)
    assert await protocol.open(running) == [ledger.OPEN_OUTCOME_OPENED]
    # The sweeps of a slow machine must not end the call meanwhile: its lease is renewed as its own service would.
    await protocol.say("metering", "LedgerService/RenewCalls", "inference", calls=[running.ref])
    await protocol.say("ratelimit", "RateLimitService/Renew", "inference", reservations=[running.ref])
    before, used = await _without_leases(mesh, victim), await protocol.used(victim)
    await _move(protocol, surface, inside, attacker, running)
    assert await protocol.state_of(victim, running) == ledger.CALL_STATE_OPEN
    assert await protocol.state_of(attacker, running) == 0
    assert await protocol.used(victim) == used
    assert await _without_leases(mesh, victim) == before
    settled = await protocol.say(
        "metering", "LedgerService/SettleCalls", "inference", calls=[{"ref": running.ref, "usage": {"input_tokens": 10}}]
    )
    assert settled.results[0].outcome == ledger.SETTLE_OUTCOME_SETTLED
    assert await protocol.state_of(victim, running) == ledger.CALL_STATE_SETTLED


async def test_an_epoch_begun_unheard_does_not_lock_its_tenant_out(mesh: Mesh, surface: Surface, inside: Inside) -> None:
    """Beginning an epoch is safe at any time: limits that did not hear of it catch up, and the tenant is served again within seconds."""
    target = await plant(mesh, surface)
    begin = surface.find("metering", "LedgerService/BeginEpoch")
    context = await inside.context_of(target.tenant.api_key)
    metadata = inside.as_service("ratelimit", context=context, tenant_id=target.tenant_id)
    assert (await surface.call(begin, begin.request_type(nonce="unheard"), metadata)).code == "OK"
    rpc, refusals = surface.find("inference", "InferenceService/Generate"), list[tuple[str, str]]()
    request = rpc.request_type(messages=[{"role": 1, "text": "Hello."}], options={"max_output_tokens": 5})
    ends = asyncio.get_running_loop().time() + CATCH_UP_SECONDS
    while (answer := await surface.call(rpc, request, target.metadata)).code != "OK" and asyncio.get_running_loop().time() < ends:
        refusals.append(answer.refused_as)
        await asyncio.sleep(0.2)
    assert answer.code == "OK", f"{len(refusals)} refusals in {CATCH_UP_SECONDS} s: {set(refusals)}"


async def _without_leases(mesh: Mesh, target: Target) -> dict[str, str]:
    found = await fingerprint(mesh.stack, TenantId(target.tenant_id), in_mid_call=True)
    return {store: digest for store, digest in found.items() if store != "metering.call_leases"}


async def _move(protocol: Protocol, surface: Surface, inside: Inside, attacker: Target, running: Running) -> None:
    stolen = replace(running, tenant_id=attacker.tenant_id).ref
    settled = await protocol.say(
        "metering", "LedgerService/SettleCalls", "inference", calls=[{"ref": stolen, "usage": {"output_tokens": 99_999}}]
    )
    assert settled.results[0].outcome == ledger.SETTLE_OUTCOME_NOT_OPEN
    wider = {"ref": stolen, "bound_tokens": 2 * BOUND_TOKENS, "bound_nano_usd": 2 * BOUND_NANO_USD}
    extended = await protocol.say("metering", "LedgerService/ExtendCalls", "inference", calls=[wider])
    assert list(extended.outcomes) == [ledger.EXTEND_OUTCOME_NOT_OPEN]
    lost = await protocol.say("metering", "LedgerService/RenewCalls", "inference", calls=[stolen])
    assert [ref.reservation_id for ref in lost.lost] == [running.reservation_id.bytes]
    lost = await protocol.say("ratelimit", "RateLimitService/Renew", "inference", reservations=[stolen])
    assert [ref.reservation_id for ref in lost.lost] == [running.reservation_id.bytes]
    fenced = await protocol.say("metering", "LedgerService/FenceCalls", "ratelimit", calls=[{"ref": stolen, "epoch": running.epoch}])
    assert list(fenced.outcomes) == [ledger.FENCE_OUTCOME_VOID]
    voided = await protocol.say("metering", "LedgerService/VoidCalls", "inference", calls=[{"ref": stolen, "kind": 1, "cause": "stolen"}])
    assert list(voided.states) == [ledger.CALL_STATE_VOID]
    for kind in (limits.COMMIT_KIND_SETTLED, limits.COMMIT_KIND_VOID, limits.COMMIT_KIND_PIN):
        commit = {"reservation": stolen, "epoch": running.epoch, "kind": kind, "actual": {"tokens": 1, "cost_nano_usd": 1}}
        await protocol.say("ratelimit", "RateLimitService/Commit", "metering", commits=[commit])
    rpc = surface.find("ratelimit", "RateLimitService/Release")
    ids = replace(attacker.ids, reservation_id=str(running.reservation_id))
    metadata = inside.as_service("inference", context=await inside.context_of(attacker.tenant.api_key), tenant_id=attacker.tenant_id)
    assert (await surface.call(rpc, aimed_at(rpc, ids), metadata)).code == "OK"
