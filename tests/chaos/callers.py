"""Callers of the mesh while it dies and comes back: they do as their orders say and write down what they were told."""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from devstack.mesh_client import MeshClient, credentials, refusal
from devstack.state import DemoTenant
from mesh.inference.v1 import inference_service_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2
from services.kernel.ids import new_uuid7
from tests.chaos.chances import MAX_OUTPUT_TOKENS, Order, UnitOrder

UNIT = "ai_interviews"
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
    """What the callers of one tenant asked and were told. `runaways` are calls of which the provider was told to ignore `max_tokens`."""

    asked: set[str] = field(default_factory=set)
    runaways: set[str] = field(default_factory=set)
    answered: dict[str, Told] = field(default_factory=dict)
    units_asked: dict[str, int] = field(default_factory=dict)
    units_used: set[str] = field(default_factory=set)
    endings: Counter[str] = field(default_factory=Counter)


class Caller:
    """One caller of a tenant: one thing at a time."""

    def __init__(self, client: MeshClient, tenant: DemoTenant, conversation_id: str, diary: Diary) -> None:
        self._client, self._tenant, self._conversation_id, self._diary = client, tenant, conversation_id, diary

    async def run(self, orders: Iterator[Order | UnitOrder], until: float) -> None:
        """Follows its orders until then, on time.monotonic(); what is under way at that time is brought to its end."""
        for order in orders:
            if time.monotonic() >= until:
                return
            if isinstance(order, UnitOrder):
                await self._use(order)
            else:
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
            told = refusal(error)
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
        for _ in range(_UNIT_TRIES):
            try:
                await self._client.limits.Consume(request, metadata=credentials(self._tenant.api_key), timeout=_UNIT_SECONDS)
            except grpc.aio.AioRpcError as error:
                told = refusal(error)
                self._diary.endings[f"unit: {told.reason or told.code}"] += 1
                if told.code not in _UNANSWERED:
                    return
                await asyncio.sleep(_REPEAT_SECONDS)
            else:
                self._diary.units_used.add(use_id)
                self._diary.endings["unit: used"] += 1
                return

    def _options(self, order: Order) -> inference_service_pb2.GenerateOptions:
        return inference_service_pb2.GenerateOptions(
            max_output_tokens=MAX_OUTPUT_TOKENS,
            conversation_id=self._conversation_id if order.in_conversation else "",
            feature="chaos",
            retrieval=inference_service_pb2.RetrievalOptions(mode=order.retrieval, top_k=1),
        )


def _messages(order: Order) -> list[inference_service_pb2.Message]:
    return [inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text=order.text)]
