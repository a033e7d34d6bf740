"""Names chosen to hurt: whatever text a tenant gives is kept to the letter or refused with a reason, and does nothing else."""

import asyncio
import secrets
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from devstack.environment import BASE_DOMAIN
from services.kernel.ids import TenantId
from services.retrieval.adapters.qdrant import alias_name
from tests.isolation.credentials_forged import Inside
from tests.isolation.fingerprint import fingerprint, redis_of, scroll, superuser
from tests.isolation.surface import Answer, Surface
from tests.isolation.target import Ids, Target, plant
from tests.isolation.test_key_stores import foreign_points, known_tenants, misplaced_keys
from tests.support.mesh import Mesh

HOSTILE = {
    "sql": "'; DROP TABLE tenant.tenants; --",
    "sql quotes": "x\"') OR 1=1; SELECT set_config('app.tenant_id', '', false); --",
    "sql parameters": "$1 %(name)s :tenant {tenant_id} %s%n",
    "lua": '"]] redis.call("FLUSHALL") --[[',
    "redis key": "{00000000-0000-0000-0000-000000000000}:meta",
    "redis pattern": "*?[a-z]\\*",
    "path": "../../../../etc/passwd",
    "template": "${jndi:ldap://127.0.0.1/x} {{7*7}} <%= 7*7 %>",
    "markup": "<script>alert(1)</script><!-- ]]>",
    "look-alikes": "\u0430dmin \u0440\u0430yp\u0430l",
    "right to left": "\u202etxt.exe\u202c",
    "combining": "e\u0301 é \u200b\u200d\ufeff",
    "astral": "\U0001d4af🦊👩‍👩‍👧",
    "upper case": "ADMIN Admin İstanbul ß",
    "spaces": "  two  spaces  ",
    "header": "a: b; c=d, e",
    "backslashes": "\\x00 \\u0000 \\' \\\\",
    "NUL": "before\x00after",
    "line breaks": "one\r\ntwo\nthree",
    "escape codes": "\x1b[31mred\x1b[0m\x07",
    "line separator": "one\u2028two\u2029three\x85four",
    "noncharacter": "\uffff\ufdd0",
}
SLUGS_REFUSED = {
    "upper case": "Acme",
    "Cyrillic look-alike": "\u0430cme",
    "full width": "\uff41\uff43\uff4d\uff45",
    "trailing line break": "acme\n",
    "leading hyphen": "-acme",
    "trailing hyphen": "acme-",
    "two hyphens": "ac--me",
    "dot": "ac.me",
    "slash": "ac/me",
    "underscore": "ac_me",
    "sql": "a';--",
    "NUL": "ac\x00me",
    "empty": "",
    "one letter": "a",
    "long": "a" * 64,
}
AT_ONCE = 12
REFUSED = ("INVALID_ARGUMENT", "INVALID_REQUEST")
Kept = Callable[[str], Awaitable[tuple[Answer, str]]]


@pytest.fixture
def victim(resident: Target) -> Target:
    """The attacked tenant: these attacks are the same wherever its content lives."""
    return resident


def create_request(rpc_type: Any, slug: str, display_name: str = "Somebody", **more: str) -> Any:
    """A request to make a tenant."""
    return rpc_type(request_id=str(uuid.uuid4()), slug=slug, display_name=display_name, plan="free", owner_email="o@example.com", **more)


async def test_slugs_that_look_alike_are_different_tenants(mesh: Mesh, surface: Surface, inside: Inside) -> None:
    """`a-b`, `ab` and `a-b-` with more are tenants of their own: no store's name is made from a slug, so none can collide."""
    rpc, stem = surface.find("tenant", "TenantService/CreateTenant"), secrets.token_hex(4)
    slugs = [f"{stem}-b", f"{stem}b", f"{stem}-b-0", f"{stem}b0"]
    ids: list[uuid.UUID] = []
    for number, slug in enumerate(slugs):
        made = await surface.call(rpc, create_request(rpc.request_type, slug), inside.as_operator("look-alikes"))
        assert made.code == "OK", made
        created: Any = made.messages[0]
        ids.append(uuid.UUID(created.tenant.tenant_id))
        await _store(surface, created.api_key, f"only-{number}")
    for number, tenant_id in enumerate(ids):
        points = await scroll(mesh.stack, alias_name(TenantId(tenant_id)))
        assert len(points) == 1, slugs[number]
    assert len(set(ids)) == len(slugs)
    assert await _objects_named_like(mesh, stem) == []


