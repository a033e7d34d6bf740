"""Limits and refusals as messages, and demands out of them."""

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.ids import ReservationId, TenantId, parse_uuid, uuid_from_bytes
from services.ratelimit.decision import Refusal
from services.ratelimit.limit_rule import Unit
from services.ratelimit.limits import NOBODY, Amounts, Demand, Shortening, Subject
from services.ratelimit.reservation import Held, Request
from services.ratelimit.standing import Answer, LimitStatus, remaining_of, reset_us
from services.ratelimit.terms import Plan

_UNITS = {unit: rules.LimitUnit.ValueType(unit) for unit in Unit}
_MADE = "limit_messages"
_MODES = (rules.LIMIT_MODE_ENFORCE, rules.LIMIT_MODE_SHADOW)


def limit_messages(limits: Iterable[LimitStatus]) -> list[messages.LimitStatus]:
    """Every limit as a message."""
    return [limit_message(status) for status in limits]


def limit_message(status: LimitStatus) -> messages.LimitStatus:
    """One limit as a message."""
    rule, reset, subject = status.rule, status.reset_us, status.subject
    message = messages.LimitStatus(
        rule=rule.name, limit=rule.limit, used=status.used, remaining=status.remaining, unit=_UNITS[rule.unit], mode=_MODES[rule.shadow]
    )
    if subject is not NOBODY:
        message.user, message.feature = subject.user, subject.feature
    if reset is not None:
        set_timestamp(message.reset_time, reset)
    return message


def refusal_message(refusal: Refusal) -> messages.Refusal:
    """Why something was refused, or would be, as a message."""
    message = messages.Refusal(
        reason=refusal.reason_name,
        status=limit_message(refusal.status),
        needed=refusal.needed,
        retry_after=None if refusal.retry_after_seconds is None else duration(refusal.retry_after_seconds),
        message=refusal.message,
        lifting_plan=refusal.status.rule.lifting_plan,
    )
    set_timestamp(message.decide_time, refusal.now_us)
    return message


def held_message(held: Held, lease: Duration) -> messages.ReserveResponse:
    """A hold as a message."""
    message = messages.ReserveResponse()
    write_held(message, held, lease)
    return message


def write_held(message: messages.ReserveResponse, held: Held, lease: Duration) -> None:
    """Writes a hold into a message that has nothing in it yet."""
    answer = held.answer
    message.epoch, message.granted_output_tokens = answer.epoch, answer.output_tokens
    message.lease.CopyFrom(lease)
    if held.degraded:
        message.degraded = True
    else:
        message.MergeFrom(_limits_of(held.plan))
        _fill(message.limits, held.plan, answer)
    granted = message.granted
    granted.tokens, granted.cost_nano_usd = answer.granted.tokens, answer.granted.cost_nano_usd
    if held.demand.shortening is not None:
        message.shortened = held.shortened
    if held.plan.has_shadow:
        message.shadow_refusals.extend(refusal_message(item) for item in held.shadow_refusals)
    set_timestamp(message.reserve_time, answer.reserve_us)
    if held.waited_seconds:
        message.waited.CopyFrom(duration(held.waited_seconds))


def _limits_of(plan: Plan) -> messages.ReserveResponse:
    """The limits of an answer to the plan, without figures. Copied whole for each answer: building them anew took most of its time."""
    made = plan.made.get(_MADE)
    if not isinstance(made, messages.ReserveResponse):
        limits = (limit_message(LimitStatus(rule, 0, None, part)) for rule, part in zip(plan.rules, plan.parts, strict=True))
        made = plan.made[_MADE] = messages.ReserveResponse(limits=limits)
    return made


def _fill(limits: Iterable[messages.LimitStatus], plan: Plan, answer: Answer) -> None:
    """Writes what one answer says into the plan's limits."""
    figures, place = answer.figures, 0
    for rule, message in zip(plan.rules, limits, strict=True):
        used, of_log = figures[place], figures[place + 1]
        message.used, message.remaining = used, remaining_of(rule, used)
        reset = reset_us(rule, answer, of_log)
        if reset is not None:
            set_timestamp(message.reset_time, reset)
        place += 3


def request_of(message: messages.ReserveRequest) -> Request:
    """What a Reserve asks for."""
    shorten = message.shorten if message.HasField("shorten") else None
    demand = Demand(
        amounts_of(message.amounts),
        attempt=message.attempt or 1,
        shortening=shorten and Shortening(shorten.max_output_tokens, shorten.min_output_tokens, shorten.output_nano_usd_per_million),
    )
    reservation_id = ReservationId(parse_uuid(message.reservation_id, "reservation_id"))
    subject = Subject(message.user, message.feature)
    return Request(reservation_id, demand, subject, message.provider_account, message.input_tokens, seconds_of(message.max_wait))


def ids_of(ref: messages.ReservationRef) -> tuple[TenantId, ReservationId]:
    """Which reservation of which tenant."""
    return TenantId(uuid_from_bytes(ref.tenant_id, "tenant_id")), ReservationId(uuid_from_bytes(ref.reservation_id, "reservation_id"))


def amounts_of(message: messages.Amounts) -> Amounts:
    """The size of a call."""
    return Amounts(message.tokens, message.cost_nano_usd)


def amounts_message(amounts: Amounts) -> messages.Amounts:
    """The size of a call as a message."""
    return messages.Amounts(tokens=amounts.tokens, cost_nano_usd=amounts.cost_nano_usd)


def set_timestamp(message: Timestamp, us: int) -> None:
    """Writes a count of microseconds into a message."""
    message.seconds, message.nanos = us // 1_000_000, us % 1_000_000 * 1_000


def seconds_of(message: Duration) -> float:
    """A message as seconds; 0 for an absent one."""
    return message.seconds + message.nanos / 1e9


def duration(seconds: float) -> Duration:
    """Seconds as a message, to the microsecond."""
    us = round(seconds * 1_000_000)
    return Duration(seconds=us // 1_000_000, nanos=us % 1_000_000 * 1_000)
