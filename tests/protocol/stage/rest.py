"""The end of a run: everything that must still happen has happened, and all books are compared."""

import asyncio
from uuid import UUID

import redis.asyncio

from tests.chaos.agreement import Books, differences
from tests.chaos.callers import Diary
from tests.protocol.stage.scene import END_LEASES, SWEEP, TELL_NOW, Scene, soon


async def bring_to_rest(scene: Scene, rest_seconds: float) -> list[str]:
    """Brings everything to its end, as time and a wire that loses nothing would, and returns what then differs."""
    scene.wire.open = True
    for letter in list(scene.wire.letters):
        if letter.reader is not None and not letter.reader.done():
            letter.give(letter.answers[-1] if letter.answers else await letter.deliver())
    await _callers_hear_the_end(scene, rest_seconds)
    found = ["nothing was compared"]

    async def agrees() -> bool:
        nonlocal found
        await _pass_time(scene)
        found = await _compare(scene)
        return not found

    await soon(agrees, rest_seconds)
    return found


async def _callers_hear_the_end(scene: Scene, rest_seconds: float) -> None:
    asking = [call.asking for call in scene.calls.values() if call.asking and scene.theatre.replicas[call.number].alive]
    if asking:
        await asyncio.wait(asking, timeout=rest_seconds)


async def _pass_time(scene: Scene) -> None:
    """Every lease is over, and whatever waits in the ledger's outbox is due."""
    tenant_id = UUID(scene.tenant.tenant_id)
    await scene.admin.execute(END_LEASES, tenant_id)
    await scene.admin.fetchval(SWEEP)
    await scene.admin.execute(TELL_NOW, tenant_id)
    async with redis.asyncio.from_url(scene.theatre.stack.redis.url) as client:
        key = f"{{{scene.tenant.tenant_id}}}:leases"
        for member in await client.zrange(key, 0, -1):
            now_s, now_us = await client.time()
            await client.zadd(key, {member: now_s * 1_000_000 + now_us - 1}, xx=True)


async def _compare(scene: Scene) -> list[str]:
    call_ids = {str(call.call_id) for call in scene.calls.values()}
    limits = await scene.theatre.limits(scene.tenant)
    ledger = await scene.theatre.ledger(scene.tenant)
    answered = {str(call.call_id): call.told for call in scene.calls.values() if call.told}
    diary = Diary(asked=call_ids, answered=answered)
    # The limits may hold more of them than the ledger's bound, never less.
    more = frozenset(str(call.call_id) for call in scene.calls.values() if call.asked_for_more)
    tenant_id = scene.tenant.tenant_id
    return differences(
        Books(scene.theatre.billed(call_ids), ledger, {tenant_id: limits}, {}, {tenant_id: diary}, {tenant_id: scene.budget}, more)
    )