async def _store(surface: Surface, api_key: str, text: str) -> None:
    rpc = surface.find("retrieval", "DocumentService/UpsertDocuments")
    request = rpc.request_type(documents=[{"document_key": "same-key", "text": text}])
    metadata = [("authorization", f"Bearer {api_key}")]
    assert (await surface.call(rpc, request, metadata)).code == "OK"
    listing = surface.find("retrieval", "DocumentService/ListDocuments")
    listed: Any = (await surface.call(listing, listing.request_type(), metadata)).messages[0]
    assert len(listed.documents) == 1


async def _objects_named_like(mesh: Mesh, stem: str) -> list[str]:
    """Names of keys, schemas, tables and roles that were made from a slug."""
    connection = await superuser(mesh.stack)
    try:
        found = await connection.fetch(
            "SELECT nspname::text AS n FROM pg_namespace UNION ALL SELECT relname::text FROM pg_class "
            "UNION ALL SELECT rolname::text FROM pg_roles"
        )
    finally:
        await connection.close()
    async with redis_of(mesh.stack) as redis:
        keys = [key.decode() async for key in redis.scan_iter(count=1000)]
    return [name for name in [*(row["n"] for row in found), *keys] if stem in name]


@pytest.mark.parametrize("slug", SLUGS_REFUSED.values(), ids=SLUGS_REFUSED.keys())
async def test_slugs_that_are_not_plain_are_refused(surface: Surface, inside: Inside, slug: str) -> None:
    """Anything but lower-case ASCII letters, digits and single inner hyphens is INVALID_REQUEST naming the slug."""
    rpc = surface.find("tenant", "TenantService/CreateTenant")
    answer = await surface.call(rpc, create_request(rpc.request_type, slug), inside.as_operator("look-alikes"))
    assert answer.refused_as == REFUSED, answer
    assert answer.metadata["field"] == "slug"


async def test_a_look_alike_of_a_name_is_not_its_tenants(surface: Surface, inside: Inside, victim: Target) -> None:
    """Host and path find a tenant by its very slug: no separator, letter of another script, pattern or line break makes another of it."""
    rpc, slug = surface.find("tenant", "AuthenticationService/ResolveTenant"), victim.tenant.slug

    async def found(**names: str) -> tuple[str, str]:
        answer = await surface.call(rpc, rpc.request_type(**names), inside.as_operator("look-alikes"))
        resolved: Any = answer.messages[0] if answer.messages else None
        return answer.reason, resolved.tenant_id if resolved else ""

    for names in both_ways(slug):
        assert await found(**names) == ("", str(victim.tenant_id)), names
    others = [slug.replace("-", between) for between in ("", "_", ".", "--", "\u2010", "\u00ad-")]
    others += [
        slug.replace("e", "\u0435"),
        slug.replace("t", "\uff54"),
        f"{slug}\n",
        f"{slug}\u200b",
        slug[:-1],
        "%",
        "*",
        f"{slug}' OR ''='",
    ]
    for other in others:
        for names in both_ways(other):
            reason, tenant_id = await found(**names)
            assert reason in ("NOT_FOUND", "INVALID_REQUEST", "RESOURCE_NOT_FOUND"), (names, reason)
            assert not tenant_id


def both_ways(slug: str) -> tuple[dict[str, str], dict[str, str]]:
    """The two names that a front end may have been called by."""
    return {"host": f"{slug}.{BASE_DOMAIN}"}, {"path": f"/t/{slug}/home"}


async def test_hostile_text_is_kept_to_the_letter_or_refused(mesh: Mesh, surface: Surface, inside: Inside, victim: Target) -> None:
    """Every string field takes every hostile text unchanged or refuses it as INVALID_REQUEST; no other tenant or store notices."""
    before, wrong, slots = await fingerprint(mesh.stack, TenantId(victim.tenant_id)), list[str](), asyncio.Semaphore(AT_ONCE)
    # Two: a prompt that grows and shrinks beside calls that use it is another test's subject.
    namer, prompter = await plant(mesh, surface), await plant(mesh, surface)
    async with asyncio.TaskGroup() as group:
        for field, keep in (Fields(surface, inside, namer).all() | Fields(surface, inside, prompter).of_prompt()).items():
            # A tenant has one prompt, so its texts take turns; making a tenant is slow, so those do not.
            batches = [{name: text} for name, text in HOSTILE.items()] if field.startswith("tenant.") else [HOSTILE]
            for texts in batches:
                group.create_task(_try_all(slots, field, keep, texts, wrong))
    assert await fingerprint(mesh.stack, TenantId(victim.tenant_id)) == before
    tenants = await known_tenants(mesh.stack)
    async with redis_of(mesh.stack) as redis:
        assert await misplaced_keys(redis, tenants) == []
    assert await foreign_points(mesh.stack, tenants) == []
    assert not wrong, "\n".join(wrong)


