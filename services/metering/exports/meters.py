"""Which meters there are to tell of: those of calls, and units that something here counts. Refuses what would never tell anything."""

from collections.abc import Sequence
from typing import Protocol

from services.kernel.errors import InvalidRequest

# As the outbox is written: `queue_entries` of the migrations.
METERS_OF_CALLS = (
    "calls.count",
    "calls.tokens",
    "calls.input_tokens",
    "calls.output_tokens",
    "calls.cache_read_tokens",
    "calls.cache_write_tokens",
    "calls.cost_nano_usd",
)
# A refusal is in an answer's trailers, several times: 8 KiB in all.
MOST_LISTED = 20


class KnownUnits(Protocol):
    """Knows the product's units."""

    async def is_known(self, unit: str) -> bool:
        """Tells whether a type of events counts the unit, a billing plan charges it or a tenant used it at its limits."""
        ...

    async def known(self, most: int) -> Sequence[str]:
        """Returns up to so many units that types of events count or billing plans charge, by name."""
        ...


async def refuse_untold(meter: str, units: KnownUnits, *, accept_unknown_unit: bool) -> None:
    """Refuses a meter that nothing is known to be told on. Raises: InvalidRequest, which lists what is known."""
    # No unit has a dot in its name: what has one is a meter of calls, or nothing.
    if meter in METERS_OF_CALLS or ("." not in meter and (accept_unknown_unit or await units.is_known(meter))):
        return
    named = await units.known(MOST_LISTED + 1)
    known, more = [*METERS_OF_CALLS, *named[:MOST_LISTED]], " and more units" if len(named) > MOST_LISTED else ""
    why = (
        "is no meter of calls"
        if "." in meter
        else "is no unit that anything counts yet; accept_unknown_unit takes one that tenants will use"
    )
    raise InvalidRequest("meter", f"{why}. Known are {', '.join(known)}{more}", metadata={"known": " ".join(known)})
