"""Decisions through the service, as inference asks for them: one a call, and many tenants' in one message."""

from __future__ import annotations

import asyncio
import secrets

import grpc

from bench.limits.demands import Shape, request
from bench.limits.world import SERVICE, World
from bench.process_cost import CpuReading
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages

CALL_SECONDS = 30.0
TRACEPARENT = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"


class ServiceLoad:
    """Reserves for the tenants of a shape in turn. Messages travel as bytes, so that little of this process's time is spent on them."""

    def __init__(self, world: World, shape: Shape, batch_size: int) -> None:
        self._world = world
        self._batch_size = batch_size
        self._tokens = [world.peer.tenants.token(tenant_id, shape.rules) for tenant_id in shape.tenant_ids]
        plain = world.inference.metadata(None, TRACEPARENT)
        self._plain = plain
        self._metadata = [
            (*plain, ("x-tenant-context", token), ("x-tenant-id", str(tenant_id)))
            for tenant_id, token in zip(shape.tenant_ids, self._tokens, strict=True)
        ]
        self._reserve = world.inference.channel.unary_unary(f"/{SERVICE}/Reserve")
        self._reserve_batch = world.inference.channel.unary_unary(f"/{SERVICE}/ReserveBatch")

    async def first_touch(self, concurrency: int) -> dict[str, float]:
        """Asks once for each tenant: proof, rules and counters are fetched and made. Returns CPU of the service and of Redis a tenant."""
        left, before = iter(range(len(self._tokens))), CpuReading.of(self._world.pids)

        async def touch_some() -> None:
            for place in left:
                await self.unary(place)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(touch_some())
        spent = CpuReading.of(self._world.pids).since(before)
        return {f"{name}_cpu_us": round(seconds * 1e6 / len(self._tokens), 1) for name, seconds in spent.items()}

    async def unary(self, number: int) -> None:
        """One Reserve. Raises when it is not held."""
        await self.unary_by(self._reserve, number)

    async def unary_by(self, method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes], number: int) -> bytes:
        """The same by another method, of another server; returns the answer."""
        place = number % len(self._tokens)
        return await method(request(number).SerializeToString(), metadata=self._metadata[place], timeout=CALL_SECONDS)

    async def answer_bytes(self) -> int:
        """How large the answer to a Reserve is."""
        return len(await self.unary_by(self._reserve, 0))

    async def batch(self, number: int) -> None:
        """One ReserveBatch. Raises when any of it is not held."""
        first, count = number * self._batch_size, len(self._tokens)
        items = [
            messages.ReserveBatchItem(context_token=self._tokens[place % count], request=request(place))
            for place in range(first, first + self._batch_size)
        ]
        sent = messages.ReserveBatchRequest(items=items).SerializeToString()
        answer = await self._reserve_batch(sent, metadata=self._plain, timeout=CALL_SECONDS)
        outcomes = messages.ReserveBatchResponse.FromString(answer).outcomes
        if len(outcomes) != self._batch_size or not all(outcome.HasField("held") for outcome in outcomes):
            raise RuntimeError(f"not all of a batch was held: {outcomes[0]}")
