"""The ledger, as the limits ask it: snapshots for rebuilds, fences for ended leases. Refuses answers that do not fit the question."""

from collections.abc import Sequence

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.metering.v1 import ledger_service_pb2 as ledger
from mesh.metering.v1 import ledger_service_pb2_grpc
from services.kernel.errors import Unauthenticated, Unavailable
from services.kernel.ids import ReservationId, TenantId, uuid_from_bytes
from services.kernel.rpc.channel import MeshChannel
from services.kernel.tenant_context import TenantContext
from services.ratelimit.consumption import Recorded, Use
from services.ratelimit.fencing import FenceVerdict
from services.ratelimit.limit_rule import Scope, Unit
from services.ratelimit.limits import Subject
from services.ratelimit.rebuild import CountedCall, CountedPeriods, CountedState, CountedSum, Snapshot
from services.ratelimit.terms import CountedPeriod

_STATES = {
    ledger.CALL_STATE_OPEN: CountedState.HELD,
    ledger.CALL_STATE_UNRESOLVED: CountedState.PINNED,
    ledger.CALL_STATE_SETTLED: CountedState.SETTLED,
    ledger.CALL_STATE_RECONCILED: CountedState.SETTLED,
    ledger.CALL_STATE_VOID: CountedState.VOID,
}
_UNITS = {
    Unit.REQUESTS: rules.LIMIT_UNIT_REQUESTS,
    Unit.TOKENS: rules.LIMIT_UNIT_TOKENS,
    Unit.COST: rules.LIMIT_UNIT_COST_NANO_USD,
    Unit.RETRIES: rules.LIMIT_UNIT_RETRIES,
    Unit.PRODUCT: rules.LIMIT_UNIT_PRODUCT,
}
_SCOPES = {
    Scope.TENANT: rules.LIMIT_SCOPE_TENANT,
    Scope.USER: rules.LIMIT_SCOPE_USER,
    Scope.FEATURE: rules.LIMIT_SCOPE_FEATURE,
    Scope.USER_FEATURE: rules.LIMIT_SCOPE_USER_FEATURE,
}
_VERDICTS = {
    ledger.FENCE_OUTCOME_VOID: FenceVerdict.VOID,
    ledger.FENCE_OUTCOME_UNRESOLVED: FenceVerdict.UNRESOLVED,
    ledger.FENCE_OUTCOME_SETTLED: FenceVerdict.SETTLED,
    ledger.FENCE_OUTCOME_SETTLED_BEFORE: FenceVerdict.SETTLED_BEFORE,
}

_RECORDED = {
    ledger.RECORD_UNITS_OUTCOME_RECORDED: Recorded.RECORDED,
    ledger.RECORD_UNITS_OUTCOME_STALE_EPOCH: Recorded.STALE_EPOCH,
    ledger.RECORD_UNITS_OUTCOME_ENDED: Recorded.ENDED,
    ledger.RECORD_UNITS_OUTCOME_CONFLICT: Recorded.CONFLICT,
}


class MeteringClient:
    """Implements the ledgers of rebuilds and fences over gRPC."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        self._stub = ledger_service_pb2_grpc.LedgerServiceStub(channel.channel)

    async def begin_epoch(
        self,
        context: TenantContext,
        nonce: str,
        periods: CountedPeriods,
        recent_seconds: int,
        timeout_seconds: float,
    ) -> Snapshot:
        """Begins a new epoch and returns its snapshot: sums of the periods, and every call that ended lately. Raises: MeshError."""
        request = ledger.BeginEpochRequest(nonce=nonce, periods=[_period(period) for period in periods], recent_seconds=recent_seconds)
        response = await self._channel.unary(self._stub.BeginEpoch, request, timeout_seconds=timeout_seconds, tenant=context)
        if response.nonce != nonce:
            raise Unavailable("metering", "the ledger answered another request; try again shortly")
        return Snapshot(
            epoch=response.epoch,
            calls=[_counted(call) for call in (*response.recent, *response.outstanding)],
            sums=_sums(response, periods),
        )

    async def record_units(self, context: TenantContext, use: Use, epoch: int, reserve_us: int, timeout_seconds: float) -> Recorded:
        """Records a use for good, or says why not; idempotent by its id for ever. Raises: MeshError when it cannot be told."""
        if context.tenant_id is None:
            raise Unauthenticated.context_missing()
        item = ledger.RecordUnits(
            ref=ledger.CallRef(tenant_id=context.tenant_id.bytes, reservation_id=use.consumption_id.bytes),
            context_token=context.token,
            epoch=epoch,
            product_unit=use.product_unit,
            quantity=use.quantity,
            user=use.subject.user,
            feature=use.subject.feature,
        )
        item.reserve_time.FromMicroseconds(reserve_us)
        request = ledger.RecordUnitsRequest(items=[item])
        response = await self._channel.unary(self._stub.RecordUnits, request, timeout_seconds=timeout_seconds, idempotent=True)
        outcome = response.outcomes[0] if len(response.outcomes) == 1 else ledger.RECORD_UNITS_OUTCOME_UNSPECIFIED
        if outcome == ledger.RECORD_UNITS_OUTCOME_TENANT_NOT_PROVEN:
            raise Unauthenticated.context_missing()
        if outcome not in _RECORDED:
            raise Unavailable("metering", "the ledger did not say whether the use is recorded; try again shortly")
        return _RECORDED[outcome]

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
        subject=Subject(call.user, call.feature),
        # A consumption has no attempt; a ledger that knows of none had only first ones.
        attempt=0 if call.product_unit else max(1, call.attempt),
        product_unit=call.product_unit,
        quantity=call.quantity,
    )


def _period(period: CountedPeriod) -> ledger.CountedPeriod:
    message = ledger.CountedPeriod(unit=_UNITS[period.unit], product_unit=period.product_unit, scope=_SCOPES[period.scope])
    message.start_time.FromMicroseconds(period.start_us)
    message.end_time.FromMicroseconds(period.end_us)
    return message


def _sums(response: ledger.BeginEpochResponse, periods: CountedPeriods) -> list[CountedSum]:
    asked = list(periods.items())
    found = []
    for item in response.sums:
        if not 0 <= item.period < len(asked) or item.amount < 0:
            raise Unavailable("metering", "the ledger answered sums that were not asked for; try again shortly")
        period, families = asked[item.period]
        found.append(CountedSum(families, period.start_us, item.amount, item.user, item.feature))
    return found
