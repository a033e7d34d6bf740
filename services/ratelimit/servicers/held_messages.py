"""Holds as messages: what the answers to a plan have in common is filled anew for each answer, and copied."""

from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.ratelimit.limit_rule import CALENDAR, Window
from services.ratelimit.reservation import Held
from services.ratelimit.servicers.limit_messages import duration, limit_messages, refusal_message, set_timestamp
from services.ratelimit.standing import Answer, LimitStatus, current_day, period_end_us
from services.ratelimit.terms import Plan

_MADE = "held_messages"


def held_message(held: Held, lease: Duration) -> messages.ReserveResponse:
    """A hold as a message."""
    message = messages.ReserveResponse()
    write_held(message, held, lease)
    return message


def write_held(message: messages.ReserveResponse, held: Held, lease: Duration) -> None:
    """Writes a hold into a message that has nothing in it yet."""
    answer = held.answer
    form = _Form.of([], lease) if held.degraded else _form(held.plan, answer, lease)
    form.fill(answer, shortened=held.shortened)
    message.MergeFrom(form.message)
    if held.degraded:
        message.degraded = True
    elif held.plan.has_shadow:
        message.shadow_refusals.extend(refusal_message(item) for item in held.shadow_refusals)
    if held.waited_seconds:
        message.waited.CopyFrom(duration(held.waited_seconds))


@dataclass(frozen=True, slots=True)
class _Form:
    """A message to fill: all that an answer to a plan says, with the ends of the periods of one day.

    Its parts are kept beside it, of each limit the most and, where it slides, the reset time: to reach them by the message makes an object
    for each, which took a third of an answer's time. To build the limits anew took most of it.
    """

    from_us: int
    until_us: int
    lease: Duration
    message: messages.ReserveResponse
    granted: messages.Amounts
    reserve_time: Timestamp
    limits: tuple[tuple[int, messages.LimitStatus, Timestamp | None], ...]

    @classmethod
    def of(cls, statuses: list[LimitStatus], lease: Duration, day: tuple[int, int] = (0, 0)) -> "_Form":
        """The form of answers that tell of these limits."""
        message = messages.ReserveResponse(limits=limit_messages(statuses), lease=lease)
        limits = [
            (status.rule.limit, limit, limit.reset_time if status.rule.window is Window.SLIDING else None)
            for status, limit in zip(statuses, message.limits, strict=True)
        ]
        return cls(*day, lease, message, message.granted, message.reserve_time, tuple(limits))

    def fill(self, answer: Answer, *, shortened: bool) -> None:
        """Writes what one answer says over what the one before it said: each field of each answer."""
        message, granted, figures, now_us, place = self.message, self.granted, answer.figures, answer.now_us, 0
        message.epoch, message.granted_output_tokens, message.shortened = answer.epoch, answer.output_tokens, shortened
        granted.tokens, granted.cost_nano_usd = answer.granted.tokens, answer.granted.cost_nano_usd
        set_timestamp(self.reserve_time, answer.reserve_us)
        for most, limit, reset_time in self.limits:
            used = figures[place]
            limit.used, limit.remaining = used, most - used if used < most else 0
            if reset_time is not None:
                # As `standing.reset_us` and `set_timestamp` have it: written out, as nothing else is done so often.
                reset_us = figures[place + 1] or now_us
                reset_time.seconds, reset_time.nanos = reset_us // 1_000_000, reset_us % 1_000_000 * 1_000
            place += 3


def _form(plan: Plan, answer: Answer, lease: Duration) -> _Form:
    made = plan.made.get(_MADE)
    if isinstance(made, _Form) and made.from_us <= answer.now_us < made.until_us and made.lease is lease:
        return made
    statuses = [
        LimitStatus(rule, 0, period_end_us(rule, answer) if rule.window in CALENDAR else None, part)
        for rule, part in zip(plan.rules, plan.parts, strict=True)
    ]
    form = plan.made[_MADE] = _Form.of(statuses, lease, current_day(answer))
    return form
