"""What a tenant takes in Redis: while it is used, and at rest, when everything it did has been settled, swept and forgotten."""

import asyncio
import time
from collections.abc import Sequence
from typing import cast
from uuid import UUID

from bench.limits.demands import DEMAND, Shape, request
from bench.limits.service_load import CALL_SECONDS, TRACEPARENT
from bench.limits.world import SERVICE, World
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.ids import TenantId
from services.ratelimit.adapters.tenant_scripts import KINDS, prefix_of

_CALLS = 50
_LOOK_SECONDS = 5.0
_MOST_SECONDS = 300.0


async def use(world: World, shape: Shape) -> int:
    """Makes calls of every tenant through the service and settles them; returns the bytes of the largest tenant right after."""
    reserve = world.inference.channel.unary_unary(f"/{SERVICE}/Reserve")
    commit = world.metering.channel.unary_unary(f"/{SERVICE}/Commit")
    for tenant_id in shape.tenant_ids:
        token = world.peer.tenants.token(tenant_id, shape.rules)
        metadata = (*world.inference.metadata(None, TRACEPARENT), ("x-tenant-context", token), ("x-tenant-id", str(tenant_id)))
        commits = []
        for number in range(_CALLS):
            asked = request(number)
            await reserve(asked.SerializeToString(), metadata=metadata, timeout=CALL_SECONDS)
            ref = messages.ReservationRef(tenant_id=tenant_id.bytes, reservation_id=UUID(asked.reservation_id).bytes)
            actual = messages.Amounts(tokens=DEMAND.amounts.tokens // 2, cost_nano_usd=DEMAND.amounts.cost_nano_usd // 2)
            commits.append(messages.Commit(reservation=ref, epoch=1, kind=messages.COMMIT_KIND_SETTLED, actual=actual))
        sent = messages.CommitRequest(commits=commits).SerializeToString()
        await commit(sent, metadata=world.metering.metadata(None, TRACEPARENT), timeout=CALL_SECONDS)
    return max(await _bytes(world, shape.tenant_ids))


async def at_rest(world: World, shape: Shape) -> int | None:
    """Waits until nothing but counters of days and months is left; returns the bytes of the largest tenant, None if that took too long."""
    end = time.monotonic() + _MOST_SECONDS
    while time.monotonic() < end:
        kept = [await world.link.send("EXISTS", prefix_of(tenant_id) + "reservations") for tenant_id in shape.tenant_ids]
        if not any(kept):
            return max(await _bytes(world, shape.tenant_ids))
        await asyncio.sleep(_LOOK_SECONDS)
    return None


async def _bytes(world: World, tenant_ids: Sequence[TenantId]) -> list[int]:
    sums = []
    for tenant_id in tenant_ids:
        keys = [prefix_of(tenant_id) + kind for kind in KINDS]
        sizes = [cast("int | None", await world.link.send("MEMORY", "USAGE", key, "SAMPLES", 0)) for key in keys]
        sums.append(sum(size or 0 for size in sizes))
    return sums
