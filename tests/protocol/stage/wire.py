"""What lies between the parties when real services play a run: every message of the protocol stops here until it is told to go on.

A message is delivered when the run says so, as often as it says, also after its sender died or stopped to wait. Whatever is no message
of the protocol passes; renewals of leases are lost, so that a lease ends when the run says so.
"""

# grpc is generic in its stubs only: subscripting it at run time fails.
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import grpc

from mesh.metering.v1 import ledger_service_pb2 as ledger_pb
from mesh.ratelimit.v1 import rate_limit_service_pb2 as limit_pb

DELIVERY_SECONDS = 30.0
_PASSED_ON = ("x-", "traceparent", "authorization")
_LOST = frozenset(("Renew", "RenewCalls"))
_FENCE, _COMMIT = "FenceCalls", "Commit"
_COMMIT_KINDS = {limit_pb.COMMIT_KIND_SETTLED: "commit", limit_pb.COMMIT_KIND_VOID: "commit", limit_pb.COMMIT_KIND_PIN: "pin"}

Metadata = tuple[tuple[str, str | bytes], ...]


class Refused(Exception):
    """What a service answered instead of a response."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: Metadata) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code, self.details, self.trailing = code, details, trailing


Answer = bytes | Refused


@dataclass(eq=False)
class Letter:
    """One message: of which kind, about which reservations, and every answer it got. `reader` waits for the one it is given."""

    kind: str
    reservation_ids: tuple[UUID, ...]
    epoch: int
    sender: str
    send: Callable[[], Any]
    answers: list[Answer] = field(default_factory=list)
    reader: asyncio.Future[Answer] | None = None

    async def deliver(self) -> Answer:
        """Brings it to whom it is for, and keeps the answer."""
        answer: Answer = await self.send()
        self.answers.append(answer)
        return answer

    def give(self, answer: Answer) -> None:
        """Gives the sender an answer, if it still waits for one."""
        if self.reader is not None and not self.reader.done():
            self.reader.set_result(answer)

    def lose(self) -> None:
        """Tells the sender that nobody answered; the message itself may still be delivered."""
        self.give(Refused(grpc.StatusCode.UNAVAILABLE, "lost on the wire", ()))


class Wire:
    """The messages of one run. `open`: whatever comes passes at once, as on a wire where nothing is lost."""

    def __init__(self) -> None:
        self.letters: list[Letter] = []
        self.fenced: dict[UUID, tuple[int, int]] = {}
        self.heard: dict[UUID, int] = {}
        self.done: set[tuple[str, UUID, int]] = set()
        self.open = False
        self.changed = asyncio.Condition()

    def clear(self) -> None:
        """Forgets the run that is over."""
        for letter in self.letters:
            letter.lose()
        self.letters.clear()
        self.fenced.clear()
        self.heard.clear()
        self.done.clear()

    async def commit(self, letter: Letter) -> bool:
        """Delivers an end of a call to the limits. Once they say that it is done, the ledger hears so when it sends it again."""
        answer = await letter.deliver()
        if not isinstance(answer, bytes):
            return False
        if limit_pb.CommitResponse.FromString(answer).outcomes[0] == limit_pb.COMMIT_OUTCOME_DONE:
            self.done.add((letter.kind, letter.reservation_ids[0], letter.epoch))
        return True

    def find(self, kind: str, reservation_ids: Sequence[UUID] = (), sender: str = "") -> list[Letter]:
        """The messages of a kind about any of the reservations, the first sent first."""
        return [
            letter
            for letter in self.letters
            if letter.kind == kind
            and (not reservation_ids or set(letter.reservation_ids) & set(reservation_ids))
            and (not sender or letter.sender == sender)
        ]

    async def put(self, letter: Letter) -> None:
        """Takes a message."""
        async with self.changed:
            self.letters.append(letter)
            self.changed.notify_all()

    async def wait_until(self, true: Callable[[], bool], within_seconds: float) -> bool:
        """Returns whether it became true in time; looked at whenever a message comes or is heard."""
        try:
            async with asyncio.timeout(within_seconds), self.changed:
                await self.changed.wait_for(true)
        except TimeoutError:
            return False
        return True

    async def stir(self) -> None:
        """Makes whoever waits look again."""
        async with self.changed:
            self.changed.notify_all()


@asynccontextmanager
async def route(wire: Wire, sender: str, port: int, target: str) -> AsyncIterator[None]:
    """Serves as the target for one sender, on a loopback port."""
    async with grpc.aio.insecure_channel(target) as channel:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((_Route(wire, sender, channel),))
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        try:
            yield
        finally:
            await server.stop(0)


class _Route(grpc.GenericRpcHandler):
    def __init__(self, wire: Wire, sender: str, channel: grpc.aio.Channel) -> None:
        self._wire, self._sender, self._channel = wire, sender, channel

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        path = handler_call_details.method

        async def handle(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            metadata = tuple((key, value) for key, value in context.invocation_metadata() or () if key.startswith(_PASSED_ON))
            answer = await self._answer(path, request, metadata)
            if isinstance(answer, Refused):
                await context.abort(answer.code, answer.details, answer.trailing)
                raise AssertionError
            return answer

        return grpc.unary_unary_rpc_method_handler(handle)

    async def _answer(self, path: str, request: bytes, metadata: Metadata) -> Answer:
        method = path.rpartition("/")[2]

        async def send(body: bytes = request) -> Answer:
            return await _call(self._channel, path, body, metadata)

        if method in _LOST and not self._wire.open:
            return Refused(grpc.StatusCode.UNAVAILABLE, "lost on the wire", ())
        if method == _COMMIT:
            return await self._commits(request, send)
        if self._wire.open:
            return await send()
        if method == _FENCE:
            return await self._fences(request, send)
        return await self._one(method, request, send)

    async def _one(self, method: str, request: bytes, send: Callable[[], Any]) -> Answer:
        read = _READERS.get(method)
        if read is None:
            return await send()
        kind, reservation_ids, epoch = read(request)
        letter = Letter(kind, reservation_ids, epoch, self._sender, send, reader=asyncio.get_running_loop().create_future())
        await self._wire.put(letter)
        assert letter.reader is not None
        return await letter.reader

    async def _commits(self, request: bytes, send: Callable[[bytes], Any]) -> bytes:
        """Each end is a message of its own. Until it is done the ledger hears that it has to send it again, and keeps it in its outbox."""
        outcomes = []
        for commit in limit_pb.CommitRequest.FromString(request).commits:
            kind, reservation_id = _COMMIT_KINDS[commit.kind], UUID(bytes=commit.reservation.reservation_id)
            known = [letter for letter in self._wire.find(kind, (reservation_id,)) if letter.epoch == commit.epoch]
            if not known:
                body = limit_pb.CommitRequest(commits=[commit]).SerializeToString()
                known = [Letter(kind, (reservation_id,), commit.epoch, self._sender, lambda body=body: send(body))]
                await self._wire.put(known[0])
            name = (kind, reservation_id, commit.epoch)
            if self._wire.open and name not in self._wire.done:
                await self._wire.commit(known[0])
            outcomes.append(limit_pb.COMMIT_OUTCOME_DONE if name in self._wire.done else limit_pb.COMMIT_OUTCOME_RETRY)
        return limit_pb.CommitResponse(outcomes=outcomes).SerializeToString()

    async def _fences(self, request: bytes, send: Callable[[bytes], Any]) -> Answer:
        """Each fence is a message of its own. The limits ask every sweep; they hear an answer once it is let through, until then none."""
        fences = ledger_pb.FenceCallsRequest.FromString(request).calls
        heard = []
        for fence in fences:
            reservation_id = UUID(bytes=fence.ref.reservation_id)
            if all(known.epoch != fence.epoch for known in self._wire.find("fence", (reservation_id,))):
                body = ledger_pb.FenceCallsRequest(calls=[fence]).SerializeToString()
                await self._wire.put(Letter("fence", (reservation_id,), fence.epoch, self._sender, lambda body=body: send(body)))
            epoch, outcome = self._wire.fenced.get(reservation_id, (-1, 0))
            # SETTLED makes the limits wait, as no answer at all would: one of several is not held up by the others.
            heard.append(outcome if epoch == fence.epoch else ledger_pb.FENCE_OUTCOME_SETTLED)
            if epoch == fence.epoch:
                self._wire.heard[reservation_id] = self._wire.heard.get(reservation_id, 0) + 1
        await self._wire.stir()
        return ledger_pb.FenceCallsResponse(outcomes=heard).SerializeToString()  # type: ignore[arg-type] # the enum's numbers


async def _call(channel: grpc.aio.Channel, path: str, request: bytes, metadata: Metadata) -> Answer:
    method = channel.unary_unary(path)
    try:
        return bytes(await method(request, metadata=metadata, timeout=DELIVERY_SECONDS))
    except grpc.aio.AioRpcError as error:
        trailing = tuple((key, value) for key, value in error.trailing_metadata() or () if key.endswith("-bin"))
        return Refused(error.code(), error.details() or "", trailing)


Read = tuple[str, tuple[UUID, ...], int]


def _reserve(request: bytes) -> Read:
    told = limit_pb.ReserveRequest.FromString(request)
    return "reserve", (UUID(told.reservation_id),), -1


def _reserve_batch(request: bytes) -> Read:
    items = limit_pb.ReserveBatchRequest.FromString(request).items
    return "reserve", tuple(UUID(item.request.reservation_id) for item in items), -1


def _release(request: bytes) -> Read:
    told = limit_pb.ReleaseRequest.FromString(request)
    return "release", (UUID(told.reservation_id),), told.epoch


def _open(request: bytes) -> Read:
    calls = ledger_pb.OpenCallsRequest.FromString(request).calls
    return "open", tuple(UUID(bytes=call.ref.reservation_id) for call in calls), calls[0].epoch


def _settle(request: bytes) -> Read:
    return "settle", tuple(UUID(bytes=call.ref.reservation_id) for call in ledger_pb.SettleCallsRequest.FromString(request).calls), -1


def _void(request: bytes) -> Read:
    calls = ledger_pb.VoidCallsRequest.FromString(request).calls
    kind = "void" if calls[0].kind == ledger_pb.VOID_KIND_NOT_BILLED else "interrupt"
    return kind, tuple(UUID(bytes=call.ref.reservation_id) for call in calls), -1


def _extend(request: bytes) -> Read:
    told = limit_pb.ExtendRequest.FromString(request)
    return "extend", (UUID(told.reservation_id),), told.epoch


def _raise(request: bytes) -> Read:
    return "raise", tuple(UUID(bytes=call.ref.reservation_id) for call in ledger_pb.ExtendCallsRequest.FromString(request).calls), -1


def _begin_epoch(request: bytes) -> Read:
    return "rebuild", (), -1


_READERS: dict[str, Callable[[bytes], Read]] = {
    "Reserve": _reserve,
    "ReserveBatch": _reserve_batch,
    "Release": _release,
    "OpenCalls": _open,
    "SettleCalls": _settle,
    "VoidCalls": _void,
    "Extend": _extend,
    "ExtendCalls": _raise,
    "BeginEpoch": _begin_epoch,
}
