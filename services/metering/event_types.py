"""The types of events that are known. They never change, so what was read stays true; only new ones must be looked for."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

from services.kernel.errors import ContentConflict
from services.kernel.paging import decode_page_token, encode_page_token

_LISTING = "event_types"


class Aggregation(IntEnum):
    """How events make up a quantity; the numbers are the contract's and the database's."""

    SUM = 1
    COUNT = 2
    MAX = 3


class TypeName(NamedTuple):
    """What an event says of its type."""

    product: str
    event_type: str


@dataclass(frozen=True, slots=True)
class EventType:
    """A type, the unit it counts, and how."""

    name: TypeName
    unit: str
    aggregation: Aggregation


class EventTypeStore(Protocol):
    """Where types are kept."""

    async def register(self, event_type: EventType) -> EventType:
        """Stores the type unless its name is there; returns what is stored under the name."""
        ...

    async def known(self, names: Collection[TypeName]) -> Sequence[TypeName]:
        """Returns those of the names that are stored."""
        ...

    async def page(self, after: TypeName, size: int) -> Sequence[EventType]:
        """Returns up to `size` types, by name, after that one."""
        ...


class EventTypeCatalog:
    """Answers from memory which types are known, and asks the store for those it has not met."""

    def __init__(self, store: EventTypeStore) -> None:
        self._store = store
        self._known: set[TypeName] = set()

    async def unknown(self, names: set[TypeName]) -> set[TypeName]:
        """Returns the names that nobody registered."""
        missing = names - self._known
        if missing:
            # Asked each time: a type is known from the moment it was registered, by whichever replica.
            self._known.update(await self._store.known(missing))
        return missing - self._known

    async def register(self, event_type: EventType) -> None:
        """Makes a type known for ever. Idempotent. Raises: ContentConflict when the name has another unit or aggregation."""
        stored = await self._store.register(event_type)
        if stored != event_type:
            raise ContentConflict(
                "event_type",
                f"{stored.name.product}/{stored.name.event_type} counts {stored.unit} by {stored.aggregation.name} for ever; "
                "register another type",
                unit=stored.unit,
                aggregation=stored.aggregation.name,
            )

    async def page(self, token: str, size: int) -> Sequence[EventType]:
        """Returns up to `size` types after a token. Raises: InvalidRequest(page_token)."""
        position = decode_page_token(token, _LISTING, 2)
        return await self._store.page(TypeName("", "") if position is None else TypeName(*position), size)


def type_page_token(last: EventType) -> str:
    """Returns the token of the page after a type."""
    return encode_page_token(_LISTING, last.name)
