"""The ledger, as the limits ask it: snapshots for rebuilds, fences for ended leases. Refuses answers that do not fit the question."""

from collections.abc import Sequence

from mesh.metering.v1 import ledger_service_pb2 as ledger
from mesh.metering.v1 import ledger_service_pb2_grpc
from services.kernel.errors import Unavailable
from services.kernel.ids import ReservationId, TenantId, uuid_from_bytes
from services.kernel.rpc.channel import MeshChannel
from services.kernel.tenant_context import TenantContext
from services.ratelimit.fencing import FenceVerdict
from services.ratelimit.rebuild import CountedCall, CountedState, Snapshot

_STATES = {
    ledger.CALL_STATE_OPEN: CountedState.HELD,
    ledger.CALL_STATE_UNRESOLVED: CountedState.PINNED,
    ledger.CALL_STATE_SETTLED: CountedState.SETTLED,
    ledger.CALL_STATE_RECONCILED: CountedState.SETTLED,
    ledger.CALL_STATE_VOID: CountedState.VOID,
}
_VERDICTS = {
    ledger.FENCE_OUTCOME_VOID: FenceVerdict.VOID,
    ledger.FENCE_OUTCOME_UNRESOLVED: FenceVerdict.UNRESOLVED,
    ledger.FENCE_OUTCOME_SETTLED: FenceVerdict.SETTLED,
    ledger.FENCE_OUTCOME_SETTLED_BEFORE: FenceVerdict.SETTLED_BEFORE,
}


class MeteringClient:
    """Implements the ledgers of rebuilds and fences over gRPC."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        self._stub = ledger_service_pb2_grpc.LedgerServiceStub(channel.channel)

    async def begin_epoch(self, context: TenantContext, nonce: str, timeout_seconds: float) -> Snapshot:
        """Begins a new epoch and returns its snapshot. Raises: MeshError."""
        response = await self._channel.unary(
            self._stub.BeginEpoch, ledger.BeginEpochRequest(nonce=nonce), timeout_seconds=timeout_seconds, tenant=context
        )
        if response.nonce != nonce:
            raise Unavailable("metering", "the ledger answered another request; try again shortly")
        return Snapshot(
            epoch=response.epoch,
            calls=[_counted(call) for call in (*response.recent, *response.outstanding)],
            settled_tokens_by_day=dict(response.settled_tokens_by_day),
            settled_nano_usd_by_month=dict(response.settled_nano_usd_by_month),
        )

    async def fence(self, calls: Sequence[tuple[TenantId, ReservationId, int]], timeout_seconds: float) -> list[FenceVerdict]:
        """Returns one verdict a call, in order. Raises: MeshError."""
        request = ledger.FenceCallsRequest(
            calls=[
                ledger.FenceCall(ref=ledger.CallRef(tenant_id=tenant_id.bytes, reservation_id=reservation_id.bytes), epoch=epoch)
                for tenant_id, reservation_id, epoch in calls
            ]
        )
        response = await self._channel.unary(self._stub.FenceCalls, request, timeout_seconds=timeout_seconds, idempotent=True)
        if len(response.outcomes) != len(calls):
            raise Unavailable("metering", "the ledger left fences unanswered; try again shortly")
        # An outcome this version does not know ends no hold: as SETTLED it waits and is asked again.
        return [_VERDICTS.get(outcome, FenceVerdict.SETTLED) for outcome in response.outcomes]


def _counted(call: ledger.CountedCall) -> CountedCall:
    return CountedCall(
        reservation_id=ReservationId(uuid_from_bytes(call.reservation_id, "reservation_id")),
        # An unknown state may still be billed: it is held, and fenced when its lease ends.
        state=_STATES.get(call.state, CountedState.HELD),
        reserve_us=call.reserve_time.ToMicroseconds(),
        tokens=call.tokens,
        cost_nano_usd=call.cost_nano_usd,
    )
