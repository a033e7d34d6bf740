"""SQL, Lua and other metacharacters in every string of every request, found by asking the ports: each is taken, or refused and typed."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.message import Message

from devstack.mesh_client import credentials
from services.kernel.ids import TenantId
from services.kernel.rpc.policy import NONE, OPERATOR
from tests.isolation.attack_cases import ENDS_ITS_TENANT, aimed_at
from tests.isolation.credentials_forged import Inside
from tests.isolation.fingerprint import fingerprint, redis_of
from tests.isolation.rounds import PLAIN, POOL, against
from tests.isolation.surface import Metadata, Rpc, Surface
from tests.isolation.target import Target, plant
from tests.isolation.test_key_stores import known_tenants, misplaced_keys
from tests.isolation.test_names import HOSTILE
from tests.support.mesh import Mesh

TRIED = ("sql", "sql quotes", "sql parameters", "lua", "redis key", "path", "NUL", "astral")
DEEPEST = 4
AT_ONCE = 8
# Streams that stay open answer by not ending.
PATIENCE_SECONDS = 10.0
STAYS_OPEN = frozenset({"/mesh.tenant.v1.AuthenticationService/WatchChanges", "/mesh.tenant.v1.TenantService/WatchProvisioning"})
# The names of the fields that lead to a string.
Path = tuple[str, ...]


def strings_of(message: Message, depth: int = 0) -> Iterator[Path]:
    """The ways to every string field of a message; maps are left out."""
    # `Any`: the two implementations of descriptors have no type in common.
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    for field in fields:
        if field.type == field.TYPE_STRING:
            yield (field.name,)
        elif field.type == field.TYPE_MESSAGE and depth < DEEPEST and not field.message_type.GetOptions().map_entry:
            held: Any = getattr(type(message)(), field.name)
            inner = held.add() if field.is_repeated else held
            yield from ((field.name, *rest) for rest in strings_of(inner, depth + 1))


def with_text(request: Message, path: Path, text: str) -> Message:
    """The request with one of its strings replaced, or set where it had none."""
    changed = type(request)()
    changed.CopyFrom(request)
    at: Any = changed
    for name in path[:-1]:
        held = getattr(at, name)
        at = (held[0] if held else held.add()) if hasattr(held, "add") else held
    held = getattr(at, path[-1])
    if isinstance(held, str):
        setattr(at, path[-1], text)
    else:
        del held[:]
        held.append(text)
    return changed


@pytest.fixture
async def prober(mesh: Mesh, surface: Surface) -> Target:
    """A tenant for this alone: its own settings, names and keys are what is written to."""
    return await plant(mesh, surface)


# Strings are read by the same code wherever content lives: the pool, whose content is not sealed, shows most.
@against((PLAIN, POOL))
async def test_every_string_of_every_rpc_takes_hostile_text_or_refuses_it(
    mesh: Mesh, surface: Surface, inside: Inside, victim: Target, prober: Target
) -> None:
    """No string of any request reaches an interpreter: never INTERNAL, never another tenant's data, and nobody else's changes."""
    before, slots = await fingerprint(mesh.stack, TenantId(victim.tenant_id)), asyncio.Semaphore(AT_ONCE)
    wrong, tried = list[str](), set[str]()
    context = await inside.context_of(prober.tenant.api_key)

    async def probe(rpc: Rpc, path: Path, name: str) -> None:
        request = with_text(aimed_at(rpc, prober.ids), path, HOSTILE[name])
        patience = PATIENCE_SECONDS if rpc.path in STAYS_OPEN else 4 * PATIENCE_SECONDS
        async with slots:
            answer = await surface.call(rpc, request, as_one_who_may(rpc, inside, prober, context), timeout_seconds=patience)
        tried.add(f"{rpc.path}.{path[-1]}")
        found = victim.traces_in(answer)
        if found or (answer.code != "OK" and answer.reason in ("", "INTERNAL") and rpc.path not in STAYS_OPEN):
            wrong.append(f"{rpc} {'.'.join(path)} with {name}: {found} {answer}")

    async with asyncio.TaskGroup() as group:
        for rpc in surface.rpcs:
            for path in () if rpc.path in ENDS_ITS_TENANT else tuple(strings_of(rpc.request_type())):
                for name in TRIED:
                    group.create_task(probe(rpc, path, name))
    assert not wrong, "\n".join(wrong)
    assert len(tried) >= 80
    assert await fingerprint(mesh.stack, TenantId(victim.tenant_id)) == before
    async with redis_of(mesh.stack) as redis:
        assert await misplaced_keys(redis, await known_tenants(mesh.stack)) == []


def as_one_who_may(rpc: Rpc, inside: Inside, prober: Target, context: str) -> Metadata:
    """Credentials that reach the method itself: what a guard refuses tries nothing."""
    if rpc.tenant == OPERATOR:
        return inside.as_operator("hostile strings")
    if rpc.is_external:
        return credentials(prober.tenant.api_key)
    service = min(rpc.callers)
    return inside.as_service(service) if rpc.tenant == NONE else inside.as_service(service, context=context, tenant_id=prober.tenant_id)
