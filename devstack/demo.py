"""`make demo`: the story of two tenants in five checks. Every line that is told is also verified; one that is untrue fails the run."""

import contextlib
import datetime
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from devstack.addresses import Ports
from devstack.asking import CALL_TIMEOUT_SECONDS, Asked, ask, patiently, usd
from devstack.certificates import CLIENT, LeafFiles
from devstack.environment import Wiring
from devstack.handbook import COMPANIES, HARBOR, LUMEN, Company, questions
from devstack.managed_process import ProcessFailedError
from devstack.mesh_client import MeshClient, Refusal, credentials, refusal
from devstack.ports import answers
from devstack.provisioning import provision_demo_tenants
from devstack.run import STATE_FOLDER
from devstack.shutdown import Shutdown
from devstack.stack import certificates_in, is_serving, running_stack
from devstack.state import DemoTenant, StackState
from mesh.inference.v1 import inference_service_pb2
from mesh.metering.v1 import usage_service_pb2

FLOOD_CALLS = 40
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Check:
    """One claim, whether it held, and what was seen."""

    name: str
    passed: bool
    claim: str
    seen: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where the mesh is and how it is spoken to."""

    ports: Ports
    wiring: Wiring

    def client_leaf(self) -> LeafFiles | None:
        """What the story's client shows. Raises: ProcessFailedError when there are no certificates to show."""
        if self.wiring.certificates is None:
            return None
        leaf = self.wiring.certificates.files(CLIENT)
        if not leaf.certificate.exists():
            raise ProcessFailedError("there are no certificates here: run `make certs`, or `make run TLS=1`")
        return leaf


async def demo(ports: Ports, *, as_json: bool, tls: bool = False) -> int:
    """Tells the story against the running stack, or against one of its own.

    Returns 0 when every claim held, 1 when one did not, 130 when a signal came first. Raises: ProcessFailedError with one sentence.
    """
    shutdown = Shutdown(_note)
    checks: list[Check] = []
    place = Place(ports, Wiring(certificates_in(STATE_FOLDER) if tls else None))
    if not await shutdown.guard(_tell(place, checks, shutdown, print_each=not as_json)):
        return INTERRUPTED
    if as_json:
        print(json.dumps({"passed": all(check.passed for check in checks), "checks": [asdict(check) for check in checks]}, indent=1))
    return 0 if all(check.passed for check in checks) else 1


async def _tell(place: Place, checks: list[Check], shutdown: Shutdown, *, print_each: bool) -> None:
    async with _tenants(place, shutdown) as tenants, MeshClient.connect(place.ports, place.client_leaf()) as client:
        async for check in Story(client, tenants).tell():
            checks.append(check)
            if print_each:
                print(f"{'PASS' if check.passed else 'FAIL'}  {check.claim}\n      {check.seen}", flush=True)


def _note(text: str) -> None:
    # Beside the story, not in it: standard output is the story alone, or one JSON object.
    print(text, file=sys.stderr, flush=True)


@contextlib.asynccontextmanager
async def _tenants(place: Place, shutdown: Shutdown) -> AsyncIterator[dict[str, DemoTenant]]:
    ports = place.ports
    if not answers(ports.inference):
        async with running_stack(STATE_FOLDER, ports, progress=_note, shutdown=shutdown, wiring=place.wiring) as stack:
            async with MeshClient.connect(ports, stack.client_leaf) as client:
                await provision_demo_tenants(stack, client, _note)
            yield stack.state.tenants
        return
    if not await is_serving(ports, "inference", place.client_leaf()):
        spoken = "TLS" if place.wiring.certificates else "plaintext"
        raise ProcessFailedError(
            f"{ports.address('inference')} does not serve {spoken}: the mesh is still starting (wait), "
            "it was started the other way (TLS=1 goes with `make run TLS=1`), or it is something else"
        )
    tenants = StackState.read(STATE_FOLDER).tenants
    if not {company.slug for company in COMPANIES} <= tenants.keys():
        raise ProcessFailedError("the demo tenants are not there yet: wait until `make run` says that the mesh is up")
    yield tenants


class Story:
    """The five checks, in order, and the calls they made."""

    def __init__(self, client: MeshClient, tenants: dict[str, DemoTenant]) -> None:
        self._client = client
        self._tenants = tenants
        self._begin = Timestamp()
        self._begin.FromDatetime(datetime.datetime.now(datetime.UTC))
        self._costs: dict[str, list[int]] = {company.slug: [] for company in COMPANIES}

    async def tell(self) -> AsyncIterator[Check]:
        """Runs the checks, one after the other."""
        yield await self._own_documents()
        yield await self._nothing_of_the_other()
        yield await self._refusal_explains_itself()
        yield await self._forged_tenant_refused()
        yield await self._bill_is_exact()

    async def _ask(self, company: Company, question: str) -> Asked:
        tenant = self._tenants[company.slug]
        asked = await patiently(lambda: ask(self._client, tenant, question), _note)
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
