"""The limits' own code without its server and its sweeps, for one tenant: nothing happens but what a test does, at the time it sets."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from services.kernel.rpc.channel import MeshChannel
from services.kernel.tenant_context import TenantContext
from services.ratelimit.adapters.metering_client import MeteringClient
from services.ratelimit.adapters.redis_link import PipelinedLink
from services.ratelimit.adapters.tenant_scripts import KINDS
from services.ratelimit.consumption import Consumptions
from services.ratelimit.extension import Extensions
from services.ratelimit.fencing import Fencing
from services.ratelimit.limits import Subject
from services.ratelimit.look import Looks
from services.ratelimit.open_allowance import OpenAllowance
from services.ratelimit.ready_counters import ReadyCounters
from services.ratelimit.rebuild import Rebuilder
from services.ratelimit.reservation import Reservations
from services.ratelimit.standing import LimitStatus
from services.ratelimit.terms import Terms
from tests.ratelimit.callers import AtStore, Stores
from tests.ratelimit.scripted_peer import LedgerTenant, Peer
from tests.ratelimit.set_clock import SetClockScripts

_READERS = {"meta": "HGETALL", "reservations": "HGETALL", "leases": "ZRANGE", "counters": "HGETALL", "ended": "ZRANGE"}


@dataclass(frozen=True)
class Backing:
    """What every tenant of a test shares: the store, and the peers with a channel to them."""

    link: PipelinedLink
    peer: Peer
    channel: MeshChannel


class LimitsByHand:
    """One tenant: its reservations, extensions, uses and looks, on a clock of its own."""

    def __init__(self, backing: Backing, terms: Terms) -> None:
        self._backing = backing
        self.scripts = SetClockScripts(backing.link)
        stores = Stores(backing.link, scripts=self.scripts)
        self.at_store = AtStore(stores, backing.link, terms)
        self.context: TenantContext = backing.peer.tenants.context(self.at_store.tenant_id)
        store, ledger = stores.decisions, MeteringClient(backing.channel)
        self.fencing = Fencing(store, ledger)
        counters = ReadyCounters(self._terms, Rebuilder(stores.snapshots, ledger), self.fencing, OpenAllowance(store))
        self.reservations = Reservations(store, counters, self.fencing)
        self.extensions = Extensions(store, counters, self.fencing)
        self.consumptions = Consumptions(store, ledger, counters, self.fencing)
        self.looks = Looks(store, counters)

    @property
    def terms(self) -> Terms:
        """The rules in force."""
        return self.at_store.terms

    @property
    def ledger(self) -> LedgerTenant:
        """What the ledger has of the tenant."""
        return self._backing.peer.ledger.of(self.at_store.tenant_id)

    @property
    def fence_count(self) -> int:
        """How often the ledger was asked about ended leases, of anybody."""
        return self._backing.peer.ledger.fence_count

    async def contents(self) -> list[object]:
        """All that is kept of the tenant."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._content(kind)) for kind in KINDS]
        return [task.result() for task in tasks]

    async def statuses(self, subjects: Sequence[Subject]) -> list[tuple[Subject, list[LimitStatus]]]:
        """Every rule as it stands for each of these."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.looks.every(self.context, subject)) for subject in subjects]
        return [(subject, task.result()) for subject, task in zip(subjects, tasks, strict=True)]

    async def _content(self, kind: str) -> object:
        command = _READERS.get(kind, "DUMP")
        arguments = (0, -1, "WITHSCORES") if command == "ZRANGE" else ()
        kept = await self._backing.link.send(command, f"{{{self.at_store.tenant_id}}}:{kind}", *arguments)
        # The order within a hash says nothing.
        return sorted(_pairs(cast("list[bytes]", kept))) if command == "HGETALL" else kept

    async def _terms(self, context: TenantContext, at_least: int = 0) -> Terms:
        return self.at_store.terms


def _pairs(flat: list[bytes]) -> list[tuple[bytes, bytes]]:
    return list(zip(flat[::2], flat[1::2], strict=True))
