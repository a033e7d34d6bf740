"""A provider in its own process, official clients on both transports, and a view of its ledger."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import aiohttp
import orjson
import pytest
from anthropic import AsyncAnthropic, DefaultAioHttpClient
from anthropic.types import MessageParam

API_KEY = "stub-key-one"
OTHER_API_KEY = "stub-key-two"
MODEL = "claude-haiku-4-5"


@dataclass(frozen=True, slots=True)
class Provider:
    """A running provider."""

    process: subprocess.Popen[str]
    port: int
    ledger: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def lines(self) -> list[dict[str, object]]:
        """The ledger file's lines as they are on disk now."""
        return [orjson.loads(line) for line in self.ledger.read_bytes().splitlines()]

    def outcomes(self, call_id: str) -> list[object]:
        """The outcomes on disk of one call, in order."""
        return [line["outcome"] for line in self.lines() if line["call_id"] == call_id]

    async def entry(self, call_id: str, outcome: str) -> dict[str, object]:
        """The call's folded entry, once it has this outcome."""
        async with asyncio.timeout(5):
            while True:
                for found in await self.ask("GET", "/stub/ledger"):
                    if found["call_id"] == call_id and found["outcome"] == outcome:
                        return found

    async def ask(self, method: str, path: str, *, key: str = API_KEY) -> list[dict[str, object]]:
        """The data of one of the provider's own routes."""
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.url + path, headers={"x-api-key": key}, raise_for_status=True) as response,
        ):
            data: list[dict[str, object]] = (await response.json())["data"]
            return data


@contextmanager
def running(ledger: Path, *arguments: str) -> Iterator[Provider]:
    """Starts a provider on a free port and stops it."""
    command = [sys.executable, "-m", "devstack.provider_stub", "--port", "0", "--ledger", str(ledger), *arguments]
    environment = {**os.environ, "PROVIDER_STUB_API_KEY": f"{API_KEY},{OTHER_API_KEY}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield Provider(process, int(process.stdout.readline().removeprefix("listening 127.0.0.1:")), ledger)
        finally:
            process.terminate()
            process.wait(10)


@pytest.fixture(scope="session")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provider]:
    """One provider that honours directives, for every test that does not stop it."""
    with running(tmp_path_factory.mktemp("provider") / "ledger.jsonl", "--allow-directives") as started:
        yield started


@pytest.fixture(scope="session", params=["default", "aiohttp"])
async def client(request: pytest.FixtureRequest, provider: Provider) -> AsyncIterator[AsyncAnthropic]:
    """The official client, on each of its transports."""
    http_client = DefaultAioHttpClient() if request.param == "aiohttp" else None
    async with AsyncAnthropic(api_key=API_KEY, base_url=provider.url, http_client=http_client, max_retries=0, timeout=10) as connected:
        yield connected


@pytest.fixture
def call_id() -> str:
    """An id no other call has."""
    return str(uuid4())


@pytest.fixture(scope="session")
def asking() -> Callable[[str], list[MessageParam]]:
    """Makes the messages of a conversation that is one question."""
    return lambda question: [{"role": "user", "content": question}]
