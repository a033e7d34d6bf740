"""What a run of chaos does, drawn from its seed alone: what each caller asks, and which process dies when."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from devstack.stack import START_ORDER
from mesh.inference.v1 import inference_service_pb2

PARTS = (*START_ORDER, "postgres", "redis", "qdrant", "provider")
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 3.0
MAX_OUTPUT_TOKENS = 200
_OFF = inference_service_pb2.RETRIEVAL_MODE_OFF
_RETRIEVAL = (_OFF, _OFF, inference_service_pb2.RETRIEVAL_MODE_BEST_EFFORT, inference_service_pb2.RETRIEVAL_MODE_REQUIRED)
# Orders to the provider, with how often each is drawn.
_ORDERS = (
    (6, ""),
    (6, "output_tokens={tokens}"),
    (8, "output_tokens={tokens} token_ms={pace}"),
    (1, "output_tokens=400"),
    (2, "latency_ms={wait}"),
    (1, "error=400"),
    (2, "error=429 retry_after=1"),
    (1, "error=500"),
    (2, "error=529"),
    (2, "overload_after={some} output_tokens={tokens} token_ms={pace}"),
    (3, "cut_after={some} output_tokens={tokens} token_ms={pace}"),
    (1, "stall_after={some} output_tokens={tokens}"),
    # Slow enough that whoever is told to stop is heard within what is held for it.
    (1, "ignore_max_tokens output_tokens=450 token_ms=20"),
)


@dataclass(frozen=True, slots=True)
class Order:
    """One call of a caller: what the provider is told, how long the caller waits, whether it goes away before, how often it repeats it."""

    text: str
    streamed: bool
    retrieval: inference_service_pb2.RetrievalMode.ValueType
    seconds: float
    leaves_after_seconds: float | None
    in_conversation: bool
    repeat_count: int
    pause_seconds: float


@dataclass(frozen=True, slots=True)
class UnitOrder:
    """One use of a unit of the product, repeated until it is answered."""

    quantity: int
    pause_seconds: float


@dataclass(frozen=True, slots=True)
class EventOrder:
    """One event of the product, repeated until it is answered.

    It happened `months_ago`, in the part of that month that `moment` (0 to 1) tells; `taken_back` right after it.
    """

    quantity: int
    months_ago: int
    moment: float
    taken_back: bool
    pause_seconds: float


@dataclass(frozen=True, slots=True)
class Death:
    """Which part is killed, how long after the one before.

    `forgets`: its data goes with it, where the mesh has to bear that (Redis). `early`: it is killed also while it is starting.
    """

    after_seconds: float
    part: str
    forgets: bool
    early: bool


def deaths(seed: int) -> Iterator[Death]:
    """Yields deaths without end."""
    rng = random.Random(f"{seed}/deaths")
    while True:
        part, pause_seconds = rng.choice(PARTS), rng.uniform(SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        yield Death(pause_seconds, part, forgets=part == "redis" and rng.random() < 0.5, early=rng.random() < 0.2)


def orders(seed: int, tenant: int, caller: int) -> Iterator[Order | UnitOrder | EventOrder]:
    """Yields what one caller of a tenant does, without end."""
    rng = random.Random(f"{seed}/tenant {tenant}/caller {caller}")
    while True:
        pause_seconds = rng.uniform(0.0, 0.6)
        kind = rng.random()
        if kind < 0.1:
            yield UnitOrder(rng.randint(1, 5), pause_seconds)
            continue
        if kind < 0.2:
            yield EventOrder(rng.randint(1, 400), rng.choice((0, 0, 1, 2)), rng.random(), rng.random() < 0.25, pause_seconds)
            continue
        yield Order(
            text=_text(rng),
            streamed=rng.random() < 0.7,
            retrieval=rng.choice(_RETRIEVAL),
            seconds=rng.choice((0.05, 0.5, 3.0, 8.0, 8.0, 8.0)),
            leaves_after_seconds=rng.uniform(0.0, 1.5) if rng.random() < 0.15 else None,
            in_conversation=rng.random() < 0.3,
            repeat_count=rng.choice((0, 0, 2)),
            pause_seconds=pause_seconds,
        )


def closings(seed: int, tenant: int) -> tuple[float, float]:
    """Draws when the two months before this one are closed for a tenant, as parts of the storm."""
    rng = random.Random(f"{seed}/tenant {tenant}/closings")
    return rng.uniform(0.1, 0.5), rng.uniform(0.5, 0.9)


def _text(rng: random.Random) -> str:
    (order,) = rng.choices([order for _, order in _ORDERS], [weight for weight, _ in _ORDERS])
    told = order.format(tokens=rng.randint(1, 120), some=rng.randint(0, 40), pace=rng.choice((5, 20)), wait=rng.randint(50, 800))
    question = rng.choice(("Say hello.", "How many days of paid holiday do I have a year?", "Go on."))
    return f"[[stub: {told}]] {question}" if told else question
