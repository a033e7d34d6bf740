"""Epochs as messages: the periods that are asked for, and the snapshot that answers.

Refuses what the contract's rules cannot say: periods that end before they start, and units of the product without a name.
"""

from mesh.common.v1 import limit_rule_pb2
from mesh.metering.v1 import ledger_service_pb2 as pb
from services.kernel.errors import InvalidRequest
from services.kernel.timestamps import to_timestamp
from services.metering.epoch import CountedCall, CountedPeriod, CountedScope, CountedUnit, EpochSnapshot
from services.metering.servicers.ledger_messages import micros, refuse_nul, state

_DEFAULT_RECENT_SECONDS = 60


def recent_seconds(request: pb.BeginEpochRequest) -> int:
    """Reads how far back single calls are wanted."""
    return request.recent_seconds or _DEFAULT_RECENT_SECONDS


def counted_period(message: pb.CountedPeriod, index: int) -> CountedPeriod:
    """Reads one period to add up. Raises: InvalidRequest."""
    where = f"periods[{index}]"
    if message.unit == limit_rule_pb2.LIMIT_UNIT_CONCURRENT_CALLS:
        raise InvalidRequest(f"{where}.unit", "running calls have no sum: outstanding calls are answered one by one")
    unit = CountedUnit(message.unit)
    if bool(message.product_unit) != (unit is CountedUnit.PRODUCT):
        raise InvalidRequest(f"{where}.product_unit", "must name the unit of LIMIT_UNIT_PRODUCT, and be empty for every other unit")
    refuse_nul((message.product_unit,), where)
    start_us, end_us = micros(message.start_time, f"{where}.start_time"), micros(message.end_time, f"{where}.end_time")
    if end_us < start_us:
        raise InvalidRequest(f"{where}.end_time", "the period ends before it starts; give an end_time after the start_time")
    return CountedPeriod(unit, message.product_unit, CountedScope(message.scope), start_us, end_us)


def begin_epoch_response(nonce: str, snapshot: EpochSnapshot) -> pb.BeginEpochResponse:
    """Writes a snapshot."""
    return pb.BeginEpochResponse(
        nonce=nonce,
        epoch=snapshot.epoch,
        snapshot_time=to_timestamp(snapshot.snapshot_time),
        recent=[_counted(call) for call in snapshot.recent],
        outstanding=[_counted(call) for call in snapshot.outstanding],
        sums=[pb.CountedSum(period=item.period, user=item.user, feature=item.feature, amount=item.amount) for item in snapshot.sums],
    )


def _counted(call: CountedCall) -> pb.CountedCall:
    return pb.CountedCall(
        reservation_id=call.reservation_id,
        state=state(call.state),
        reserve_time=to_timestamp(call.reserve_time),
        tokens=call.tokens,
        cost_nano_usd=call.cost_nano_usd,
        user=call.user,
        feature=call.feature,
        attempt=call.attempt,
        product_unit=call.product_unit,
        quantity=call.quantity,
    )