async def _try_all(slots: asyncio.Semaphore, field: str, keep: Kept, texts: dict[str, str], wrong: list[str]) -> None:
    for name, text in texts.items():
        async with slots:
            answer, back = await keep(text)
        if answer.code == "OK":
            wrong.extend([f"{field} with {name}: came back as {back!r}"] if back != text else [])
        elif answer.refused_as != REFUSED:
            wrong.append(f"{field} with {name}: {answer}")


class Fields:
    """Each string field that is kept, with how to write a text into it and read it back."""

    def __init__(self, surface: Surface, inside: Inside, attacker: Target) -> None:
        self._surface = surface
        self._inside = inside
        self._attacker = attacker

    def all(self) -> dict[str, Kept]:
        """By the field's name."""
        return {
            "tenant.display_name and assistant_name": self._tenant_names,
            "key.display_name": self._key_name,
            "document.document_key": lambda text: self._document("document_key", text),
            "document.title": lambda text: self._document("title", text),
            "document.text": lambda text: self._document("text", text),
            "conversation.user": self._conversation_user,
            "call.user": lambda text: self._call("user", text),
            "call.feature": lambda text: self._call("feature", text),
            "turn.text": self._turn,
            "search.query": self._query,
        }

    def of_prompt(self) -> dict[str, Kept]:
        """The prompt alone: it changes what the tenant's other calls are made of."""
        return {"prompt.text": self._prompt}

    async def _do(self, port: str, method: str, metadata: Any = None, **fields: Any) -> tuple[Answer, Any]:
        rpc = self._surface.find(port, method)
        answer = await self._surface.call(rpc, rpc.request_type(**fields), self._attacker.metadata if metadata is None else metadata)
        return answer, answer.messages[0] if answer.messages else None

    async def _tenant_names(self, text: str) -> tuple[Answer, str]:
        """Both names of one new tenant: making tenants is slow."""
        rpc = self._surface.find("tenant", "TenantService/CreateTenant")
        request = create_request(rpc.request_type, f"n-{secrets.token_hex(8)}", text, assistant_name=text[:100])
        answer = await self._surface.call(rpc, request, self._inside.as_operator("hostile names"))
        if not answer.messages:
            return answer, ""
        made: Any = answer.messages[0]
        _, read = await self._do("tenant", "TenantService/GetTenantConfig", [("authorization", f"Bearer {made.api_key}")])
        names = {made.tenant.display_name, read.config.display_name, read.config.ai.assistant_name}
        return answer, text if names == {text} else repr(names)

    async def _key_name(self, text: str) -> tuple[Answer, str]:
        answer, made = await self._do("tenant", "ApiKeyService/CreateApiKey", display_name=text, scopes=["usage:read"])
        if made is None:
            return answer, ""
        await self._do("tenant", "ApiKeyService/RevokeApiKey", key_id=made.key.key_id)
        _, listed = await self._do("tenant", "ApiKeyService/ListApiKeys", page_size=1000)
        return answer, next(key.display_name for key in listed.keys if key.key_id == made.key.key_id)

    async def _document(self, field: str, text: str) -> tuple[Answer, str]:
        document = {"document_key": f"named-{secrets.token_hex(4)}", "title": "title", "text": "text"} | {field: text}
        answer, made = await self._do("retrieval", "DocumentService/UpsertDocuments", documents=[document])
        if made is None:
            return answer, ""
        read, got = await self._do("retrieval", "DocumentService/GetDocument", document_id=made.documents[0].document_id)
        await self._do("retrieval", "DocumentService/DeleteDocument", document_id=made.documents[0].document_id)
        return (answer, str(getattr(got.document, field))) if got else (read, "")

    async def _prompt(self, text: str) -> tuple[Answer, str]:
        answer, _ = await self._do("inference", "PromptService/PutPrompt", text=text)
        _, kept = await self._do("inference", "PromptService/GetPrompt")
        await self._do("inference", "PromptService/PutPrompt", text=self._attacker.prompt)
        return answer, kept.prompt.text

    async def _conversation_user(self, text: str) -> tuple[Answer, str]:
        answer, made = await self._do("inference", "ConversationService/CreateConversation", user=text)
        return answer, made.conversation.user if made else ""

    async def _call(self, field: str, text: str) -> tuple[Answer, str]:
        options = {"max_output_tokens": 5, field: text}
        question = [{"role": 1, "text": "Hello."}]
        answer, made = await self._do("inference", "InferenceService/Generate", messages=question, options=options)
        if made is None:
            return answer, ""
        _, call = await self._do("metering", "UsageService/GetCall", call_id=made.summary.call_id)
        return answer, str(getattr(call.attempts[0], field))

    async def _turn(self, text: str) -> tuple[Answer, str]:
        _, begun = await self._do("inference", "ConversationService/CreateConversation")
        conversation_id = begun.conversation.conversation_id
        options = {"max_output_tokens": 5, "conversation_id": conversation_id}
        answer, _ = await self._do("inference", "InferenceService/Generate", messages=[{"role": 1, "text": text}], options=options)
        _, listed = await self._do("inference", "ConversationService/ListTurns", conversation_id=conversation_id)
        return answer, listed.turns[0].text if listed.turns else ""

    async def _query(self, text: str) -> tuple[Answer, str]:
        answer, _ = await self._do("retrieval", "SearchService/Search", query=text)
        return answer, text


