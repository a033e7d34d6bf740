"""What a run has the limits do, and what becomes of their data."""

import asyncio

import grpc
import redis.asyncio

from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from tests.protocol.stage.scene import FORBIDDEN_SECONDS, LETTER_SECONDS, LOOK_SECONDS, Scene, soon
from tests.protocol.stage.wire import Answer

# Limits that have their data are in the model's epoch 0: here the first one they asked for.
_FIRST_EPOCH = 1
_HELD = 1


async def holds(scene: Scene, c: int) -> bool:
    """They hear the Reserve: they hold, refuse, or repeat their answer."""
    # Without their data the limits decide nothing: the message waits for them.
    return not scene.calls[c].expired and await scene.limits_have_data() and await scene.deliver(c, "reserve")


async def holds_more(scene: Scene, c: int) -> bool:
    """They hear the Extend: they hold more, or refuse."""
    return await scene.limits_have_data() and await scene.deliver(c, "extend")


async def releases(scene: Scene, c: int) -> bool:
    """They hear the Release."""
    return await scene.deliver(c, "release")


async def lease_ends_at_limits(scene: Scene, c: int) -> bool:
    """Ends the lease in the store; the limits ask, or have let go."""
    reservation_id = scene.reservation_id(c)
    async with redis.asyncio.from_url(scene.theatre.stack.redis.url) as client:
        now_s, now_us = await client.time()
        key = f"{{{scene.tenant.tenant_id}}}:leases"
        if not await client.zadd(key, {reservation_id.bytes: now_s * 1_000_000 + now_us - 1}, xx=True, ch=True):
            return False
    before = len(scene.wire.find("fence", (reservation_id,)))

    async def happened() -> bool:
        return len(scene.wire.find("fence", (reservation_id,))) > before or await scene.record_state(c) != _HELD

    return await soon(happened, LETTER_SECONDS)


async def hears_void_or_settled(scene: Scene, c: int) -> bool:
    """They hear that the call ended without their knowing, and let go."""
    return await _hears_fence(scene, c, {ledger_pb.FENCE_OUTCOME_VOID, ledger_pb.FENCE_OUTCOME_SETTLED_BEFORE})


async def hears_unresolved(scene: Scene, c: int) -> bool:
    """They hear that the call is unresolved, and pin it."""
    return await _hears_fence(scene, c, {ledger_pb.FENCE_OUTCOME_UNRESOLVED})


async def _hears_fence(scene: Scene, c: int, outcomes: set[int]) -> bool:
    """Lets an answer through that the ledger gave to a fence of the newest epoch: one of these, if it gave one."""
    if not scene.calls[c].fence_answers:
        return False
    newest = max(epoch for epoch, _ in scene.calls[c].fence_answers)
    answers = [answer for answer in scene.calls[c].fence_answers if answer[0] == newest]
    reservation_id = scene.reservation_id(c)
    scene.wire.heard[reservation_id] = 0
    scene.wire.fenced[reservation_id] = next((answer for answer in answers if answer[1] in outcomes), answers[-1])
    heard = await scene.wire.wait_until(lambda: scene.wire.heard[reservation_id] > 0, FORBIDDEN_SECONDS)
    if heard:
        await soon(lambda: _is_no_longer_held(scene, c), FORBIDDEN_SECONDS)
    return heard


async def _is_no_longer_held(scene: Scene, c: int) -> bool:
    return await scene.record_state(c) != _HELD


async def hears_end(scene: Scene, c: int) -> bool:
    """They hear the newest Commit of the call."""
    commits = scene.wire.find("commit", scene.ids(c))
    return bool(commits) and await scene.wire.commit(commits[-1])


async def hears_pin(scene: Scene, c: int) -> bool:
    """They hear the newest Pin of the call."""
    pins = scene.wire.find("pin", scene.ids(c))
    return bool(pins) and await scene.wire.commit(pins[-1])


async def meets_newer_epoch(scene: Scene) -> bool:
    """They hear the end of a call that has the newest epoch of all."""
    told = [letter for letter in scene.wire.letters if letter.kind in ("commit", "pin")]
    return bool(told) and await scene.wire.commit(max(told, key=lambda letter: letter.epoch))


async def loses_data(scene: Scene) -> bool:
    """Redis is emptied."""
    await scene.theatre.lose_limits_data()
    return True


async def asks_for_snapshot(scene: Scene) -> bool:
    """Has a replica of the limits asked by a caller that waits for no other answer; it asks the ledger."""
    if await scene.limits_have_data():
        return False
    waiting = [letter for letter, asker in scene.rebuilds if not asker.done()]
    if len(waiting) == len(scene.theatre.limiters):
        waiting[0].lose()
    free = len(waiting) % len(scene.theatre.limiters)
    before = len(scene.wire.find("rebuild"))
    asker = asyncio.get_running_loop().create_task(_ask_limits(scene, free))
    if not await scene.wire.wait_until(lambda: len(scene.wire.find("rebuild")) > before, LETTER_SECONDS):
        return False
    scene.rebuilds.append((scene.wire.find("rebuild")[-1], asker))
    return True


async def _ask_limits(scene: Scene, limiter: int) -> None:
    try:
        await scene.theatre.ask_limits(scene.tenant, limiter)
    except grpc.aio.AioRpcError:
        # Nobody answered the limits: they say so, and whoever asks next has them ask again.
        return


async def loads_snapshot(scene: Scene, epoch: int) -> bool:
    """Gives the limits the snapshot of an epoch: they load it, or ask for another. One that was loaded before is loaded again."""
    for letter, asker in scene.rebuilds:
        if letter.answers and _epoch(letter.answers[-1]) == epoch + _FIRST_EPOCH and not asker.done():
            letter.give(letter.answers[-1])
            return await _went_on(scene, asker)
    return await scene.theatre.tap.repeat(scene.theatre.stack.redis.url, scene.tenant.tenant_id, epoch + _FIRST_EPOCH)


async def _went_on(scene: Scene, asker: "asyncio.Task[None]") -> bool:
    before = len(scene.wire.find("rebuild"))

    async def happened() -> bool:
        return asker.done() or len(scene.wire.find("rebuild")) > before

    return await soon(happened, LETTER_SECONDS)


async def reserve_expires(scene: Scene, c: int) -> bool:
    """The Reserve is too old from here on: it is delivered no more."""
    scene.calls[c].expired = True
    return True


async def forgets(scene: Scene, c: int) -> bool:
    """Drops the record, as the limits may once its Reserve is too old; before that it is for them to keep it."""
    if not scene.calls[c].expired:
        await asyncio.sleep(4 * LOOK_SECONDS)
        return await scene.record_state(c) is None
    async with redis.asyncio.from_url(scene.theatre.stack.redis.url) as client:
        prefix, key = f"{{{scene.tenant.tenant_id}}}:", scene.reservation_id(c).bytes
        await client.hdel(f"{prefix}reservations", key)
        await client.zrem(f"{prefix}ended", key)
    return True


def _epoch(answer: Answer) -> int:
    return ledger_pb.BeginEpochResponse.FromString(answer).epoch if isinstance(answer, bytes) else -1
