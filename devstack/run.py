"""`make run`: starts everything, shows one call from question to bill to trace, and stays up until Ctrl-C."""

import sys
import time
from pathlib import Path

import grpc

from devstack.addresses import Ports
from devstack.asking import Asked, ask, patiently, usd
from devstack.certificates import LeafFiles
from devstack.environment import Wiring
from devstack.handbook import LUMEN, questions
from devstack.managed_process import ProcessFailedError
from devstack.mesh_client import MeshClient, refusal
from devstack.provisioning import provision_demo_tenants
from devstack.shutdown import Shutdown
from devstack.stack import Stack, certificates_in, running_stack
from devstack.state import SERVICES, DemoTenant
from devstack.trace_tree import render

STATE_FOLDER = Path(".tenantry")
TRACE_WAIT_SECONDS = 8.0


class StepPrinter:
    """Prints each step with the seconds since the start."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def __call__(self, step: str) -> None:
        """Prints one step."""
        print(f"[{time.monotonic() - self._begin:5.1f} s] {step}", flush=True)


async def run(ports: Ports, *, tls: bool = False) -> None:
    """Runs the stack until a signal.

    Raises: ProcessFailedError with one sentence when a part cannot start or dies.
    """
    step = StepPrinter()
    shutdown = Shutdown(step)
    if not await shutdown.guard(_serve(ports, step, shutdown, tls=tls)):
        step("everything is stopped; `make run` goes on where this ended")


async def _serve(ports: Ports, step: StepPrinter, shutdown: Shutdown, *, tls: bool) -> None:
    wiring = Wiring(certificates_in(STATE_FOLDER) if tls else None, events=True, reconciles=True)
    async with running_stack(STATE_FOLDER, ports, progress=step, shutdown=shutdown, wiring=wiring) as stack:
        provider = "the provider stub (set ANTHROPIC_API_KEY to call the real API)" if stack.provider.is_stub else "the real Anthropic API"
        step(f"model provider: {provider}")
        step("embeddings: the built-in hashing embedder, for development")
        async with MeshClient.connect(ports, stack.client_leaf) as client:
            await provision_demo_tenants(stack, client, step)
            await _show_one_call(stack, client, step)
        print("\nThe mesh is up. Ctrl-C stops everything.", flush=True)
        raise ProcessFailedError(await stack.wait_for_death())


async def _show_one_call(stack: Stack, client: MeshClient, step: StepPrinter) -> None:
    tenant = stack.state.tenants[LUMEN.slug]
    question = questions(LUMEN)[0].question
    step(f"one call as {LUMEN.display_name}")
    try:
        asked = await patiently(lambda: _ask_aloud(client, tenant, question), step)
    except grpc.aio.AioRpcError as error:
        told = refusal(error)
        print(f"\n  refused: {told.code} {told.reason}: {told.message}")
    else:
        print("\n")
        _print_summary(asked)
        spans = await stack.traces.wait_for(asked.trace.trace_id, frozenset(SERVICES), timeout_seconds=TRACE_WAIT_SECONDS)
        print("\n  trace " + asked.trace.trace_id)
        for line in render(spans):
            print("    " + line)
    print("\n  try it yourself (`make tools` puts grpcurl into .tools where there is Go; docs/operating.md goes on from here):")
    for line in grpcurl_lines(stack.ports, tenant, question, stack.client_leaf):
        print("    " + line)


async def _ask_aloud(client: MeshClient, tenant: DemoTenant, question: str) -> Asked:
    print(f"\n  Q: {question}\n  A: ", end="", flush=True)
    return await ask(client, tenant, question, on_text=_write)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_summary(asked: Asked) -> None:
    summary = asked.summary
    documents = sorted({source.document_key for source in summary.sources})
    print(f"  documents  {', '.join(documents) or 'none'}")
    print(f"  tokens     {summary.usage.input_tokens} in, {summary.usage.output_tokens} out ({summary.model})")
    print(f"  cost       {usd(asked.cost_nano_usd)}  ledger entry {summary.ledger_entry_id}")
    for limit in summary.remaining:
        amount = (
            f"{usd(limit.remaining)} of {usd(limit.limit)}" if limit.rule.startswith("cost_") else f"{limit.remaining} of {limit.limit}"
        )
        print(f"  remaining  {limit.rule}: {amount}")
    print(f"  call_id    {summary.call_id}")


def grpcurl_lines(ports: Ports, tenant: DemoTenant, question: str, leaf: LeafFiles | None = None) -> list[str]:
    """Returns three commands ready to paste: what is there, a streamed call, the bill."""
    transport = "-plaintext" if leaf is None else f"-cacert {leaf.authorities} -cert {leaf.certificate} -key {leaf.key}"
    authorization = f"-H 'authorization: Bearer {tenant.api_key}'"
    body = f'{{"messages":[{{"role":"ROLE_USER","text":"{question}"}}],"options":{{"retrieval":{{"mode":"RETRIEVAL_MODE_REQUIRED"}}}}}}'
    escaped = body.replace("'", "'\\''")
    return [
        f"grpcurl {transport} localhost:{ports.inference} list",
        f"grpcurl {transport} {authorization} -d '{escaped}' localhost:{ports.inference} mesh.inference.v1.InferenceService/StreamGenerate",
        f"grpcurl {transport} {authorization} localhost:{ports.metering} mesh.metering.v1.UsageService/GetUsageReport",
    ]
