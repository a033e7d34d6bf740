"""What a run has a replica of inference do, its caller, and the provider."""

import asyncio
import uuid

import grpc

from mesh.inference.v1 import inference_service_pb2
from tests.chaos.callers import Told
from tests.protocol.stage.scene import FORBIDDEN_SECONDS, LETTER_SECONDS, LOOK_SECONDS, Call, Scene
from tests.protocol.stage.theatre import OUTPUT_TOKENS, OVERRUN
from tests.protocol.world import EXTENDED

_GOES_ON = " And so on."


async def sends_reserve(scene: Scene, c: int) -> bool:
    """A caller asks; the replica reserves."""
    call = scene.calls[c] = Call(c, uuid.uuid4())
    before = len(scene.wire.find("reserve"))
    call.asking = asyncio.get_running_loop().create_task(_ask(scene, call))
    if not await scene.wire.wait_until(lambda: len(scene.wire.find("reserve")) > before, LETTER_SECONDS):
        return False
    (call.reservation_id,) = scene.wire.find("reserve")[-1].reservation_ids
    return True


async def _ask(scene: Scene, call: Call) -> None:
    try:
        async for event in scene.theatre.question(call.number, scene.tenant, call.call_id):
            match event.WhichOneof("event"):
                case "delta":
                    call.heard += event.delta.text
                    await scene.wire.stir()
                case "final":
                    call.told = _told(event.final)
    except grpc.aio.AioRpcError:
        pass
    finally:
        await scene.wire.stir()


async def hears_reserve(scene: Scene, c: int) -> bool:
    """Gives the last answer to the Reserve; the replica opens, or is refused."""
    if not scene.give(c, "reserve"):
        return False
    return await scene.sees(c, "open")


async def cancels_before_open(scene: Scene, c: int) -> bool:
    """The caller goes away before the replica has heard of its hold."""
    if (letter := scene.letter(c, "reserve")) is None or not letter.answers:
        return False
    scene.cancel(c)
    await asyncio.sleep(LOOK_SECONDS)
    letter.give(letter.answers[-1])
    return await scene.sees(c, "release", "open")


async def gives_up(scene: Scene, c: int) -> bool:
    """The caller goes away while the call is being opened."""
    scene.cancel(c)
    return await scene.sees(c, "void", "release", "interrupt")


async def hears_void(scene: Scene, c: int) -> bool:
    """It hears that its Void is recorded, and releases."""
    return scene.give(c, "void") and await scene.sees(c, "release")


async def hears_open(scene: Scene, c: int) -> bool:
    """It hears the last answer to its Open: it dispatches, or ends the call."""
    if not scene.give(c, "open"):
        return False
    await scene.sees(c, "dispatch", "void", "release")
    if (void := scene.letter(c, "void")) is not None and not void.answers:
        # Refused, it makes sure before it lets go: another call than this may have the hold by now.
        void.give(await void.deliver())
        await scene.sees(c, "release")
    return True


async def dispatches(scene: Scene, c: int) -> bool:
    """It has sent the request to the provider."""
    return scene.letter(c, "dispatch") is not None


async def dispatches_without_open(scene: Scene, c: int) -> bool:
    """It hears of its hold, and dispatches before the ledger has answered."""
    if not scene.give(c, "reserve"):
        return False
    await scene.sees(c, "open", "dispatch")
    return await scene.wire.wait_until(lambda: scene.letter(c, "dispatch") is not None, FORBIDDEN_SECONDS)


async def asks_limits_for_more(scene: Scene, c: int) -> bool:
    """The provider writes past what it was told; the replica asks the limits to hold more."""
    return await _write_past_the_line(scene, c) and await scene.sees(c, "extend") and scene.letter(c, "extend") is not None


async def asks_ledger_alone(scene: Scene, c: int) -> bool:
    """The same, and the replica asks the ledger before it has asked the limits."""
    return await _write_past_the_line(scene, c) and await scene.sees(c, "extend", "raise") and scene.letter(c, "raise") is not None


async def _write_past_the_line(scene: Scene, c: int) -> bool:
    call = scene.calls[c]
    call.asked_for_more = scene.gate.write(call.call_id, OVERRUN)
    return call.asked_for_more


async def hears_more_is_held(scene: Scene, c: int) -> bool:
    """It hears that the limits hold more, and asks the ledger."""
    return scene.give(c, "extend") and await scene.sees(c, "raise") and scene.letter(c, "raise") is not None


async def goes_on_when_more_is_held(scene: Scene, c: int) -> bool:
    """It hears that the limits hold more, and takes what the provider writes next without waiting for the ledger."""
    call = scene.calls[c]
    if not scene.give(c, "extend"):
        return False
    scene.gate.write(call.call_id, _GOES_ON)
    call.goes_on = await scene.wire.wait_until(lambda: _GOES_ON in call.heard, FORBIDDEN_SECONDS)
    return call.goes_on


async def hears_reply(scene: Scene, c: int) -> bool:
    """It hears the provider, and settles."""
    return scene.give(c, "dispatch") and await scene.sees(c, "settle")


async def hears_settled(scene: Scene, c: int) -> bool:
    """It hears that it is settled, and so does its caller."""
    return scene.give(c, "settle") and await scene.sees(c)


async def interrupts(scene: Scene, c: int) -> bool:
    """The caller goes away while the provider answers."""
    scene.cancel(c)
    return await scene.sees(c, "interrupt", "void", "release")


async def hears_interrupt(scene: Scene, c: int) -> bool:
    """It hears that the call is marked."""
    return scene.give(c, "interrupt") and await scene.sees(c)


async def is_killed(scene: Scene, c: int) -> bool:
    """Its process dies by SIGKILL."""
    replica = scene.theatre.replicas[c]
    replica.process.kill()
    await replica.process.wait()
    replica.alive = False
    return True


async def bills(scene: Scene, amount: int, c: int) -> bool:
    """The provider hears the request, answers with so much, and bills it; the answer stays on the wire."""
    letter = scene.letter(c, "dispatch")
    # It cannot bill what nobody takes from it.
    if letter is None or letter.answers or (amount == EXTENDED and not scene.calls[c].goes_on):
        return False
    scene.gate.output_tokens[str(scene.calls[c].call_id)] = OUTPUT_TOKENS[amount]
    await letter.deliver()
    return True


def _told(final: inference_service_pb2.CallSummary) -> Told:
    return Told(final.usage.input_tokens, final.usage.output_tokens, final.cost.nano_usd)
