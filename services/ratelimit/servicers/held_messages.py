"""Holds as messages: what the answers by the same rules have in common is filled anew for each answer, and serialised."""

from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.ratelimit.limit_rule import CALENDAR, Scope, Window
from services.ratelimit.limits import NOBODY, Subject
from services.ratelimit.reservation import Held
from services.ratelimit.servicers.limit_messages import duration, limit_messages, refusal_message, set_timestamp
from services.ratelimit.standing import Answer, LimitStatus, current_day, period_end_us
from services.ratelimit.terms import PlanForm

_MADE = "held_messages"
_OF_USERS, _OF_FEATURES = (Scope.USER, Scope.USER_FEATURE), (Scope.FEATURE, Scope.USER_FEATURE)


def held_content(held: Held, lease: Duration) -> bytes:
    """A hold as a serialised ReserveResponse."""
    form = _Form.of([], lease) if held.degraded else _form(held.plan.form, held.answer, lease)
    form.fill(held)
    content = form.message.SerializeToString()
    if not (held.degraded or held.waited_seconds or held.plan.has_shadow):
        return content
    # One after the other they are one message.
    return (
        content
        + messages.ReserveResponse(
            degraded=held.degraded,
            shadow_refusals=[refusal_message(item) for item in held.shadow_refusals],
            waited=duration(held.waited_seconds) if held.waited_seconds else None,
        ).SerializeToString()
    )


@dataclass(slots=True)
class _Form:
    """A message to fill: all that an answer by the same rules says, with the ends of the periods of one day.

    Its parts are kept beside it, of each limit the most and, where it slides, the reset time: to reach them by the message makes an object
    for each, which took a third of an answer's time. To build the limits anew took most of it. It is one for all users of all tenants that
    share their rules: one for each took ten kilobytes of every user. What is no rule's is written by `fill` each time.
    """

    from_us: int
    until_us: int
    lease: Duration
    message: messages.ReserveResponse
    granted: messages.Amounts
    reserve_time: Timestamp
    limits: tuple[tuple[int, messages.LimitStatus, Timestamp | None], ...]
    users: tuple[messages.LimitStatus, ...]
    features: tuple[messages.LimitStatus, ...]
    # Whom the message tells of now.
    subject: Subject = NOBODY

    @classmethod
    def of(cls, statuses: list[LimitStatus], lease: Duration, day: tuple[int, int] = (0, 0)) -> "_Form":
        """The form of answers that tell of these limits. The limits are nobody's in it, until it is filled."""
        message = messages.ReserveResponse(limits=limit_messages(statuses), lease=lease)
        pairs = list(zip((status.rule for status in statuses), message.limits, strict=True))
        limits = [(rule.limit, limit, limit.reset_time if rule.window is Window.SLIDING else None) for rule, limit in pairs]
        users, features = ([limit for rule, limit in pairs if rule.scope in scopes] for scopes in (_OF_USERS, _OF_FEATURES))
        return cls(*day, lease, message, message.granted, message.reserve_time, tuple(limits), tuple(users), tuple(features))

    def fill(self, held: Held) -> None:
        """Writes what one answer says over what the one before it said: each field of each answer."""
        answer, message, granted = held.answer, self.message, self.granted
        figures, now_us, place = answer.figures, answer.now_us, 0
        subject = held.plan.subject
        if subject is not self.subject and subject != self.subject:
            self._tell_of(subject)
        message.epoch, message.granted_output_tokens, message.shortened = answer.epoch, answer.output_tokens, held.shortened
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

    def _tell_of(self, subject: Subject) -> None:
        for limit in self.users:
            limit.user = subject.user
        for limit in self.features:
            limit.feature = subject.feature
        self.subject = subject


def _form(form: PlanForm, answer: Answer, lease: Duration) -> _Form:
    made = form.made.get(_MADE)
    if isinstance(made, _Form) and made.from_us <= answer.now_us < made.until_us and made.lease is lease:
        return made
    statuses = [LimitStatus(rule, 0, period_end_us(rule, answer) if rule.window in CALENDAR else None, NOBODY) for rule in form.rules]
    again = form.made[_MADE] = _Form.of(statuses, lease, current_day(answer))
    return again
