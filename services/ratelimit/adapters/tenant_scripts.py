"""Runs scripts on one tenant's keys: one script is one atomic step. Keys start with the tenant in braces: one slot."""

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol
from uuid import UUID

from redis.exceptions import NoScriptError

from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId, uuid_text
from services.ratelimit.adapters.redis_link import Link
from services.ratelimit.adapters.scripts import NAMES, load_script

Argument = str | bytes | int

KINDS = ("meta", "reservations", "leases", "counters", "ended", "waiters", "guard", "uses")


class TenantScripts:
    """The scripts by name. `bulk` carries what may take longer than a decision."""

    def __init__(self, link: Link, bulk: Link) -> None:
        self.link = link
        self.bulk = bulk
        self._scripts = {name: load_script(name) for name in NAMES}

    async def run(self, name: str, tenant_id: TenantId, *arguments: Argument, bulk: bool = False) -> object:
        """Returns a script's reply. Raises: Unavailable."""
        script = self._scripts[name]
        link = self.bulk if bulk else self.link
        keys = _keys_of(tenant_id)
        try:
            return await link.send("EVALSHA", script.sha, len(keys), *keys, *arguments)
        except NoScriptError:
            return await link.send("EVAL", script.text, len(keys), *keys, *arguments)

    async def run_each(
        self, name: str, calls: Sequence[tuple[TenantId, Sequence[Argument]]], *, bulk: bool = False
    ) -> list[object | Exception]:
        """Returns for each tenant its script's reply, or what kept it from one: Unavailable, or the store's error. Raises: Unavailable."""
        script = self._scripts[name]
        link = self.bulk if bulk else self.link
        commands = [("EVALSHA", script.sha, len(KINDS), *_keys_of(tenant_id), *arguments) for tenant_id, arguments in calls]
        replies = await link.send_all(commands)
        unknown = [place for place, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            again = await link.send_all([("EVAL", script.text, *commands[place][2:]) for place in unknown])
            for place, reply in zip(unknown, again, strict=True):
                replies[place] = reply
        return replies


class ForTenant(Protocol):
    """Work on some of the items of one tenant, by their places."""

    async def __call__(self, tenant_id: TenantId, places: Sequence[int], /) -> None:
        """Does it."""
        ...


async def each_tenant(tenant_ids: Sequence[TenantId], at_most: int, work: ForTenant) -> None:
    """Does the work for each tenant, at most so many of its items at a time. Raises: Unavailable if any of it did."""
    # Chunks may overtake each other: what the scripts do to one reservation ends the same in any order.
    places: dict[TenantId, list[int]] = {}
    for place, tenant_id in enumerate(tenant_ids):
        places.setdefault(tenant_id, []).append(place)
    chunks = [(tenant_id, own[start : start + at_most]) for tenant_id, own in places.items() for start in range(0, len(own), at_most)]
    if len(chunks) == 1:
        await work(*chunks[0])
        return
    try:
        async with asyncio.TaskGroup() as group:
            for tenant_id, own in chunks:
                group.create_task(work(tenant_id, own))
    except* Unavailable as failed:
        raise Unavailable("redis") from failed.exceptions[0]


# As many as a process keeps the rules of: a few hundred bytes each.
@lru_cache(maxsize=10_000)
def _keys_of(tenant_id: TenantId) -> tuple[str, ...]:
    prefix = prefix_of(tenant_id)
    return tuple(prefix + kind for kind in KINDS)


def prefix_of(tenant_id: TenantId) -> str:
    """What every key of the tenant begins with."""
    return f"{{{uuid_text(tenant_id)}}}:"


def tenant_of_key(key: bytes) -> TenantId | None:
    """The tenant a key begins with; None for a key of nobody."""
    try:
        return TenantId(UUID(key[1:37].decode()))
    except ValueError:
        return None
