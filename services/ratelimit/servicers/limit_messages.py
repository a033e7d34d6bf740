"""Limits and refusals as messages, and demands out of them."""

from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.ids import ReservationId, TenantId, parse_uuid, uuid_from_bytes
from services.ratelimit.decision import Refusal
from services.ratelimit.limit_rule import CALENDAR, Unit, Window
from services.ratelimit.limits import NOBODY, Amounts, Demand, Shortening, subject_of
from services.ratelimit.request import Request
from services.ratelimit.reservation import Held
from services.ratelimit.standing import Answer, LimitStatus, current_day, period_end_us
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
        prepared = _prepared(held.plan, answer)
        message.MergeFrom(prepared.limits)
        _fill(message.limits, prepared, answer)
    granted = message.granted
    granted.tokens, granted.cost_nano_usd = answer.granted.tokens, answer.granted.cost_nano_usd
    if held.demand.shortening is not None:
        message.shortened = held.shortened
    if held.plan.has_shadow:
        message.shadow_refusals.extend(refusal_message(item) for item in held.shadow_refusals)
    set_timestamp(message.reserve_time, answer.reserve_us)
    if held.waited_seconds:
        message.waited.CopyFrom(duration(held.waited_seconds))


@dataclass(frozen=True, slots=True)
class _Prepared:
    """The limits of a plan as a message without figures, with the ends of the periods of one day. `rules`: limit, and whether it slides."""

    from_us: int
    until_us: int
    limits: messages.ReserveResponse
    rules: tuple[tuple[int, bool], ...]


def _prepared(plan: Plan, answer: Answer) -> _Prepared:
    """What answers to the plan have in common. Copied whole for each answer: building it anew took most of an answer's time."""
    made = plan.made.get(_MADE)
    if isinstance(made, _Prepared) and made.from_us <= answer.now_us < made.until_us:
        return made
    statuses = (
        LimitStatus(rule, 0, period_end_us(rule, answer) if rule.window in CALENDAR else None, part)
        for rule, part in zip(plan.rules, plan.parts, strict=True)
    )
    day = current_day(answer)
    limits = messages.ReserveResponse(limits=limit_messages(statuses))
    prepared = plan.made[_MADE] = _Prepared(*day, limits, tuple((rule.limit, rule.window is Window.SLIDING) for rule in plan.rules))
    return prepared


def _fill(limits: Iterable[messages.LimitStatus], prepared: _Prepared, answer: Answer) -> None:
    """Writes what one answer says into the plan's limits."""
    figures, place = answer.figures, 0
    for (limit, slides), message in zip(prepared.rules, limits, strict=True):
        used = figures[place]
        message.used, message.remaining = used, limit - used if used < limit else 0
        if slides:
            # As `standing.reset_us` has it.
            set_timestamp(message.reset_time, figures[place + 1] or answer.now_us)
        place += 3


def request_of(message: messages.ReserveRequest, *, gathered: bool = False) -> Request:
    """What a Reserve asks for. `gathered`: it came with others in one message."""
    shorten = message.shorten if message.HasField("shorten") else None
    demand = Demand(
        amounts_of(message.amounts),
        attempt=message.attempt or 1,
        shortening=shorten and Shortening(shorten.max_output_tokens, shorten.min_output_tokens, shorten.output_nano_usd_per_million),
    )
    reservation_id = ReservationId(parse_uuid(message.reservation_id, "reservation_id"))
    subject = subject_of(message.user, message.feature)
    max_wait_seconds = seconds_of(message.max_wait)
    return Request(reservation_id, demand, subject, message.provider_account, message.input_tokens, max_wait_seconds, gathered=gathered)


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
