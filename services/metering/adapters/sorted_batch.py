"""A batch as the SQL functions want it: items in (tenant, reservation) order, one array a column, slices by tenant."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

from asyncpg.pgproto.pgproto import UUID as DriverUUID

from services.metering.call import BatchItem

I = TypeVar("I", bound=BatchItem)  # noqa: E741 - item
V = TypeVar("V")

type_uuid = DriverUUID


class SortedBatch(Generic[I]):
    """Items in the one order in which everybody takes locks, remembering the order they came in."""

    __slots__ = ("first", "items", "last", "order", "reservations", "tenants")

    def __init__(self, items: Sequence[I]) -> None:
        self.order = sorted(range(len(items)), key=lambda index: items[index].tenant_id + items[index].reservation_id)
        self.items = [items[index] for index in self.order]
        # The driver's own UUID type: it is encoded without a detour, and made without parsing.
        self.reservations = [type_uuid(item.reservation_id) for item in self.items]
        self.tenants: list[object] = []
        self.first: list[int] = []
        self.last: list[int] = []
        previous = b""
        for position, item in enumerate(self.items, start=1):
            if item.tenant_id != previous:
                previous = item.tenant_id
                self.tenants.append(type_uuid(previous))
                self.first.append(position)
                self.last.append(position)
            self.last[-1] = position

    def column(self, value: Callable[[I], V]) -> list[V]:
        """Returns one value of every item, in the batch's order."""
        return [value(item) for item in self.items]

    def slices(self) -> tuple[list[object], list[int], list[int]]:
        """Returns the distinct tenants and the first and last position of each, from 1."""
        return self.tenants, self.first, self.last

    def came_as(self, position: int) -> int:
        """Returns where the item at a position of the batch, from 1, was in the sequence it came in, from 0."""
        return self.order[position - 1]


def slices_of(tenants: Sequence[bytes]) -> tuple[list[object], list[int], list[int]]:
    """Returns the distinct tenants of a sorted batch and the first and last position of each, from 1."""
    counts = Counter(tenants)
    last = list(accumulate(counts.values()))
    return [type_uuid(tenant_id) for tenant_id in counts], [1, *(position + 1 for position in last[:-1])], last
