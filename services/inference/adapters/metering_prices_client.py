"""The prices port over the metering service: the book in force, kept at most 60 s and never past the moment the next one takes over."""

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from mesh.metering.v1 import price_service_pb2 as pb
from mesh.metering.v1.price_service_pb2_grpc import PriceServiceStub
from services.inference.models import PROVIDER
from services.inference.worst_case import Price
from services.kernel.request_context import RequestScope, enter_scope
from services.kernel.rpc.channel import MeshChannel
from services.kernel.timestamps import from_timestamp

FETCH_SECONDS = 2.0
KEEP_SECONDS = 60.0


class MeteringPrices:
    """One book at a time, fetched once for all who wait."""

    def __init__(
        self,
        channel: MeshChannel,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._channel = channel
        self._stub = PriceServiceStub(channel.channel)
        self._monotonic = monotonic
        self._clock = clock
        self._prices: Mapping[str, Price] = {}
        self._good_until = float("-inf")
        self._fetching: asyncio.Task[None] | None = None

    async def price(self, model: str) -> Price | None:
        """Returns the price in force; None when the book has none. Raises: Unavailable when the book cannot be had."""
        if self._monotonic() >= self._good_until:
            if self._fetching is None:
                # Shared by all who wait, so none of them may own it: it ends by its own timeout.
                self._fetching = asyncio.get_running_loop().create_task(self._fetch(), name="price_book")
                self._fetching.add_done_callback(self._fetched)
            await asyncio.shield(self._fetching)
        return self._prices.get(model)

    async def _fetch(self) -> None:
        enter_scope(RequestScope())
        asked_at = self._monotonic()
        response = await self._channel.unary(
            self._stub.GetPriceBook, pb.GetPriceBookRequest(), timeout_seconds=FETCH_SECONDS, idempotent=True
        )
        self._prices = {
            price.model: Price(response.version, price.input, price.output) for price in response.prices if price.provider == PROVIDER
        }
        self._good_until = asked_at + KEEP_SECONDS
        if response.HasField("next_effective_time"):
            until_next = (from_timestamp(response.next_effective_time) - self._clock()).total_seconds()
            self._good_until = min(self._good_until, asked_at + until_next)

    def _fetched(self, task: "asyncio.Task[None]") -> None:
        self._fetching = None
        if not task.cancelled():
            # Read, so that a fetch whose waiters all left is not reported as a forgotten exception.
            task.exception()
