"""The ledger port over the metering service. Concurrent opens, settlements and voids ride together in one rpc each."""

from collections.abc import Awaitable, Callable, Sequence
from uuid import UUID

import grpc
import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.metering.v1 import ledger_service_pb2 as pb
from mesh.metering.v1.ledger_service_pb2_grpc import LedgerServiceStub
from services.inference.call import CallRef, Settled, Usage
from services.inference.models import PROVIDER
from services.inference.ports import CallToOpen, CallToSettle, CallToVoid, Opened, OpenOutcome
from services.inference.refusal_tally import RefusalTold
from services.inference.worst_case import Hold
from services.kernel.batching import Batcher
from services.kernel.errors import ContentConflict, MeshError, Unavailable, WrongState
from services.kernel.ids import ReservationId, TenantId, new_uuid7
from services.kernel.request_context import RequestScope, enter_scope
from services.kernel.rpc.channel import MeshChannel

log = structlog.get_logger(__name__)

OPEN_SECONDS = 5.0
SETTLE_SECONDS = 5.0
EXTEND_SECONDS = 0.2
RENEW_SECONDS = 2.0
REFUSALS_SECONDS = 2.0
_MAX_BATCH = 500
# Callers wait for opens before anything else happens, so a second rpc may start beside a slow one.
_OPENS_IN_FLIGHT = 2
_MAX_RENEWALS = 10_000
_OUTCOMES = {
    pb.OPEN_OUTCOME_OPENED: OpenOutcome.OPENED,
    pb.OPEN_OUTCOME_STALE_EPOCH: OpenOutcome.STALE_EPOCH,
    pb.OPEN_OUTCOME_ENDED: OpenOutcome.ENDED,
    pb.OPEN_OUTCOME_CALL_ID_TAKEN: OpenOutcome.CALL_ID_TAKEN,
    pb.OPEN_OUTCOME_PRICE_MISSING: OpenOutcome.PRICE_MISSING,
    pb.OPEN_OUTCOME_TENANT_NOT_PROVEN: OpenOutcome.TENANT_NOT_PROVEN,
}
_RECORDED = frozenset((pb.SETTLE_OUTCOME_SETTLED, pb.SETTLE_OUTCOME_ADJUSTED))


