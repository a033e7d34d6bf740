"""Many reservations in one message: each item proves its own tenant, tenants are decided together, items of one in their order."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from google.protobuf.duration_pb2 import Duration

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.errors import MeshError, Unauthenticated
from services.kernel.ids import TenantId
from services.kernel.rpc.encoded import submessage
from services.kernel.rpc.status import to_mesh_error
from services.kernel.rpc.wire_status import encode
from services.kernel.tenant_context import TenantContext
from services.ratelimit.decision import Refusal
from services.ratelimit.gathered import GatheredReservations
from services.ratelimit.ready_counters import tenant_of
from services.ratelimit.request import Request
from services.ratelimit.reservation import Held, Outcome, Reservations
from services.ratelimit.servicers.held_messages import held_content
from services.ratelimit.servicers.limit_messages import refusal_message
from services.ratelimit.servicers.reserve_requests import Item, items_of

_METHOD = "/mesh.ratelimit.v1.RateLimitService/ReserveBatch"
# Tenants decided at the same time: as many as fill one exchange with the store.
_TENANTS_AT_ONCE = 64
_OUTCOMES, _HELD = messages.ReserveBatchResponse.OUTCOMES_FIELD_NUMBER, messages.ReserveBatchOutcome.HELD_FIELD_NUMBER


@dataclass(slots=True)
class _Call:
    """What a batch asks for one tenant, in its order. `places`: where each item stands in the batch."""

    context: TenantContext
    places: list[int] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def add(self, place: int, context: TenantContext, request: Request) -> None:
        """Adds an item. The newest of their tokens names the newest configuration."""
        if context.config_version > self.context.config_version:
            self.context = context
        self.places.append(place)
        self.requests.append(request)


class ReserveBatches:
    """Decides batches."""

    def __init__(self, gathered: GatheredReservations, reservations: Reservations, verifier: ContextTokenVerifier) -> None:
        self._gathered = gathered
        self._reservations = reservations
        self._verifier = verifier

    async def reserve(self, batch: messages.ReserveBatchRequest, lease: Duration) -> bytes:
        """Returns one outcome an item, in order, as a serialised ReserveBatchResponse; what fails fails alone.

        Raises: InvalidRequest for a batch that breaks its contract.
        """
        items = items_of(batch)
        outcomes: list[Outcome | None] = [None] * len(items)
        # Who waits comes last: those behind would wait as well.
        calls = sorted((await self._by_tenant(items, outcomes)).values(), key=_waits)
        async with self._kept_alive(calls, lease.ToTimedelta().total_seconds()):
            for start in range(0, len(calls), _TENANTS_AT_ONCE):
                await self._decide(calls[start : start + _TENANTS_AT_ONCE], outcomes)
        return b"".join([submessage(_OUTCOMES, _content(outcome, lease)) for outcome in outcomes])

    async def _by_tenant(self, items: Sequence[Item], outcomes: list[Outcome | None]) -> dict[TenantId, _Call]:
        """Proves each item's tenant, each token once. An item that fails has its outcome by that."""
        contexts: dict[str, TenantContext] = {}
        calls: dict[TenantId, _Call] = {}
        for place, (token, request) in enumerate(items):
            try:
                context = contexts.get(token)
                if context is None:
                    context = contexts[token] = await self._verifier.verify(token)
                tenant_id = context.tenant_id
                if tenant_id is None:
                    # An operator's, who acts for no tenant.
                    raise Unauthenticated.context_missing()
            except MeshError as error:
                outcomes[place] = error
                continue
            if isinstance(request, MeshError):
                outcomes[place] = request
                continue
            call = calls.get(tenant_id)
            if call is None:
                call = calls[tenant_id] = _Call(context)
            call.add(place, context, request)
        return calls

    @asynccontextmanager
    async def _kept_alive(self, calls: Sequence[_Call], lease_seconds: float) -> AsyncIterator[None]:
        """Prolongs what the batch holds already while others of it wait: its caller does not know of its holds yet."""
        if not any(map(_waits, calls)):
            yield
            return
        # What is not held, or not yet, is not changed by it.
        everything = [(tenant_of(call.context), request.reservation_id) for call in calls for request in call.requests]

        async def prolong() -> None:
            while True:
                await asyncio.sleep(lease_seconds / 3)
                with suppress(MeshError):
                    await self._reservations.renew(everything)

        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(prolong())
            try:
                yield
            finally:
                keeper.cancel()

    async def _decide(self, calls: Sequence[_Call], outcomes: list[Outcome | None]) -> None:
        decided = await self._gathered.decide([(call.context, call.requests) for call in calls])
        for call, found in zip(calls, decided, strict=True):
            if isinstance(found, Exception):
                found = [to_mesh_error(found, _METHOD)] * len(call.places)
            for place, outcome in zip(call.places, found, strict=True):
                outcomes[place] = outcome


def _waits(call: _Call) -> bool:
    return any(request.max_wait_seconds for request in call.requests)


def _content(outcome: Outcome | None, lease: Duration) -> bytes:
    if isinstance(outcome, Held):
        return submessage(_HELD, held_content(outcome, lease))
    if isinstance(outcome, Refusal):
        return messages.ReserveBatchOutcome(refused=refusal_message(outcome)).SerializeToString()
    if outcome is None:
        msg = "an item of the batch was left undecided"
        raise RuntimeError(msg)
    return messages.ReserveBatchOutcome(error_status=encode(outcome)).SerializeToString()
