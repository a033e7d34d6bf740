"""Tenants that each know a fact nobody else may read, and where such facts and secrets must never turn up."""

import asyncio
import json
import secrets
import urllib.request
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from devstack.environment import TENANTS_OWN_KEYS
from devstack.mesh_client import Metadata, NewTrace, credentials
from devstack.stack import Stack
from devstack.state import SERVICES
from tests.isolation.surface import Answer, Surface
from tests.support.mesh import Mesh

LOGS = (*SERVICES, *(f"{name}-migrate" for name in SERVICES), "postgres", "redis", "qdrant", "provider")


@dataclass(frozen=True, slots=True)
class Knower:
    """A tenant and its three facts: one in a document, one in its prompt, one in its conversation."""

    tenant_id: str
    api_key: str
    document: str
    prompt: str
    conversation: str
    conversation_id: str

    @property
    def facts(self) -> frozenset[str]:
        """What only this tenant knows."""
        return frozenset((self.document, self.prompt, self.conversation))

    @property
    def metadata(self) -> Metadata:
        """What its calls carry."""
        return credentials(self.api_key)


async def knower(mesh: Mesh, surface: Surface) -> Knower:
    """Makes one. Everybody's texts differ in the fact alone, so that a mixed-up search would find the others'."""
    tenant = await mesh.tenant("professional")
    metadata, facts = credentials(tenant.api_key), [f"fact{secrets.token_hex(8)}" for _ in range(3)]

    async def must(port: str, method: str, **fields: Any) -> Any:
        rpc = surface.find(port, method)
        answer = await surface.call(rpc, rpc.request_type(**fields), metadata)
        assert answer.code == "OK", (method, answer)
        return answer.messages[0]

    document = {"document_key": "vault", "title": "The vault", "text": f"The code of the vault is {facts[0]}. Keep it safe."}
    await must("retrieval", "DocumentService/UpsertDocuments", documents=[document])
    await must("inference", "PromptService/PutPrompt", text=f"You guard the vault. Your own name is {facts[1]}.")
    begun = await must("inference", "ConversationService/CreateConversation", user="guard")
    conversation_id = begun.conversation.conversation_id
    await must(
        "inference",
        "InferenceService/Generate",
        messages=[{"role": 1, "text": f"My password for today is {facts[2]}."}],
        options={"max_output_tokens": 50, "conversation_id": conversation_id},
    )
    return Knower(tenant.tenant_id, tenant.api_key, facts[0], facts[1], facts[2], conversation_id)


async def ask(
    surface: Surface, who: Knower, *, streamed: bool, extra: str = "", trace: NewTrace | None = None, **options: object
) -> tuple[uuid.UUID, Answer]:
    """The one question everybody asks, on their own documents, prompt and conversation."""
    rpc = surface.find("inference", "InferenceService/StreamGenerate" if streamed else "InferenceService/Generate")
    chosen = {"max_output_tokens": 120, "conversation_id": who.conversation_id, "retrieval": {"mode": 3}} | options
    request = rpc.request_type(messages=[{"role": 1, "text": f"What is the code of the vault, and my password? {extra}"}], options=chosen)
    call_id = uuid.uuid4()
    return call_id, await surface.call(rpc, request, credentials(who.api_key, call_id=call_id, trace=trace), timeout_seconds=30)


def said(answer: Answer) -> str:
    """All that an answer says; a streamed one in one piece, since a fact may be cut in two between deltas."""
    deltas = "".join(event.delta.text for event in answer.messages if "delta" in event.DESCRIPTOR.fields_by_name)  # type: ignore[attr-defined] # a class of the reflected pool
    return deltas + answer.everything().decode(errors="replace")


async def received_by_provider(stack: Stack, count: int = 200) -> list[dict[str, Any]]:
    """The last requests that left the mesh for the model provider, as they arrived there."""
    request = urllib.request.Request(
        f"http://{stack.ports.address('provider')}/stub/requests?n={count}", headers={"x-api-key": stack.state.secrets.provider_api_key}
    )

    def read() -> Any:
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310 - as above
            return json.load(response)

    answer = await asyncio.to_thread(read)
    return list(answer["data"])


def foreign_facts(text: str, own: Knower, everybody: Iterable[Knower]) -> list[str]:
    """Which facts of others stand in a text."""
    return [fact for who in everybody if who is not own for fact in sorted(who.facts) if fact in text]


def secrets_of(stack: Stack, api_keys: Iterable[str]) -> dict[str, str]:
    """Everything that must never be written down, by what it is."""
    kept = stack.state.secrets
    found = {
        "postgres password": kept.postgres_password,
        "redis password": kept.redis_password,
        "qdrant key": kept.qdrant_api_key,
        "provider key": kept.provider_api_key,
        "signing key": kept.context_signing_key,
        "operator key": kept.operator_key,
        "receivers' key": kept.webhook_seal_keys.partition(":")[2],
        "master key": kept.master_keys.partition(":")[2],
        **{f"own key {number}": key for number, key in enumerate(TENANTS_OWN_KEYS)},
    }
    found |= {f"role password of {name}": value for name, value in kept.role_passwords.items()}
    found |= {f"bearer of {name}": value for name, value in kept.service_tokens.items()}
    # The secret alone, as well as the whole text: neither is of use without being the other.
    return found | {f"api key {key[:24]}…": key.rpartition("_")[2] for key in api_keys}


def written_down(stack: Stack, wanted: Mapping[str, str]) -> list[str]:
    """Names each of the wanted texts that stands in a log file of the mesh, and the file."""
    found: list[str] = []
    for name in LOGS:
        path = stack.state.log_path(name)
        if path.exists():
            text = path.read_text(errors="replace")
            found += [f"{name}: {what}" for what, value in wanted.items() if value in text]
    return found
