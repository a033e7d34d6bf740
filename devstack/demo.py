"""`make demo`: the story of two tenants in five checks. Every line that is told is also verified; one that is untrue fails the run."""

import asyncio
import contextlib
import datetime
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from devstack.addresses import Ports
from devstack.asking import CALL_TIMEOUT_SECONDS, Asked, ask, usd
from devstack.handbook import COMPANIES, HARBOR, LUMEN, Company, questions
from devstack.mesh_client import MeshClient, Refusal, credentials, refusal
from devstack.ports import answers
from devstack.provisioning import provision_demo_tenants
from devstack.run import STATE_FOLDER
from devstack.stack import running_stack
from devstack.state import DemoTenant, StackState
from mesh.inference.v1 import inference_service_pb2
from mesh.metering.v1 import usage_service_pb2

LONGEST_WAIT_SECONDS = 65.0
FLOOD_CALLS = 40


@dataclass(frozen=True, slots=True)
class Check:
    """One claim, whether it held, and what was seen."""

    name: str
    passed: bool
    claim: str
    seen: str


async def demo(ports: Ports, *, as_json: bool) -> int:
    """Tells the story against the running stack, or against one of its own; returns 0 when every claim held, else 1."""
    async with _tenants(ports) as tenants, MeshClient.connect(ports) as client:
        checks = await Story(client, tenants).tell()
    if as_json:
        print(json.dumps({"passed": all(check.passed for check in checks), "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        for check in checks:
            print(f"{'PASS' if check.passed else 'FAIL'}  {check.claim}\n      {check.seen}")
    return 0 if all(check.passed for check in checks) else 1


@contextlib.asynccontextmanager
async def _tenants(ports: Ports) -> AsyncIterator[dict[str, DemoTenant]]:
    if answers(ports.inference):
        yield StackState.open(STATE_FOLDER).tenants
        return
    async with running_stack(STATE_FOLDER, ports) as stack:
        async with MeshClient.connect(ports) as client:
            await provision_demo_tenants(stack, client, lambda _: None)
        yield stack.state.tenants


class Story:
    """The five checks, in order, and the calls they made."""

    def __init__(self, client: MeshClient, tenants: dict[str, DemoTenant]) -> None:
        self._client = client
        self._tenants = tenants
        self._begin = Timestamp()
        self._begin.FromDatetime(datetime.datetime.now(datetime.UTC))
        self._costs: dict[str, list[int]] = {company.slug: [] for company in COMPANIES}

    async def tell(self) -> list[Check]:
        """Runs the checks."""
        return [
            await self._own_documents(),
            await self._nothing_of_the_other(),
            await self._refusal_explains_itself(),
            await self._forged_tenant_refused(),
            await self._bill_is_exact(),
        ]

    async def _ask(self, company: Company, question: str) -> Asked:
        try:
            asked = await ask(self._client, self._tenants[company.slug], question)
        except grpc.aio.AioRpcError as error:
            told = refusal(error)
            if told.retry_after_seconds is None or told.retry_after_seconds > LONGEST_WAIT_SECONDS:
                raise
            # A demo run shortly before has used up the minute: the refusal says when to come back.
            await asyncio.sleep(told.retry_after_seconds + 0.1)
            asked = await ask(self._client, self._tenants[company.slug], question)
        self._costs[company.slug].append(asked.cost_nano_usd)
        return asked

    async def _own_documents(self) -> Check:
        item = questions(LUMEN)[0]
        asked = await self._ask(LUMEN, item.question)
        sources = {source.document_key for source in asked.summary.sources}
        passed = item.source in sources and any(phrase.lower() in asked.text.lower() for phrase in item.expected_phrases)
        return Check("own_documents", passed, f"{LUMEN.display_name} is answered from its own documents", asked.text.strip())

    async def _nothing_of_the_other(self) -> Check:
        item = questions(LUMEN)[0]
        asked = await self._ask(HARBOR, item.question)
        sources = {source.document_key for source in asked.summary.sources}
        leaked = [phrase for phrase in item.expected_phrases if phrase.lower() in asked.text.lower()]
        passed = not leaked and bool(asked.text.strip())
        seen = f"{asked.text.strip()} (from {', '.join(sorted(sources))})"
        return Check(
            "nothing_of_the_other", passed, f"{HARBOR.display_name} asks the same and gets none of {LUMEN.display_name}'s text", seen
        )

    async def _refusal_explains_itself(self) -> Check:
        told = await self._flood()
        wanted = {"rule", "limit", "used", "remaining", "reset_time"}
        passed = (
            told is not None
            and (told.code, told.reason) == ("RESOURCE_EXHAUSTED", "PLAN_LIMIT")
            and told.metadata.get("rule") == "requests_per_minute"
            and wanted <= told.metadata.keys()
            and told.retry_after_seconds is not None
        )
        seen = "never refused" if told is None else f"{told.reason} {told.metadata}: {told.message}"
        return Check(
            "refusal_explains_itself", passed, "past its requests per minute it is told the rule, what is used and when it resets", seen
        )

    async def _flood(self) -> Refusal | None:
        tenant = self._tenants[LUMEN.slug]
        request = inference_service_pb2.GenerateRequest(
            messages=[inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text="Hello.")],
            options=inference_service_pb2.GenerateOptions(feature="flood", max_output_tokens=1),
        )
        for _ in range(FLOOD_CALLS):
            try:
                answer = await self._client.inference.Generate(request, metadata=credentials(tenant.api_key), timeout=CALL_TIMEOUT_SECONDS)
            except grpc.aio.AioRpcError as error:
                return refusal(error)
            self._costs[LUMEN.slug].append(answer.summary.cost.nano_usd)
        return None

    async def _forged_tenant_refused(self) -> Check:
        metadata = credentials(self._tenants[LUMEN.slug].api_key, tenant_id=self._tenants[HARBOR.slug].tenant_id)
        request = usage_service_pb2.GetUsageReportRequest()
        try:
            await self._client.usage.GetUsageReport(request, metadata=metadata, timeout=CALL_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            told = refusal(error)
            passed = (told.code, told.reason) == ("PERMISSION_DENIED", "TENANT_MISMATCH")
            return Check("forged_tenant_refused", passed, "a forged x-tenant-id is refused", f"{told.code} {told.reason}: {told.message}")
        return Check("forged_tenant_refused", False, "a forged x-tenant-id is refused", "it was answered")

    async def _bill_is_exact(self) -> Check:
        seen, passed = [], True
        for company in COMPANIES:
            costs = self._costs[company.slug]
            report = await self._client.usage.GetUsageReport(
                usage_service_pb2.GetUsageReportRequest(start_time=self._begin),
                metadata=credentials(self._tenants[company.slug].api_key),
                timeout=CALL_TIMEOUT_SECONDS,
            )
            passed = passed and (report.settled_count, report.total_cost.nano_usd) == (len(costs), sum(costs)) and sum(costs) > 0
            seen.append(
                f"{company.display_name}: {report.settled_count} calls of {len(costs)}, "
                f"{usd(report.total_cost.nano_usd)} of {usd(sum(costs))}"
            )
        return Check("bill_is_exact", passed, "the usage report shows exactly these calls, to the nano-dollar", "; ".join(seen))
