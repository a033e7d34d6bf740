"""The ledger's messages as values, and values as messages.

Refuses what the contract's rules cannot say: NUL in a text, times out of range.
"""

from google.protobuf.timestamp_pb2 import Timestamp

from mesh.metering.v1 import ledger_service_pb2 as pb
from services.kernel.errors import InvalidRequest
from services.kernel.ids import new_uuid7
from services.metering.call import (
    CallState,
    Ending,
    ExtendOutcome,
    Extension,
    Fenced,
    Fencing,
    Opened,
    Opening,
    Settled,
    Settlement,
    TokenUsage,
    VoidKind,
)
from services.metering.refusal import RecordRefusalsOutcome, RefusalCount
from services.metering.unit_use import RecordUnitsOutcome, UnitUse

# The last second of the year 9999, where protobuf's own range ends; a ledger starts no earlier than 1970.
LAST_SECOND = 253_402_300_799


def opening(call: pb.OpenCall, index: int) -> Opening:
    """Reads one call to open. Raises: InvalidRequest."""
    where = f"calls[{index}]"
    texts = (call.price_version, call.provider, call.model, call.feature, call.user, call.prompt_version, call.provider_account)
    refuse_nul(texts, where)
    return Opening(
        call.ref.tenant_id,
        call.ref.reservation_id,
        call.context_token,
        call.call_id,
        call.attempt,
        call.epoch,
        micros(call.reserve_time, f"{where}.reserve_time"),
        micros(call.dispatch_deadline, f"{where}.dispatch_deadline"),
        call.bound_tokens,
        call.bound_nano_usd,
        *texts,
        call.bills_tenant_account,
    )


def open_result(result: Opened) -> pb.OpenResult:
    """Writes how one open went."""
    return pb.OpenResult(outcome=pb.OpenOutcome.ValueType(result.outcome), state=state(result.state))


def settlement(call: pb.SettleCall, index: int) -> Settlement:
    """Reads one call to settle. Raises: InvalidRequest."""
    refuse_nul((call.stop_reason, call.provider_request_id), f"calls[{index}]")
    return Settlement(
        call.ref.tenant_id,
        call.ref.reservation_id,
        usage(call.usage),
        call.stop_reason,
        call.provider_request_id,
        call.first_token_ms,
        call.total_ms,
    )


def settle_result(result: Settled) -> pb.SettleResult:
    """Writes how one settlement went."""
    return pb.SettleResult(outcome=pb.SettleOutcome.ValueType(result.outcome), cost_nano_usd=result.cost_nano_usd, entry_id=result.entry_id)


def ending(call: pb.VoidCall, index: int) -> Ending:
    """Reads one call to end without a bill. Raises: InvalidRequest."""
    refuse_nul((call.cause,), f"calls[{index}]")
    received = usage(call.received) if call.HasField("received") else None
    return Ending(call.ref.tenant_id, call.ref.reservation_id, VoidKind(call.kind), call.cause, received)


def extension(call: pb.ExtendCall) -> Extension:
    """Reads one bound to raise."""
    return Extension(call.ref.tenant_id, call.ref.reservation_id, call.bound_tokens, call.bound_nano_usd)


def extend_outcome(result: ExtendOutcome) -> pb.ExtendOutcome.ValueType:
    """Writes what came of an extension."""
    return pb.ExtendOutcome.ValueType(result)


def unit_use(item: pb.RecordUnits, index: int) -> UnitUse:
    """Reads one use of units, and gives it the id its entry will have. Raises: InvalidRequest."""
    where = f"items[{index}]"
    refuse_nul((item.product_unit, item.user, item.feature), where)
    return UnitUse(
        item.ref.tenant_id,
        item.ref.reservation_id,
        item.context_token,
        new_uuid7().bytes,
        item.epoch,
        micros(item.reserve_time, f"{where}.reserve_time"),
        item.product_unit,
        item.quantity,
        item.user,
        item.feature,
    )


def record_units_outcome(result: RecordUnitsOutcome) -> pb.RecordUnitsOutcome.ValueType:
    """Writes what came of a use."""
    return pb.RecordUnitsOutcome.ValueType(result)


def refusal_count(item: pb.RefusalCount, index: int) -> RefusalCount:
    """Reads one count of refusals. Raises: InvalidRequest."""
    where = f"counts[{index}]"
    texts = (item.reason, item.rule, item.model, item.feature, item.user)
    refuse_nul(texts, where)
    return RefusalCount(item.tenant_id, item.context_token, micros(item.minute_time, f"{where}.minute_time"), *texts, item.count)


def record_refusals_outcome(result: RecordRefusalsOutcome) -> pb.RecordRefusalsOutcome.ValueType:
    """Writes what came of a count."""
    return pb.RecordRefusalsOutcome.ValueType(result)


def fencing(call: pb.FenceCall) -> Fencing:
    """Reads one call to fence."""
    return Fencing(call.ref.tenant_id, call.ref.reservation_id, call.epoch)


def fence_outcome(result: Fenced) -> pb.FenceOutcome.ValueType:
    """Writes what becomes of a hold."""
    return pb.FenceOutcome.ValueType(result.outcome)


def state(value: CallState) -> pb.CallState.ValueType:
    """Writes a state."""
    return pb.CallState.ValueType(value)


def usage(message: pb.TokenUsage) -> TokenUsage:
    """Reads token counts."""
    return TokenUsage(
        message.input_tokens,
        message.output_tokens,
        message.cache_read_tokens,
        message.cache_write_5m_tokens,
        message.cache_write_1h_tokens,
    )


def usage_message(value: TokenUsage) -> pb.TokenUsage:
    """Writes token counts."""
    return pb.TokenUsage(
        input_tokens=value.input,
        output_tokens=value.output,
        cache_read_tokens=value.cache_read,
        cache_write_5m_tokens=value.cache_write_5m,
        cache_write_1h_tokens=value.cache_write_1h,
    )


def micros(stamp: Timestamp, field: str) -> int:
    """Reads a moment as microseconds since 1970. Raises: InvalidRequest."""
    if not 0 <= stamp.seconds <= LAST_SECOND or not 0 <= stamp.nanos <= 999_999_999:
        raise InvalidRequest(field, "must be a moment between the years 1970 and 9999")
    return stamp.seconds * 1_000_000 + stamp.nanos // 1_000


def refuse_nul(texts: tuple[str, ...], where: str) -> None:
    """Refuses texts the database cannot hold. Raises: InvalidRequest."""
    # Postgres takes no NUL in a text, and refusing it there would fail the whole batch, other tenants' items included.
    if "\x00" in "".join(texts):
        raise InvalidRequest(where, "texts must not contain the NUL character")
