"""Many reservations in one message: each item proves its own tenant, tenants are decided together, items of one in their order."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from google.protobuf.duration_pb2 import Duration

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.errors import MeshError, Unauthenticated
from services.kernel.ids import TenantId
from services.kernel.rpc.status import to_mesh_error
from services.kernel.rpc.wire_status import encode
from services.kernel.tenant_context import TenantContext
from services.ratelimit.decision import Refusal
from services.ratelimit.gathered import GatheredReservations
from services.ratelimit.ready_counters import tenant_of
from services.ratelimit.request import Request
from services.ratelimit.reservation import Held, Outcome, Reservations
from services.ratelimit.servicers.limit_messages import refusal_message, request_of, write_held

_METHOD = "/mesh.ratelimit.v1.RateLimitService/ReserveBatch"
# Tenants decided at the same time: as many as fill one exchange with the store.
_TENANTS_AT_ONCE = 64

_Place = tuple[int, TenantContext, Request]


class ReserveBatches:
    """Decides batches."""

    def __init__(self, gathered: GatheredReservations, reservations: Reservations, verifier: ContextTokenVerifier) -> None:
        self._gathered = gathered
        self._reservations = reservations
        self._verifier = verifier

    async def reserve(self, items: Sequence[messages.ReserveBatchItem], lease: Duration) -> messages.ReserveBatchResponse:
        """Returns one outcome an item, in order; what fails fails alone."""
        outcomes: list[Outcome | None] = [None] * len(items)
        by_tenant: dict[TenantId, list[_Place]] = {}
        for place, item in enumerate(items):
            try:
                context = await self._verifier.verify(item.context_token)
                if context.tenant_id is None:
                    # An operator's, who acts for no tenant.
                    raise Unauthenticated.context_missing()
                request = request_of(item.request, gathered=True)
                by_tenant.setdefault(tenant_of(context), []).append((place, context, request))
            except MeshError as error:
                outcomes[place] = error
        # Who waits comes last: those behind would wait as well.
        tenants = sorted(by_tenant.values(), key=_waits)
        async with self._kept_alive(tenants, lease.ToTimedelta().total_seconds()):
            for start in range(0, len(tenants), _TENANTS_AT_ONCE):
                await self._decide(tenants[start : start + _TENANTS_AT_ONCE], outcomes)
        response = messages.ReserveBatchResponse()
        for outcome in outcomes:
            _write(response.outcomes.add(), outcome, lease)
        return response

    @asynccontextmanager
    async def _kept_alive(self, tenants: Sequence[Sequence[_Place]], lease_seconds: float) -> AsyncIterator[None]:
        """Prolongs what the batch holds already while others of it wait: its caller does not know of its holds yet."""
        if not any(map(_waits, tenants)):
            yield
            return
        # What is not held, or not yet, is not changed by it.
        everything = [(tenant_of(context), request.reservation_id) for places in tenants for _, context, request in places]

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

    async def _decide(self, tenants: Sequence[Sequence[_Place]], outcomes: list[Outcome | None]) -> None:
        decided = await self._gathered.decide([(_newest(places), [request for _, _, request in places]) for places in tenants])
        for places, found in zip(tenants, decided, strict=True):
            if isinstance(found, Exception):
                found = [to_mesh_error(found, _METHOD)] * len(places)
            for (place, _, _), outcome in zip(places, found, strict=True):
                outcomes[place] = outcome


def _waits(places: Sequence[_Place]) -> bool:
    return any(request.max_wait_seconds for _, _, request in places)


def _newest(places: Sequence[_Place]) -> TenantContext:
    # The newest of their tokens names the newest configuration.
    return max((context for _, context, _ in places), key=lambda context: context.config_version)


def _write(message: messages.ReserveBatchOutcome, outcome: Outcome | None, lease: Duration) -> None:
    # In place: a message that is put into another is copied, once for each it is put into.
    if isinstance(outcome, Held):
        write_held(message.held, outcome, lease)
    elif isinstance(outcome, Refusal):
        message.refused.CopyFrom(refusal_message(outcome))
    elif outcome is None:
        msg = "an item of the batch was left undecided"
        raise RuntimeError(msg)
    else:
        message.error_status = encode(outcome)
