"""A tenant's limits as product code asks them: here, from slices, where the demand is high; at the service, use by use, where it is not.

Either way the sum of all uses stays within the rules. One object is one tenant's, in one process and one event loop.
"""

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self
from uuid import UUID
from weakref import WeakSet

import grpc

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from mesh.ratelimit.v1.rate_limit_service_pb2_grpc import RateLimitServiceStub
from tenantry.answers import ADMITTED, ADMITTED_LOCALLY, ADMITTED_WITHOUT_STORE, UseAnswer, failure_of, refusal_of
from tenantry.slice_lane import CLOCK, FinishedSlice, HeldSlice, Lane

_LOOK_SECONDS = 0.05
_MOST_LANES = 50_000
_MOST_RETURNS = 1_000
_TRIES_TO_RETURN = 5
# How long a unit is used without slices after the service gave none.
_REFUSED_SECONDS, _FAILED_SECONDS, _UNSLICEABLE_SECONDS = (0.1, 1.0), 1.0, 10.0

Metadata = Sequence[tuple[str, str]]
_Key = tuple[str, str, str]


class LimitSlices:
    """Decides uses of the product's units. Use it with `async with`: leaving the block gives back what is held."""

    def __init__(
        self,
        stub: RateLimitServiceStub,
        *,
        metadata: Metadata,
        timeout_seconds: float = 2.0,
    ) -> None:
        """`metadata` proves the tenant: `[("authorization", f"Bearer {api_key}")]`, of a key with the scope limits:consume."""
        self._stub = stub
        self._metadata = tuple(metadata)
        self._timeout_seconds = timeout_seconds
        self._lanes: dict[_Key, Lane] = {}
        self._taking: dict[_Key, asyncio.Task[None]] = {}
        self._finished: list[tuple[FinishedSlice, int]] = []
        self._lack = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        _open.add(self)

    async def __aenter__(self) -> Self:
        self._keeper = asyncio.get_running_loop().create_task(self._keep(), name="tenantry.limits")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def try_use(self, unit: str, quantity: int = 1, *, user: str = "", feature: str = "") -> UseAnswer:
        """Uses so many units, all or nothing.

        Raises: grpc.aio.AioRpcError when it cannot be decided; whether it was used is then unknown. ValueError for a quantity below 1.
        """
        lane = self._lanes.get((unit, user, feature))
        if lane is not None and lane.use(quantity):
            return ADMITTED_LOCALLY
        return await self._used_elsewhere((unit, user, feature), quantity, lane)

    def try_use_locally(self, unit: str, quantity: int = 1, *, user: str = "", feature: str = "") -> bool:
        """The same without a wait: False where no slice in hand has them, which says nothing of the limits. Raises: ValueError."""
        lane = self._lanes.get((unit, user, feature)) or self._lane((unit, user, feature))
        return lane is not None and lane.use(quantity)

    async def close(self) -> None:
        """Gives back what is held. Afterwards every use is asked at the service."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
        if self._taking:
            await asyncio.wait(list(self._taking.values()), timeout=self._timeout_seconds)
        for lane in self._lanes.values():
            lane.finish()
        self._collect()
        self._lanes.clear()
        await self._give_back()

    async def _used_elsewhere(self, key: _Key, quantity: int, lane: Lane | None) -> UseAnswer:
        if quantity < 1:
            msg = "quantity must be at least 1"
            raise ValueError(msg)
        if lane is None:
            lane = self._lane(key)
            if lane is not None:
                # Its demand is counted from the first use on.
                lane.use(quantity)
        taking = self._taking.get(key)
        if taking is not None and lane is not None:
            # One request for all who would otherwise ask one each.
            await asyncio.wait([taking])
            if lane.use_again(quantity):
                return ADMITTED_LOCALLY
        return await self._consume(key, quantity)

    async def _consume(self, key: _Key, quantity: int) -> UseAnswer:
        unit, user, feature = key
        request = messages.ConsumeRequest(
            consumption_id=str(_new_uuid7()), product_unit=unit, quantity=quantity, user=user, feature=feature
        )
        try:
            response = await self._stub.Consume(request, timeout=self._timeout_seconds, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            refusal = refusal_of(error)
            if refusal is None:
                raise
            return refusal
        return ADMITTED_WITHOUT_STORE if response.degraded else ADMITTED

    def _lane(self, key: _Key) -> Lane | None:
        if self._keeper is None or len(self._lanes) >= _MOST_LANES:
            return None
        if not self._lanes:
            self._lack.set()
        return self._lanes.setdefault(key, Lane(lambda _: self._lack.set()))

    async def _keep(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS if self._lanes or self._finished else None):
                    await self._lack.wait()
            self._lack.clear()
            for key, lane in list(self._lanes.items()):
                lane.look()
                if lane.is_forgotten:
                    del self._lanes[key]
                elif wanted := lane.wanted():
                    self._ask(key, lane, wanted)
            self._collect()
            if self._finished:
                await self._give_back()

    def _ask(self, key: _Key, lane: Lane, wanted: int) -> None:
        lane.is_asking = True
        task = asyncio.get_running_loop().create_task(self._take(key, lane, wanted), name="tenantry.limits.take")
        self._taking[key] = task
        task.add_done_callback(lambda _: self._asked(key, lane))

    def _asked(self, key: _Key, lane: Lane) -> None:
        del self._taking[key]
        lane.is_asking = False

    async def _take(self, key: _Key, lane: Lane, wanted: int) -> None:
        slice_id = _new_uuid7()
        request = messages.TakeSliceRequest(slice_id=str(slice_id), product_unit=key[0], quantity=wanted, user=key[1], feature=key[2])
        # Before it is sent: the service counts the lease from its arrival.
        asked_at = CLOCK()
        try:
            response = await self._stub.TakeSlice(request, timeout=self._timeout_seconds, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            lane.pause(_pause_seconds(error))
            return
        lease_seconds = response.lease.ToMicroseconds() / 1e6
        held = HeldSlice.from_lease(slice_id, response.epoch, response.granted, response.largest_use, asked_at, lease_seconds)
        lane.take(held, wanted, lease_seconds)

    def _collect(self) -> None:
        for lane in self._lanes.values():
            self._finished += [(finished, 1) for finished in lane.finished]
            lane.finished.clear()

    async def _give_back(self) -> None:
        some, self._finished = self._finished[:_MOST_RETURNS], self._finished[_MOST_RETURNS:]
        if not some:
            return
        returns = [messages.SliceReturn(slice_id=str(item.slice_id), epoch=item.epoch, used=item.used) for item, _ in some]
        try:
            await self._stub.ReturnSlices(
                messages.ReturnSlicesRequest(slices=returns), timeout=self._timeout_seconds, metadata=self._metadata
            )
        except grpc.aio.AioRpcError:
            # What is never given back stays charged until it leaves its windows.
            self._finished += [(item, tries + 1) for item, tries in some if tries < _TRIES_TO_RETURN]


def _pause_seconds(error: grpc.aio.AioRpcError) -> float:
    failure = failure_of(error)
    if failure.reason in ("NOT_SLICEABLE", "FEATURE"):
        return _UNSLICEABLE_SECONDS
    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        return _FAILED_SECONDS
    least, most = _REFUSED_SECONDS
    return min(most, max(least, failure.retry_after_seconds or most))


def _new_uuid7() -> UUID:
    # Source: RFC 9562, 5.7.
    milliseconds, tail = time.time_ns() // 1_000_000, secrets.randbits(74)
    return UUID(int=milliseconds << 80 | 0x7 << 76 | (tail >> 62) << 64 | 0b10 << 62 | tail & (1 << 62) - 1)


_open: "WeakSet[LimitSlices]" = WeakSet()


def _forget_in_child() -> None:
    # A child made by fork has a copy of what its parent holds, which only one of them may use.
    for limits in _open:
        limits._lanes.clear()
        limits._keeper = None


os.register_at_fork(after_in_child=_forget_in_child)
