"""Starts the server as its own process, and makes the clients and tokens the tests speak to it with."""

import base64
import hashlib
import hmac
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import grpc
from qdrant_client import AsyncQdrantClient, models

API_KEY = "the-key-of-these-tests"

Stub = TypeVar("Stub")


@dataclass(frozen=True, slots=True)
class Front:
    """A running server."""

    process: subprocess.Popen[str]
    port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        """Ends the process as a power switch would."""
        self.process.kill()
        self.process.wait(10)

    @asynccontextmanager
    async def client(self, credential: str = API_KEY) -> AsyncIterator[AsyncQdrantClient]:
        """Opens the ordinary client; the key travels as a header, since giving it as api_key warns on a plain connection."""
        client = AsyncQdrantClient(
            url=f"http://{self.address}",
            grpc_port=self.port,
            prefer_grpc=True,
            headers={"api-key": credential},
            check_compatibility=False,
        )
        try:
            yield client
        finally:
            await client.close()

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        """Opens a bare channel, for the generated stubs."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            yield channel


@contextmanager
def running_front(data_dir: Path) -> Iterator[Front]:
    """Runs a server on the directory, and ends it if the test has not."""
    command = [sys.executable, "-m", "devstack.qdrant_front", "--port", "0", "--data-dir", str(data_dir)]
    environment = {**os.environ, "QDRANT_API_KEY": API_KEY}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            word, _, address = process.stdout.readline().strip().partition(" ")
            assert word == "listening"
            yield Front(process, int(address.removeprefix("127.0.0.1:")))
        finally:
            process.terminate()
            process.wait(10)


def token(claims: dict[str, object], *, secret: str = API_KEY, algorithm: str = "HS256") -> str:
    """Signs claims as a JWT; with algorithm none, leaves the signature out."""
    signed = f"{_part({'alg': algorithm, 'typ': 'JWT'})}.{_part(claims)}"
    if algorithm == "none":
        return f"{signed}."
    return f"{signed}.{_base64url(hmac.digest(secret.encode(), signed.encode(), hashlib.sha256))}"


def _part(value: dict[str, object]) -> str:
    return _base64url(json.dumps(value).encode())


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def stub(kind: Callable[[grpc.aio.Channel], Stub], channel: grpc.aio.Channel) -> Stub:
    """Builds a generated stub, whose class carries no types."""
    return kind(channel)


def fresh_name() -> str:
    """Returns a name no other test uses."""
    return f"c_{uuid4().hex}"


async def with_three_points(client: AsyncQdrantClient) -> str:
    """Creates a collection of three documents, dense and sparse, and returns its name."""
    name = fresh_name()
    await client.create_collection(
        name,
        vectors_config={"dense": models.VectorParams(size=3, distance=models.Distance.COSINE)},
        sparse_vectors_config={"words": models.SparseVectorParams(modifier=models.Modifier.IDF)},
    )
    documents = [
        (1, [1.0, 0.0, 0.0], {7: 1.0}, {"color": "red", "size": 1, "at": "2024-01-01T00:00:00Z", "tags": ["a", "b"]}),
        (2, [0.9, 0.1, 0.0], {8: 1.0}, {"color": "green", "size": 2, "at": "2025-01-01T00:00:00Z", "tags": []}),
        (3, [0.0, 0.0, 1.0], {8: 2.0, 9: 1.0}, {"color": "blue", "size": 3, "whole": True, "note": None, "parts": [{"n": 1, "ok": True}]}),
    ]
    await client.upsert(
        name,
        [
            models.PointStruct(
                id=number,
                vector={"dense": dense, "words": models.SparseVector(indices=list(words), values=list(words.values()))},
                payload=payload,
            )
            for number, dense, words, payload in documents
        ],
        wait=True,
    )
    return name