class MeteringLedger:
    """Opens, settles, voids and renews over one channel."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        # Counts of one process rise: another one's never stand in their place.
        self._replica_id = new_uuid7().bytes
        self._stub = LedgerServiceStub(channel.channel)
        self._opens = Batcher(self._open_batch, max_batch=_MAX_BATCH, max_in_flight=_OPENS_IN_FLIGHT)
        self._extensions = Batcher(self._extend_batch, max_batch=_MAX_BATCH, max_in_flight=_OPENS_IN_FLIGHT)
        self._settlements = Batcher(self._settle_batch, max_batch=_MAX_BATCH)
        self._voids = Batcher(self._void_batch, max_batch=_MAX_BATCH)

    async def close(self) -> None:
        """Sends what was accepted."""
        await self._opens.close()
        await self._extensions.close()
        await self._settlements.close()
        await self._voids.close()

    async def open(self, call: CallToOpen) -> Opened:
        """Records an attempt before it is sent."""
        return await self._opens.submit(call)

    async def extend(self, ref: CallRef, hold: Hold) -> bool:
        """Raises the bound of an open call."""
        return await self._extensions.submit((ref, hold))

    async def settle(self, call: CallToSettle) -> Settled:
        """Records what it was billed. Raises: ContentConflict or WrongState when the ledger refuses, which it never should."""
        return await self._settlements.submit(call)

    async def void(self, call: CallToVoid) -> None:
        """Ends it without a bill."""
        await self._voids.submit(call)

    async def record_refusals(self, counts: Sequence[RefusalTold]) -> None:
        """Records counts of this process; a repeat changes nothing. Raises: MeshError."""
        request = pb.RecordRefusalsRequest(replica_id=self._replica_id, counts=[_refusals(told) for told in counts])
        response = await self._channel.unary(self._stub.RecordRefusals, request, timeout_seconds=REFUSALS_SECONDS, idempotent=True)
        unproven = sum(outcome != pb.RECORD_REFUSALS_OUTCOME_RECORDED for outcome in response.outcomes)
        if unproven:
            log.warning("refusals_not_proven", names=unproven)

    async def renew(self, refs: Sequence[CallRef]) -> Sequence[CallRef]:
        """Prolongs leases and returns those of calls that are not open."""
        lost: list[CallRef] = []
        for start in range(0, len(refs), _MAX_RENEWALS):
            request = pb.RenewCallsRequest(calls=[_ref(ref) for ref in refs[start : start + _MAX_RENEWALS]])
            response = await self._channel.unary(self._stub.RenewCalls, request, timeout_seconds=RENEW_SECONDS)
            lost += [CallRef(TenantId(UUID(bytes=ref.tenant_id)), ReservationId(UUID(bytes=ref.reservation_id))) for ref in response.lost]
        return lost

    async def _open_batch(self, calls: list[CallToOpen]) -> Sequence[Opened | Exception]:
        _leave_the_call()
        request = pb.OpenCallsRequest(calls=[_open(call) for call in calls])
        response = await self._channel.unary(self._stub.OpenCalls, request, timeout_seconds=OPEN_SECONDS, idempotent=True)
        return [_opened(result) for result in response.results]

    async def _extend_batch(self, bounds: list[tuple[CallRef, Hold]]) -> Sequence[bool]:
        _leave_the_call()
        calls = [pb.ExtendCall(ref=_ref(ref), bound_tokens=hold.tokens, bound_nano_usd=hold.cost_nano_usd) for ref, hold in bounds]
        request = pb.ExtendCallsRequest(calls=calls)
        response = await self._channel.unary(self._stub.ExtendCalls, request, timeout_seconds=EXTEND_SECONDS, idempotent=True)
        return [outcome == pb.EXTEND_OUTCOME_EXTENDED for outcome in response.outcomes]

    # Settlements and voids are repeated until they are acknowledged by whoever asked for them; the channel does not repeat them as well.

    async def _settle_batch(self, calls: list[CallToSettle]) -> Sequence[Settled | Exception]:
        _leave_the_call()
        request = pb.SettleCallsRequest(calls=[_settle(call) for call in calls])
        try:
            response = await self._channel.unary(self._stub.SettleCalls, request, timeout_seconds=SETTLE_SECONDS)
        except MeshError as error:
            if error.code is not grpc.StatusCode.INVALID_ARGUMENT or len(calls) == 1:
                raise
            # One item that the contract refuses must not keep the others, of other tenants, from being settled.
            return [await _alone(self._settle_batch, call) for call in calls]
        return [_settled(call, result) for call, result in zip(calls, response.results, strict=True)]

    async def _void_batch(self, calls: list[CallToVoid]) -> Sequence[None]:
        _leave_the_call()
        request = pb.VoidCallsRequest(calls=[_void(call) for call in calls])
        response = await self._channel.unary(self._stub.VoidCalls, request, timeout_seconds=SETTLE_SECONDS)
        return [None for _ in response.states]


async def _alone(
    flush: Callable[[list[CallToSettle]], Awaitable[Sequence[Settled | Exception]]], call: CallToSettle
) -> Settled | Exception:
    try:
        [result] = await flush([call])
    except MeshError as error:
        return error
    return result


def _leave_the_call() -> None:
    # A batch runs in the task of whoever came first: neither its deadline nor its tenant may reach the others' items.
    enter_scope(RequestScope())


def _ref(ref: CallRef) -> pb.CallRef:
    return pb.CallRef(tenant_id=ref.tenant_id.bytes, reservation_id=ref.reservation_id.bytes)


def _open(call: CallToOpen) -> pb.OpenCall:
    question, reserve_time, dispatch_deadline = call.question, Timestamp(), Timestamp()
    reserve_time.FromDatetime(call.reservation.reserve_time)
    dispatch_deadline.FromDatetime(call.dispatch_deadline)
    return pb.OpenCall(
        ref=_ref(call.ref),
        context_token=question.tenant.token,
        call_id=question.call_id.bytes,
        attempt=call.attempt,
        epoch=call.reservation.epoch,
        reserve_time=reserve_time,
        bound_tokens=call.hold.tokens,
        bound_nano_usd=call.hold.cost_nano_usd,
        price_version=call.hold.price_version,
        provider=PROVIDER,
        model=question.model.name,
        feature=question.feature,
        user=question.user,
        prompt_version=call.prompt_version,
        dispatch_deadline=dispatch_deadline,
        provider_account=question.provider_account,
        bills_tenant_account=question.bills_tenant_account,
    )


def _opened(result: pb.OpenResult) -> Opened | Exception:
    outcome = _OUTCOMES.get(result.outcome)
    if outcome is None:
        return Unavailable("metering")
    return Opened(outcome, void=result.state == pb.CALL_STATE_VOID)


def _refusals(told: RefusalTold) -> pb.RefusalCount:
    names, minute_time = told.names, Timestamp(seconds=60 * told.names.minute)
    return pb.RefusalCount(
        tenant_id=names.tenant_id.bytes,
        context_token=told.context_token,
        minute_time=minute_time,
        reason=names.reason,
        rule=names.rule[:200],
        model=names.model,
        feature=names.feature,
        user=names.user,
        count=told.refusals,
    )


def _usage(usage: Usage) -> pb.TokenUsage:
    return pb.TokenUsage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        cache_write_5m_tokens=usage.cache_write_5m_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
    )


def _settle(call: CallToSettle) -> pb.SettleCall:
    received = call.received
    return pb.SettleCall(
        ref=_ref(call.ref),
        usage=_usage(received.usage),
        stop_reason=received.stop_reason,
        provider_request_id=received.provider_request_id,
        first_token_ms=received.first_token_ms,
        total_ms=received.total_ms,
    )


def _settled(call: CallToSettle, result: pb.SettleResult) -> Settled | Exception:
    if result.outcome in _RECORDED:
        return Settled(result.cost_nano_usd, UUID(bytes=result.entry_id))
    log.error("settlement_refused", reservation_id=str(call.ref.reservation_id), outcome=pb.SettleOutcome.Name(result.outcome))
    if result.outcome == pb.SETTLE_OUTCOME_CONFLICT:
        return ContentConflict("call", "the call was settled before with other usage; the operator has been told")
    return WrongState("call", "NOT_OPEN", "the ledger has no open record of this call; the operator has been told")


def _void(call: CallToVoid) -> pb.VoidCall:
    kind = pb.VOID_KIND_NOT_BILLED if call.certain else pb.VOID_KIND_UNKNOWN
    return pb.VoidCall(ref=_ref(call.ref), kind=kind, cause=call.cause[:100], received=_usage(call.received) if call.received else None)
