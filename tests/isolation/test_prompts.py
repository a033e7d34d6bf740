"""Eight tenants, one question, at the same time: what reaches the provider, the answers and the logs is each tenant's own."""

import asyncio
import itertools

import orjson
import pytest

from devstack.mesh_client import NewTrace
from tests.isolation.canaries import Knower, ask, foreign_facts, knower, received_by_provider, said, secrets_of, written_down
from tests.isolation.surface import Answer, Surface
from tests.isolation.target import Target
from tests.support.mesh import Mesh

TENANTS = 8
CALLS = 32
CALL_ID_HEADER = "x-tenantry-call-id"


@pytest.fixture(scope="module")
async def everybody(mesh: Mesh, surface: Surface) -> list[Knower]:
    """Eight tenants whose texts differ in their facts alone."""
    async with asyncio.TaskGroup() as group:
        making = [group.create_task(knower(mesh, surface)) for _ in range(TENANTS)]
    return [made.result() for made in making]


@pytest.fixture(scope="module")
async def answered(surface: Surface, everybody: list[Knower]) -> dict[str, tuple[Knower, Answer]]:
    """The same question by all tenants, four times each, interleaved and at once; by call id."""
    turns = list(itertools.islice(itertools.cycle(everybody), CALLS))
    async with asyncio.TaskGroup() as group:
        asking = [(who, group.create_task(ask(surface, who, streamed=n % 2 == 0))) for n, who in enumerate(turns)]
    return {str(asked.result()[0]): (who, asked.result()[1]) for who, asked in asking}


async def test_each_tenant_is_answered_with_its_own_facts(answered: dict[str, tuple[Knower, Answer]], everybody: list[Knower]) -> None:
    """Every one of the interleaved answers knows the tenant's own document and nothing that another tenant wrote."""
    assert len(answered) == CALLS
    for who, answer in answered.values():
        assert answer.code == "OK", answer
        assert foreign_facts(said(answer), who, everybody) == []
        assert who.document in said(answer)


async def test_what_leaves_for_the_provider_holds_one_tenants_words(
    mesh: Mesh, answered: dict[str, tuple[Knower, Answer]], everybody: list[Knower]
) -> None:
    """Each request body that reached the provider holds its tenant's document, prompt and conversation, and no other's."""
    seen = 0
    for received in await received_by_provider(mesh.stack):
        call = answered.get(received["headers"].get(CALL_ID_HEADER, ""))
        if call is not None:
            who, body = call[0], orjson.dumps(received["body"]).decode()
            assert foreign_facts(body, who, everybody) == []
            assert [fact for fact in sorted(who.facts) if fact not in body] == []
            assert not any(other.tenant_id in body or other.api_key in body for other in everybody)
            seen += 1
    assert seen == CALLS


async def test_no_request_to_the_provider_mixes_tenants(mesh: Mesh, everybody: list[Knower]) -> None:
    """Of all requests the provider has, whoever caused them, none holds facts of two tenants."""
    for received in await received_by_provider(mesh.stack):
        sent = orjson.dumps([received["body"], received["headers"]]).decode()
        assert len([who for who in everybody if any(fact in sent for fact in who.facts)]) <= 1


async def test_errors_tell_nothing_of_prompts_documents_or_keys(mesh: Mesh, surface: Surface, everybody: list[Knower]) -> None:
    """A refused call's text and details hold no fact, its own included, and no key: not from the provider's words either."""
    who, other = everybody[0], everybody[1]
    failing: list[dict[str, object]] = [
        {"extra": f"{who.conversation} [[stub: error=400]]"},
        {"extra": f"{who.conversation} [[stub: error=401]]"},
        {"extra": f"{who.conversation} [[stub: error=529]]"},
        {"extra": f"{who.conversation} [[stub: overload_after=0]]"},
        {"extra": f"{who.conversation} [[stub: cut_after=0]]"},
        {"extra": who.conversation, "model": "claude-imaginary"},
        {"extra": who.conversation, "conversation_id": other.conversation_id},
        {"extra": who.conversation, "max_output_tokens": 1_000_000},
        {"extra": who.conversation * 20_000},
        {"extra": who.conversation, "stop_sequences": [""]},
    ]
    secrets = secrets_of(mesh.stack, [each.api_key for each in everybody])
    for case in failing:
        streamed = "cut" in str(case) or "overload" in str(case)
        _, answer = await ask(surface, who, streamed=streamed, **case)  # type: ignore[arg-type] # options of several types
        assert answer.code != "OK", (str(case)[:100], answer)
        assert answer.reason not in ("", "INTERNAL"), (str(case)[:100], answer)
        told = said(answer)
        assert [fact for each in everybody for fact in sorted(each.facts) if fact in told] == []
        assert [what for what, value in secrets.items() if value in told] == []


async def test_no_span_tells_what_was_said(mesh: Mesh, surface: Surface, everybody: list[Knower]) -> None:
    """The trace of a call names no fact, prompt, question or key in any attribute of any service's span."""
    who, trace = everybody[0], NewTrace.begin()
    _, answer = await ask(surface, who, streamed=False, trace=trace)
    assert answer.code == "OK", answer
    spans = await mesh.stack.traces.wait_for(trace.trace_id, frozenset({"inference", "retrieval"}), timeout_seconds=10)
    assert {"inference", "retrieval"} <= {span.service for span in spans}
    told = "\n".join(f"{span.name} {sorted(span.attributes.items())}" for span in spans)
    wanted = secrets_of(mesh.stack, [who.api_key]) | {"the question": "code of the vault", "the prompt": "You guard the vault"}
    wanted |= {fact: fact for fact in who.facts}
    assert [what for what, value in wanted.items() if value in told] == []


async def test_nothing_confidential_is_written_down(
    mesh: Mesh, answered: dict[str, tuple[Knower, Answer]], everybody: list[Knower], victim: Target, attacker: Target
) -> None:
    """No log file of any service or store holds a prompt, a document, an answer, an API key or a secret of the mesh."""
    assert answered
    wanted = secrets_of(mesh.stack, [*(who.api_key for who in everybody), victim.tenant.api_key, attacker.tenant.api_key])
    wanted |= {f"{kind} of {who.tenant_id}": getattr(who, kind) for who in everybody for kind in ("document", "prompt", "conversation")}
    wanted |= {"the question": "What is the code of the vault", "the first prompt": "You guard the vault", "a canary": victim.canary}
    assert written_down(mesh.stack, wanted) == []
