"""What Reserve and ReserveBatch ask for, read and held to their contract at once. The contract's judge is asked in doubt, and refuses."""

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.errors import InvalidRequest, MeshError
from services.kernel.ids import ReservationId, parse_uuid
from services.kernel.rpc.validation import refuse_broken
from services.ratelimit.limits import Amounts, Demand, Shortening, subject_of
from services.ratelimit.request import Request
from services.ratelimit.servicers.limit_messages import seconds_of

# Decisions come by the thousand: of what one costs, the judge took a tenth.
OWN_CHECKS = frozenset(f"/mesh.ratelimit.v1.RateLimitService/{name}" for name in ("Reserve", "ReserveBatch"))

# The bounds of the contract; a test holds them together.
_MOST_ITEMS, _LONGEST_TOKEN, _LONGEST_USER, _LONGEST_NAME, _MOST_ATTEMPTS = 1_000, 8_192, 200, 100, 100
_MOST_TOKENS, _MOST_NANO_USD, _MOST_OUTPUT_TOKENS, _MOST_WAIT_SECONDS = 10_000_000, 10**15, 1_000_000, 60
_LAST_NANO = 999_999_999

# An item of a batch: what proves its tenant, and what it asks for, or why that makes no sense.
Item = tuple[str, Request | MeshError]


class _Doubt(Exception):
    """It is not plain that the contract is kept: ask `refuse_broken`."""


def request_of(message: messages.ReserveRequest) -> Request:
    """What a Reserve asks for. Raises: InvalidRequest."""
    try:
        return _request(message, gathered=False, is_checked=False)
    except _Doubt:
        refuse_broken(message)
        return _request(message, gathered=False, is_checked=True)


def items_of(batch: messages.ReserveBatchRequest) -> list[Item]:
    """What a ReserveBatch asks for, in order. Raises: InvalidRequest for a batch that breaks its contract, whichever item does."""
    try:
        if not 1 <= len(batch.items) <= _MOST_ITEMS:
            raise _Doubt
        return [_item(item, is_checked=False) for item in batch.items]
    except _Doubt:
        refuse_broken(batch)
        return [_item(item, is_checked=True) for item in batch.items]


def _item(item: messages.ReserveBatchItem, *, is_checked: bool) -> Item:
    token = item.context_token
    if not is_checked and not 0 < len(token) <= _LONGEST_TOKEN:
        raise _Doubt
    try:
        return token, _request(item.request, gathered=True, is_checked=is_checked)
    except MeshError as error:
        return token, error


def _request(message: messages.ReserveRequest, *, gathered: bool, is_checked: bool) -> Request:
    amounts, user, feature = message.amounts, message.user, message.feature
    tokens, cost_nano_usd, attempt = amounts.tokens, amounts.cost_nano_usd, message.attempt
    account, input_tokens = message.provider_account, message.input_tokens
    # The rules of the contract, as far as they are plain. An item without a request has no id either.
    if not is_checked and not (
        message.HasField("amounts")
        and 0 <= tokens <= _MOST_TOKENS
        and 0 <= cost_nano_usd <= _MOST_NANO_USD
        and len(user) <= _LONGEST_USER
        and len(feature) <= _LONGEST_NAME
        and 0 <= attempt <= _MOST_ATTEMPTS
        and len(account) <= _LONGEST_NAME
        and 0 <= input_tokens <= _MOST_TOKENS
    ):
        raise _Doubt
    shortening = _shortening(message.shorten, is_checked=is_checked) if message.HasField("shorten") else None
    max_wait_seconds = _max_wait_seconds(message, is_checked=is_checked) if message.HasField("max_wait") else 0.0
    try:
        reservation_id = ReservationId(parse_uuid(message.reservation_id, "reservation_id"))
    except InvalidRequest:
        if is_checked:
            raise
        raise _Doubt from None
    demand = Demand(Amounts(tokens, cost_nano_usd), attempt or 1, 0, shortening)
    return Request(reservation_id, demand, subject_of(user, feature), account, input_tokens, max_wait_seconds, None, gathered)


def _shortening(message: messages.Shorten, *, is_checked: bool) -> Shortening:
    most, fewest, price = message.max_output_tokens, message.min_output_tokens, message.output_nano_usd_per_million
    plain = 1 <= most <= _MOST_OUTPUT_TOKENS and 1 <= fewest <= _MOST_OUTPUT_TOKENS and 0 <= price <= _MOST_NANO_USD
    if not is_checked and not plain:
        raise _Doubt
    return Shortening(most, fewest, price)


def _max_wait_seconds(message: messages.ReserveRequest, *, is_checked: bool) -> float:
    wait = message.max_wait
    if not is_checked and not (0 <= wait.seconds < _MOST_WAIT_SECONDS and 0 <= wait.nanos <= _LAST_NANO):
        raise _Doubt
    return seconds_of(wait)
