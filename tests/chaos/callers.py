"""Callers of the mesh while it dies and comes back: they do as their orders say and write down what they were told."""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import grpc

from devstack.mesh_client import MeshClient, credentials
from devstack.state import DemoTenant
from mesh.inference.v1 import inference_service_pb2
from mesh.metering.v1 import event_service_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2
from services.kernel.ids import new_uuid7
from tests.chaos.chances import MAX_OUTPUT_TOKENS, EventOrder, Order, UnitOrder
from tests.chaos.faults import Faults
from tests.metering.billing import ended

UNIT = "ai_interviews"
PRODUCT, EVENT_TYPE, EVENT_SOURCE = "chaos", "interview.completed", "/chaos"
_UNIT_TRIES = 20
_UNIT_SECONDS = 2.0
_REPEAT_SECONDS = 0.3
_UNANSWERED = frozenset(("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN"))


@dataclass(frozen=True, slots=True)
class Told:
    """What the final message of a call said."""

    input_tokens: int
    output_tokens: int
    cost_nano_usd: int


@dataclass(slots=True)
class Diary:
    """What the callers of one tenant asked and were told. `runaways` are calls of which the provider was told to ignore `max_tokens`.

    Of units and events: the quantity by id as it was asked, and the ids that were answered.
    """

    asked: set[str] = field(default_factory=set)
    runaways: set[str] = field(default_factory=set)
    answered: dict[str, Told] = field(default_factory=dict)
    units_asked: dict[str, int] = field(default_factory=dict)
    units_used: set[str] = field(default_factory=set)
    events_asked: dict[str, int] = field(default_factory=dict)
    events_recorded: set[str] = field(default_factory=set)
    reversals_asked: set[str] = field(default_factory=set)
    events_reversed: set[str] = field(default_factory=set)
    endings: Counter[str] = field(default_factory=Counter)


class Caller:
    """One caller of a tenant: one thing at a time."""

    def __init__(self, client: MeshClient, tenant: DemoTenant, conversation_id: str, diary: Diary, faults: Faults) -> None:
        self._client, self._tenant, self._conversation_id = client, tenant, conversation_id
        self._diary, self._faults = diary, faults

    async def run(self, orders: Iterator[Order | UnitOrder | EventOrder], until: float) -> None:
        """Follows its orders until then, on time.monotonic(); what is under way at that time is brought to its end."""
        for order in orders:
            if time.monotonic() >= until:
                return
            match order:
                case UnitOrder():
                    await self._use(order)
                case EventOrder():
                    await self._record(order)
                case Order():
                    await self._ask(order)
            await asyncio.sleep(order.pause_seconds)

    async def _ask(self, order: Order) -> None:
        call_id = uuid.uuid4()
        self._diary.asked.add(str(call_id))
        if "ignore_max_tokens" in order.text:
            self._diary.runaways.add(str(call_id))
        for _ in range(1 + order.repeat_count):
            ending = await self._once(order, call_id)
            self._diary.endings[ending] += 1
            if ending in ("answered", "left"):
                return
            await asyncio.sleep(_REPEAT_SECONDS)

    async def _once(self, order: Order, call_id: uuid.UUID) -> str:
        metadata = credentials(self._tenant.api_key, call_id=call_id)
        call = self._streamed if order.streamed else self._whole
        try:
            async with asyncio.timeout(order.leaves_after_seconds):
                summary = await call(order, metadata)
        except TimeoutError:
            return "left"
        except grpc.aio.AioRpcError as error:
            told = self._faults.read("StreamGenerate" if order.streamed else "Generate", str(call_id), error)
            return told.reason or told.code
        self._diary.answered[str(call_id)] = Told(summary.usage.input_tokens, summary.usage.output_tokens, summary.cost.nano_usd)
        return "answered"

    async def _streamed(self, order: Order, metadata: tuple[tuple[str, str], ...]) -> inference_service_pb2.CallSummary:
        request = inference_service_pb2.StreamGenerateRequest(messages=_messages(order), options=self._options(order))
        stream = self._client.inference.StreamGenerate(request, metadata=metadata, timeout=order.seconds)
        try:
            summary = inference_service_pb2.CallSummary()
            async for event in stream:
                if event.WhichOneof("event") == "final":
                    summary = event.final
            return summary
        finally:
            stream.cancel()

    async def _whole(self, order: Order, metadata: tuple[tuple[str, str], ...]) -> inference_service_pb2.CallSummary:
        request = inference_service_pb2.GenerateRequest(messages=_messages(order), options=self._options(order))
        answer = await self._client.inference.Generate(request, metadata=metadata, timeout=order.seconds)
        return answer.summary

    async def _use(self, order: UnitOrder) -> None:
        use_id = str(new_uuid7())
        self._diary.units_asked[use_id] = order.quantity
        request = rate_limit_service_pb2.ConsumeRequest(consumption_id=use_id, product_unit=UNIT, quantity=order.quantity)
        if await self._until_answered(
            "unit", use_id, lambda metadata: self._client.limits.Consume(request, metadata=metadata, timeout=_UNIT_SECONDS)
        ):
            self._diary.units_used.add(use_id)

    async def _record(self, order: EventOrder) -> None:
        event = _event(order)
        self._diary.events_asked[event.id] = order.quantity
        record = event_service_pb2.RecordEventsRequest(events=[event])
        if not await self._until_answered(
            "event", event.id, lambda metadata: self._client.events.RecordEvents(record, metadata=metadata, timeout=_UNIT_SECONDS)
        ):
            return
        self._diary.events_recorded.add(event.id)
        if not order.taken_back:
            return
        self._diary.reversals_asked.add(event.id)
        back = event_service_pb2.EventReversal(id=event.id, source=event.source, reason="counted by mistake")
        reverse = event_service_pb2.ReverseEventsRequest(reversals=[back])
        if await self._until_answered(
            "reversal", event.id, lambda metadata: self._client.events.ReverseEvents(reverse, metadata=metadata, timeout=_UNIT_SECONDS)
        ):
            self._diary.events_reversed.add(event.id)

    async def _until_answered(self, what: str, about: str, send: Callable[[tuple[tuple[str, str], ...]], Awaitable[object]]) -> bool:
        for _ in range(_UNIT_TRIES):
            try:
                await send(credentials(self._tenant.api_key))
            except grpc.aio.AioRpcError as error:
                told = self._faults.read(what, about, error)
                self._diary.endings[f"{what}: {told.reason or told.code}"] += 1
                if told.code not in _UNANSWERED:
                    return False
                await asyncio.sleep(_REPEAT_SECONDS)
            else:
                self._diary.endings[f"{what}: answered"] += 1
                return True
        return False

    def _options(self, order: Order) -> inference_service_pb2.GenerateOptions:
        return inference_service_pb2.GenerateOptions(
            max_output_tokens=MAX_OUTPUT_TOKENS,
            conversation_id=self._conversation_id if order.in_conversation else "",
            feature="chaos",
            retrieval=inference_service_pb2.RetrievalOptions(mode=order.retrieval, top_k=1),
        )


def _messages(order: Order) -> list[inference_service_pb2.Message]:
    return [inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text=order.text)]


def _event(order: EventOrder) -> event_service_pb2.Event:
    now = datetime.now(UTC)
    period = ended(order.months_ago)
    event = event_service_pb2.Event(id=str(new_uuid7()), source=EVENT_SOURCE, product=PRODUCT, type=EVENT_TYPE, feature="chaos")
    event.data.quantity = order.quantity
    event.time.FromDatetime(period.start_time + order.moment * (min(period.end_time, now) - period.start_time))
    return event
