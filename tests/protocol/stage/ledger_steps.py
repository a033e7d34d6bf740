"""What a run has the ledger do."""

from uuid import UUID

from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from tests.protocol.stage.scene import END_LEASES, SWEEP, Scene


async def opens(scene: Scene, c: int) -> bool:
    """It hears the Open: it opens the call, or refuses."""
    return await scene.deliver(c, "open")


async def voids(scene: Scene, c: int) -> bool:
    """It hears the Void."""
    return await scene.deliver(c, "void") and await scene.tell_now()


async def settles(scene: Scene, c: int) -> bool:
    """It hears the Settle."""
    return await scene.deliver(c, "settle") and await scene.tell_now()


async def raises_bound(scene: Scene, c: int) -> bool:
    """It hears that the call may come to use more: it raises its bound, or refuses."""
    return await scene.deliver(c, "raise")


async def marks_interrupted(scene: Scene, c: int) -> bool:
    """It hears the Interrupt."""
    return await scene.deliver(c, "interrupt") and await scene.tell_now()


async def lease_ends_at_ledger(scene: Scene, c: int) -> bool:
    """The lease of an open call is over, and the sweep comes by."""
    tenant_id = UUID(scene.tenant.tenant_id)
    await scene.admin.execute(END_LEASES + " AND reservation_id = $2", tenant_id, scene.reservation_id(c))
    return bool(await scene.admin.fetchval(SWEEP)) and await scene.tell_now()


async def answers_fence(scene: Scene, c: int) -> bool:
    """It hears the newest fence of the call; the answer stays on the wire."""
    fences = scene.wire.find("fence", scene.ids(c))
    if not fences:
        return False
    # The last one asked for: an older one is of an epoch that is over.
    answer = await fences[-1].deliver()
    if isinstance(answer, bytes):
        (outcome,) = ledger_pb.FenceCallsResponse.FromString(answer).outcomes
        scene.calls[c].fence_answers.append((fences[-1].epoch, outcome))
    return await scene.tell_now()


async def begins_epoch(scene: Scene) -> bool:
    """Answers the newest request for a snapshot that has none: an older one is late."""
    waiting = [letter for letter, _ in scene.rebuilds if not letter.answers]
    if not waiting:
        return False
    await waiting[-1].deliver()
    return True
