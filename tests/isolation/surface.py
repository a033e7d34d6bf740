"""What the mesh really serves: every rpc as the five ports' own reflection tells it, and one way to call any of them.

Nothing here is typed by hand but the names of the five ports, so an rpc that is added is attacked or reported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from devstack.certificates import CLIENT
from devstack.mesh_client import open_channel, refusal
from devstack.stack import Stack
from devstack.state import SERVICES
from mesh.common.v1 import policy_pb2

Metadata = Sequence[tuple[str, str]]
# Not sent: says whose leaf the caller of a TLS mesh shows. Without it, it is the client's, which any product has.
LEAF = "leaf-of"
CALL_TIMEOUT_SECONDS = 15.0
OK = "OK"


@dataclass(frozen=True, slots=True)
class Rpc:
    """One method of one port, with the policy its contract declares."""

    port: str
    path: str
    request_type: type[Message]
    response_type: type[Message]
    streams: bool
    tenant: int
    callers: frozenset[str]
    scopes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.port}{self.path}"

    @property
    def is_external(self) -> bool:
        """Tells whether outsiders may call it at all."""
        return "external" in self.callers


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: the status as callers can branch on it, or the messages."""

    code: str
    reason: str = ""
    text: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()

    @property
    def refused_as(self) -> tuple[str, str]:
        """The status code and the typed reason."""
        return self.code, self.reason

    def everything(self) -> bytes:
        """All that the caller can read, as bytes to search in."""
        parts = [self.text.encode(), repr(sorted(self.metadata.items())).encode()]
        return b"\n".join([*parts, *(message.SerializeToString() for message in self.messages)])


class Surface:
    """The five ports and every rpc found behind them."""

    def __init__(self, stack: Stack) -> None:
        certificates = stack.wiring.certificates
        self.tls = certificates is not None
        # Whoever attacks has the client's leaf; the services' own are there for callers inside the mesh.
        self._channels = {
            (port, who): open_channel(stack.ports.address(port), None if certificates is None else certificates.files(who))
            for port in SERVICES
            for who in ((CLIENT,) if certificates is None else (CLIENT, *SERVICES))
        }
        self.rpcs: tuple[Rpc, ...] = ()
        self.service_names: frozenset[str] = frozenset()
        self.calls_made = 0

    async def close(self) -> None:
        """Closes the channels."""
        for channel in self._channels.values():
            await channel.close()

    async def discover(self) -> None:
        """Asks each port what it serves."""
        found: list[Rpc] = []
        names: set[str] = set()
        for port in SERVICES:
            served, files = await _reflect(self._channels[port, CLIENT])
            names |= served
            found += _rpcs_of(port, served, files)
        self.rpcs, self.service_names = tuple(found), frozenset(names)

    def find(self, port: str, method: str) -> Rpc:
        """Returns the one rpc of this short name, such as `LedgerService/OpenCalls`."""
        (rpc,) = (rpc for rpc in self.rpcs if rpc.port == port and rpc.path.endswith(f".{method}"))
        return rpc

    async def call(self, rpc: Rpc, request: Message, metadata: Metadata, *, timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> Answer:
        """Calls it and returns the answer, refusals included."""
        self.calls_made += 1
        # `Any`: untyped by grpc's stubs, since the classes are made at run time.
        channel: Any = self._channels[rpc.port, next((value for key, value in metadata if key == LEAF), CLIENT)]
        # The request travels by its own name, so that one class pool cannot be mistaken for the other's.
        raw = request.SerializeToString()
        read = rpc.response_type.FromString
        pairs = tuple(pair for pair in metadata if pair[0] != LEAF)
        try:
            if rpc.streams:
                stream = channel.unary_stream(rpc.path, response_deserializer=read)(raw, metadata=pairs, timeout=timeout_seconds)
                messages = tuple([message async for message in stream])
            else:
                messages = (await channel.unary_unary(rpc.path, response_deserializer=read)(raw, metadata=pairs, timeout=timeout_seconds),)
        except grpc.aio.AioRpcError as error:
            told = refusal(error)
            return Answer(told.code, told.reason, told.message, told.metadata)
        return Answer(OK, messages=messages)


async def _reflect(channel: grpc.aio.Channel) -> tuple[set[str], list[descriptor_pb2.FileDescriptorProto]]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    listing = await _ask(stub, [reflection_pb2.ServerReflectionRequest(list_services="")])
    names = {service.name for service in listing[0].list_services_response.service}
    described = await _ask(stub, [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in sorted(names)])
    files: dict[str, descriptor_pb2.FileDescriptorProto] = {}
    for answer in described:
        for raw in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(raw)
            files[file.name] = file
    return names, list(files.values())


async def _ask(
    stub: reflection_pb2_grpc.ServerReflectionStub, requests: list[reflection_pb2.ServerReflectionRequest]
) -> list[reflection_pb2.ServerReflectionResponse]:
    return [answer async for answer in stub.ServerReflectionInfo(iter(requests), timeout=CALL_TIMEOUT_SECONDS)]


def _rpcs_of(port: str, served: set[str], files: list[descriptor_pb2.FileDescriptorProto]) -> list[Rpc]:
    pool = _pool_of(files)
    found: list[Rpc] = []
    for file in files:
        for service in file.service:
            name = f"{file.package}.{service.name}"
            if name in served and name.startswith("mesh."):
                found += [_rpc(port, name, method, pool) for method in service.method]
    return found


def _pool_of(files: list[descriptor_pb2.FileDescriptorProto]) -> descriptor_pool.DescriptorPool:
    pool, waiting, added = descriptor_pool.DescriptorPool(), {file.name: file for file in files}, set[str]()
    while waiting:
        ready = [file for file in waiting.values() if added.issuperset(file.dependency)]
        assert ready, f"reflection left out what these need: {sorted(waiting)}"
        for file in ready:
            pool.Add(waiting.pop(file.name))
            added.add(file.name)
    return pool


def _rpc(port: str, service: str, method: descriptor_pb2.MethodDescriptorProto, pool: descriptor_pool.DescriptorPool) -> Rpc:
    policy = method.options.Extensions[policy_pb2.policy]
    request, response = (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(name.lstrip("."))) for name in (method.input_type, method.output_type)
    )
    assert not method.client_streaming, f"{service}/{method.name} streams requests: teach the attackers to"
    return Rpc(
        port=port,
        path=f"/{service}/{method.name}",
        request_type=request,
        response_type=response,
        streams=method.server_streaming,
        tenant=policy.tenant,
        callers=frozenset(policy.callers),
        scopes=tuple(policy.scopes),
    )
