"""The provider's ledger: what it says equals what clients were told, and it is on disk before they are."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from anthropic import AsyncAnthropic
from anthropic.types import MessageParam, MetadataParam, TextBlockParam

from tests.devstack.provider_stub.conftest import API_KEY, MODEL, OTHER_API_KEY, Provider, running

Asking = Callable[[str], list[MessageParam]]


async def test_ledger_equals_the_usage_received(provider: Provider, client: AsyncAnthropic, asking: Asking, call_id: str) -> None:
    """Plain or streamed, with cached tokens or without, each call's line is its usage."""
    system: list[TextBlockParam] = [{"type": "text", "text": call_id * 9, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    received = []
    for number in range(3):
        named = {"x-tenantry-call-id": f"{call_id}/{number}"}
        if number == 1:
            async with client.messages.stream(
                model=MODEL, max_tokens=50, system=system, messages=asking("Why?"), extra_headers=named
            ) as stream:
                received.append((await stream.get_final_message()).usage)
        else:
            message = await client.messages.create(model=MODEL, max_tokens=50, system=system, messages=asking("Why?"), extra_headers=named)
            received.append(message.usage)
    for number, usage in enumerate(received):
        line = await provider.entry(f"{call_id}/{number}", "complete")
        assert (line["input_tokens"], line["output_tokens"]) == (usage.input_tokens, usage.output_tokens)
        assert (line["cache_read"], line["cache_creation_5m"]) == (usage.cache_read_input_tokens, 0)
        assert line["cache_creation_1h"] == usage.cache_creation_input_tokens
        assert line["model"] == MODEL
    assert [usage.cache_read_input_tokens for usage in received] == [0, 81, 81]


async def test_lines_are_on_disk_before_the_client_hears(provider: Provider, client: AsyncAnthropic, asking: Asking, call_id: str) -> None:
    """At the first event the file holds the started line, at the final one the ending."""
    messages = asking("[[stub: output_tokens=40 token_ms=2]] Hi?")
    named = {"x-tenantry-call-id": call_id}
    async for event in await client.messages.create(model=MODEL, max_tokens=50, messages=messages, stream=True, extra_headers=named):
        if event.type == "message_start":
            assert provider.outcomes(call_id) == ["started"]
        if event.type == "message_delta":
            assert provider.outcomes(call_id) == ["started", "complete"]
    await client.messages.create(model=MODEL, max_tokens=50, messages=asking("Hi?"), extra_headers={"x-tenantry-call-id": f"{call_id}/2"})
    assert provider.outcomes(f"{call_id}/2") == ["started", "complete"]


async def test_call_id_is_taken_from_the_header_then_the_user_id(
    provider: Provider, client: AsyncAnthropic, asking: Asking, call_id: str
) -> None:
    """Either header names the call, metadata.user_id does without one, and a call without any has null."""
    hello = asking("Hi?")
    metadata: MetadataParam = {"user_id": f"{call_id}/user"}
    for name in ("x-tenantry-call-id", "x-client-request-id"):
        await client.messages.create(
            model=MODEL, max_tokens=9, messages=hello, extra_headers={name: f"{call_id}/{name}"}, metadata=metadata
        )
    await client.messages.create(model=MODEL, max_tokens=9, messages=hello, metadata=metadata)
    unnamed = await client.messages.create(model=MODEL, max_tokens=9, messages=hello)
    ids = [line["call_id"] for line in provider.lines() if line["outcome"] == "complete"]
    assert ids[-4:] == [f"{call_id}/x-tenantry-call-id", f"{call_id}/x-client-request-id", f"{call_id}/user", None]
    assert unnamed._request_id == provider.lines()[-1]["request_id"]


async def test_each_key_is_told_apart_by_its_hash(provider: Provider, asking: Asking, call_id: str) -> None:
    """The ledger tells keys apart and holds none."""
    for key in (API_KEY, OTHER_API_KEY):
        async with AsyncAnthropic(api_key=key, base_url=provider.url, max_retries=0) as client:
            await client.messages.create(model=MODEL, max_tokens=9, messages=asking("Hi?"), extra_headers={"x-tenantry-call-id": call_id})
    hashes = {line["api_key_hash"] for line in provider.lines() if line["call_id"] == call_id}
    assert len(hashes) == 2
    assert API_KEY not in provider.ledger.read_text()


async def test_concurrent_calls_are_each_billed_once(provider: Provider, client: AsyncAnthropic, asking: Asking, call_id: str) -> None:
    """Fifty calls at once leave fifty completed entries."""

    async def call(number: int) -> None:
        named = {"x-tenantry-call-id": f"{call_id}/{number}"}
        await client.messages.create(model=MODEL, max_tokens=50, messages=asking("Hi?"), extra_headers=named)

    async with asyncio.TaskGroup() as calls:
        for number in range(50):
            calls.create_task(call(number))
    billed = [entry for entry in await provider.ask("GET", "/stub/ledger") if str(entry["call_id"]).startswith(call_id)]
    assert len(billed) == 50
    assert {entry["outcome"] for entry in billed} == {"complete"}


async def test_killed_provider_still_knows_what_it_billed(tmp_path: Path, asking: Asking) -> None:
    """A kill -9 in the middle of a stream loses no billed call: the started line is there after the restart."""
    ledger = tmp_path / "ledger.jsonl"
    with running(ledger, "--allow-directives") as first:
        async with AsyncAnthropic(api_key=API_KEY, base_url=first.url, max_retries=0) as client:
            messages = asking("[[stub: stall_after=2]] Hi?")
            stream = await client.messages.create(
                model=MODEL, max_tokens=9, messages=messages, stream=True, extra_headers={"x-tenantry-call-id": "killed"}
            )
            await anext(stream)
            first.process.send_signal(signal.SIGKILL)
            first.process.wait(5)
            await stream.close()
    with running(ledger) as second:
        (entry,) = await second.ask("GET", "/stub/ledger")
    assert (entry["call_id"], entry["outcome"]) == ("killed", "started")


async def test_sigterm_ends_the_open_streams_and_records_them(tmp_path: Path, asking: Asking) -> None:
    """A stop is clean: exit code 0, and the stream it broke off is in the ledger as cancelled."""
    with running(tmp_path / "ledger.jsonl", "--allow-directives") as provider:
        async with AsyncAnthropic(api_key=API_KEY, base_url=provider.url, max_retries=0) as client:
            messages = asking("[[stub: stall_after=2]] Hi?")
            stream = await client.messages.create(model=MODEL, max_tokens=9, messages=messages, stream=True)
            await anext(stream)
            provider.process.send_signal(signal.SIGTERM)
            code = await asyncio.to_thread(provider.process.wait, 10)
            await stream.close()
    assert code == 0
    assert [line["outcome"] for line in provider.lines()] == ["started", "cancelled"]


async def test_a_client_that_leaves_is_billed_until_it_is_noticed(
    provider: Provider, client: AsyncAnthropic, asking: Asking, call_id: str
) -> None:
    """Ordered to notice late, the provider bills what it generates meanwhile at its pace, never more than the answer has."""
    for number, (order, least, most) in enumerate((("notice_ms=400", 80, 130), ("notice_ms=900000", 300, 300), ("notice_ms=0", 0, 50))):
        messages = asking(f"[[stub: output_tokens=300 token_ms=5 {order}]] Hi?")
        named = {"x-tenantry-call-id": f"{call_id}/{number}"}
        stream = await client.messages.create(model=MODEL, max_tokens=300, messages=messages, stream=True, extra_headers=named)
        await anext(stream)
        await stream.close()
        line = await provider.entry(f"{call_id}/{number}", "cancelled")
        assert least <= int(str(line["output_tokens"])) <= most


async def test_directives_are_mere_text_unless_allowed(tmp_path: Path, asking: Asking) -> None:
    """Without the flag a message cannot order a fault; a header, which only a test can send, still can."""
    with running(tmp_path / "ledger.jsonl") as provider:
        async with AsyncAnthropic(api_key=API_KEY, base_url=provider.url, max_retries=0) as client:
            message = await client.messages.create(model=MODEL, max_tokens=99, messages=asking("[[stub: error=529]] Hi?"))
            limited = await client.messages.create(
                model=MODEL, max_tokens=99, messages=asking("Hi?"), extra_headers={"x-stub-output-tokens": "7"}
            )
    assert message.content[0].type == "text"
    assert "[[stub: error=529]]" in message.content[0].text
    assert limited.usage.output_tokens == 7


def test_without_a_key_it_does_not_start(tmp_path: Path) -> None:
    """A provider that would accept anyone, the empty key included, refuses to run."""
    environment = {**os.environ, "PROVIDER_STUB_API_KEY": ","}
    command = [sys.executable, "-m", "devstack.provider_stub", "--port", "0", "--ledger", str(tmp_path / "ledger.jsonl")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "PROVIDER_STUB_API_KEY holds no API key\n")