async def test_ids_and_page_tokens_of_no_tenant_are_refused_or_empty(mesh: Mesh, surface: Surface, victim: Target) -> None:
    """Made-up ids and page tokens, with line breaks, NULs, patterns and SQL, are typed refusals and disclose nothing."""
    attacker, wrong = await plant(mesh, surface), list[str]()
    tokens = ["*", "%", "'", "\x00", "AAAA", "a2EA", "a2EnOyBEUk9QIFRBQkxFIHg7LS0", "99999999999999999999", "-1", "WyJhIl0", "é", "1" * 200]
    ids = Ids.never_existed()
    lists = [
        ("retrieval", "DocumentService/ListDocuments", "page_token", tokens),
        ("tenant", "ApiKeyService/ListApiKeys", "page_token", tokens),
        ("metering", "UsageService/ListCalls", "page_token", tokens),
        ("retrieval", "DocumentService/GetDocument", "document_id", _spoiled(ids.document_id)),
        ("retrieval", "DocumentService/DeleteDocument", "document_id", _spoiled(ids.document_id)),
        ("metering", "UsageService/GetCall", "call_id", _spoiled(ids.call_id)),
        ("inference", "ConversationService/ListTurns", "conversation_id", _spoiled(victim.ids.conversation_id)),
        ("inference", "ConversationService/DeleteConversation", "conversation_id", _spoiled(victim.ids.conversation_id)),
        ("tenant", "ApiKeyService/RevokeApiKey", "key_id", _spoiled(victim.ids.key_id)),
    ]
    async with asyncio.TaskGroup() as group:
        for port, method, field, values in lists:
            group.create_task(_probe(surface, attacker, victim, (port, method, field), values, wrong))
    assert not wrong, "\n".join(wrong)


def _spoiled(value: str) -> list[str]:
    return [f"{value}\n", f" {value}", value.upper() + "\x00", f"{value[:-1]}*", f"{value}' OR ''='", "*", "", value[:-1], "é" * len(value)]


async def _probe(
    surface: Surface, attacker: Target, victim: Target, where: tuple[str, str, str], values: list[str], wrong: list[str]
) -> None:
    port, method, field = where
    rpc = surface.find(port, method)
    for value in values:
        answer = await surface.call(rpc, rpc.request_type(**{field: value}), attacker.metadata)
        if field == "page_token" and answer.code == "OK":
            wrong += [f"{method} {value!r}: {found}" for found in victim.traces_in(answer)]
        elif answer.refused_as != REFUSED:
            wrong.append(f"{method} {field}={value!r}: {answer}")
