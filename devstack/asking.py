"""One question asked of the mesh as a product back end asks it, with everything one may want to know of the answer."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc

from devstack.mesh_client import MeshClient, NewTrace, credentials, refusal
from devstack.state import DemoTenant
from mesh.inference.v1 import inference_service_pb2

CALL_TIMEOUT_SECONDS = 30.0
LONGEST_WAIT_SECONDS = 65.0
WORTH_WAITING_FOR = frozenset({"PLAN_LIMIT", "CONCURRENCY", "LIMITS_REBUILDING"})
NANO_USD_PER_USD = 1_000_000_000


@dataclass(slots=True)
class Asked:
    """An answered question."""

    call_id: uuid.UUID
    trace: NewTrace
    text: str = ""
    summary: inference_service_pb2.CallSummary = field(default_factory=inference_service_pb2.CallSummary)

    @property
    def cost_nano_usd(self) -> int:
        """The exact cost."""
        return int(self.summary.cost.nano_usd)


def new_call_id() -> uuid.UUID:
    """Makes an id for a call of the caller's own."""
    return uuid.uuid4()


async def ask(
    client: MeshClient, tenant: DemoTenant, question: str, *, feature: str = "handbook", on_text: Callable[[str], None] = lambda _: None
) -> Asked:
    """Asks a question over the tenant's documents, streamed.

    Raises: grpc.aio.AioRpcError as the mesh refuses.
    """
    asked = Asked(new_call_id(), NewTrace.begin())
    request = inference_service_pb2.StreamGenerateRequest(
        messages=[inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text=question)],
        options=inference_service_pb2.GenerateOptions(
            feature=feature,
            max_output_tokens=300,
            retrieval=inference_service_pb2.RetrievalOptions(mode=inference_service_pb2.RETRIEVAL_MODE_REQUIRED),
        ),
    )
    metadata = credentials(tenant.api_key, call_id=asked.call_id, trace=asked.trace)
    async for event in client.inference.StreamGenerate(request, metadata=metadata, timeout=CALL_TIMEOUT_SECONDS):
        match event.WhichOneof("event"):
            case "delta":
                asked.text += event.delta.text
                on_text(event.delta.text)
            case "final":
                asked.summary = event.final
    return asked


async def patiently(call: Callable[[], Awaitable[Asked]], tell: Callable[[str], None]) -> Asked:
    """Makes a call; refused for a limit that frees within a minute, it waits as long as the refusal says and makes it once more."""
    try:
        return await call()
    except grpc.aio.AioRpcError as error:
        told = refusal(error)
        if told.retry_after_seconds is None or told.reason not in WORTH_WAITING_FOR or told.retry_after_seconds > LONGEST_WAIT_SECONDS:
            raise
    tell(f"waiting {told.retry_after_seconds:.0f} s: {told.message}")
    await asyncio.sleep(told.retry_after_seconds + 0.1)
    return await call()


def usd(nano_usd: int) -> str:
    """Writes an amount exactly, such as `$0.000255000`."""
    sign = "-" if nano_usd < 0 else ""
    whole, fraction = divmod(abs(nano_usd), NANO_USD_PER_USD)
    return f"{sign}${whole}.{fraction:09d}"
