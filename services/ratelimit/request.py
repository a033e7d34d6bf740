"""One demand on the limits: as its caller makes it, and as the store is asked about it. Refuses what makes no sense under any limit."""

from collections.abc import Sequence
from uuid import UUID

from services.kernel.errors import InvalidRequest
from services.kernel.hot_value import hot_value
from services.kernel.ids import ReservationId, TenantId
from services.ratelimit.limits import NOBODY, Demand, Subject
from services.ratelimit.terms import Plan, Terms
from services.ratelimit.turn import Stand

LARGEST_ID_AGE_SECONDS = 60


@hot_value
class Request:
    """One demand on the limits, by whom, and under which id.

    `account`: the provider's account it will use, for whose limits `input_tokens` of its tokens are input.
    `max_wait_seconds`: how long it may wait; `stand`: how it stands in line meanwhile. `gathered`: it came with others in one message.
    """

    reservation_id: ReservationId
    demand: Demand
    subject: Subject = NOBODY
    account: str = ""
    input_tokens: int = 0
    max_wait_seconds: float = 0.0
    stand: Stand | None = None
    gathered: bool = False


@hot_value
class Ask:
    """A demand as the store decides it. `at_once`: it is used at once and not held. `together`: only if all asked with it are.

    `gathered`: it came with others already, and waits for none to share its script call.
    """

    reservation_id: ReservationId
    minted_us: int
    plan: Plan
    demand: Demand
    at_once: bool = False
    together: bool = False
    stand: Stand | None = None
    gathered: bool = False


@hot_value
class Question:
    """What the store is asked about one tenant: demands, by its rules, in their order."""

    tenant_id: TenantId
    terms: Terms
    asks: Sequence[Ask]


def minted_us(reservation_id: UUID, field: str = "reservation_id") -> int:
    """When the id was made. `field`: what its caller calls it. Raises: InvalidRequest for one that does not tell."""
    number = reservation_id.int
    # Version 7 of the variant of RFC 9562: UUID's own properties, which ask for the one and the other, cost a decision more than its plan.
    if number >> 76 & 0xF != 7 or number >> 62 & 0b11 != 0b10:
        raise InvalidRequest(field, "must be a UUID of version 7, made for this attempt")
    # Its first 48 bits are milliseconds.
    return (number >> 80) * 1000


def check_request(request: Request) -> None:
    """Refuses what makes no sense whatever the limits are. Raises: InvalidRequest."""
    minted_us(request.reservation_id)
    check_shortening(request.demand)


def check_shortening(demand: Demand) -> None:
    """Refuses amounts that do not hold the output they may be shortened by. Raises: InvalidRequest."""
    shortening = demand.shortening
    if shortening is None:
        return
    if not 1 <= shortening.min_output_tokens <= shortening.max_output_tokens:
        raise InvalidRequest("shorten.min_output_tokens", "must be from 1 to max_output_tokens")
    if shortening.max_output_tokens > demand.amounts.tokens:
        raise InvalidRequest("shorten.max_output_tokens", "must be part of amounts.tokens")
    if shortening.max_output_tokens * shortening.output_nano_usd_per_million // 1_000_000 > demand.amounts.cost_nano_usd:
        raise InvalidRequest("shorten.output_nano_usd_per_million", "amounts.cost_nano_usd must hold the output at this price")


def ask_of(terms: Terms, request: Request) -> Ask:
    """The request as the store decides it. Raises: InvalidRequest for an id that does not tell when it was made."""
    minted, plan = minted_us(request.reservation_id), terms.plan(request.subject)
    return Ask(request.reservation_id, minted, plan, request.demand, False, False, request.stand, request.gathered)
