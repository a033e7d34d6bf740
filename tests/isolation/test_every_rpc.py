"""A tenant with real credentials puts another tenant's ids into every field of every rpc the mesh serves."""

import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

from devstack.mesh_client import credentials
from services.kernel.ids import TenantId, new_uuid7, uuid7_time
from services.kernel.rpc.interceptor import EXEMPT_SERVICES
from services.kernel.rpc.policy import REQUIRED
from tests.contract import contracts
from tests.isolation.attack_cases import CASES, ENDS_ITS_TENANT, aimed_at, names_an_id
from tests.isolation.credentials_forged import Inside, bearer
from tests.isolation.fingerprint import fingerprint
from tests.isolation.rounds import MTLS, PGBOUNCER, PLAIN, POOL, SILO, against, over
from tests.isolation.surface import Answer, Metadata, Rpc, Surface
from tests.isolation.target import Ids, Target, plant
from tests.support.mesh import Mesh

# Another's interface that the mesh serves, under a policy of its own: who may call it and what it does is in tests/ratelimit/test_envoy.py.
SPOKEN = {"envoy.service.ratelimit.v3.RateLimitService"}


@over(PLAIN, MTLS)
async def test_every_served_rpc_has_an_attack(surface: Surface) -> None:
    """No rpc is served that nobody has thought of attacking, and no attack aims at an rpc that is not there."""
    assert {rpc.path for rpc in surface.rpcs} == set(CASES)


@over(PLAIN, MTLS)
async def test_nothing_but_the_mesh_health_and_reflection_is_served(surface: Surface) -> None:
    """A port answers to the mesh's own contracts and to the named exceptions, and to nothing a library brought along."""
    strangers = {name for name in surface.service_names if not name.startswith("mesh.")}
    assert strangers <= EXEMPT_SERVICES | SPOKEN


@over(PLAIN, MTLS)
async def test_reflection_hides_no_rpc(surface: Surface) -> None:
    """Every method of every contract is found by asking the ports: what is attacked is all there is."""
    assert {rpc.path for rpc in surface.rpcs} == {f"/{method.containing_service.full_name}/{method.name}" for method in contracts.methods()}


def _as_attacker(rpc: Rpc, inside: Inside, attacker: Target, context: str) -> Iterator[Metadata]:
    if rpc.tenant == REQUIRED:
        if rpc.is_external:
            yield credentials(attacker.tenant.api_key)
        for service in sorted(rpc.callers - {"external"}):
            yield inside.as_service(service, context=context, tenant_id=attacker.tenant_id)


# Through PgBouncer as well: what a faulty client left on the sessions must not matter to the services.
@against()
async def test_another_tenants_ids_open_nothing(mesh: Mesh, surface: Surface, inside: Inside, victim: Target, attacker: Target) -> None:
    """Whatever id of another tenant a request names, the answer holds nothing of that tenant, and nothing of it changes."""
    before = await fingerprint(mesh.stack, TenantId(victim.tenant_id))
    context, leaks = await inside.context_of(attacker.tenant.api_key), list[str]()
    for rpc in surface.rpcs:
        if rpc.path in ENDS_ITS_TENANT:
            continue
        for metadata in _as_attacker(rpc, inside, attacker, context):
            answer = await surface.call(rpc, aimed_at(rpc, victim.ids), metadata)
            found = victim.traces_in(answer, asked_with=victim.ids)
            leaks += [f"{rpc}: {found}"] if found else []
            leaks += [f"{rpc}: {answer}"] if answer.code != "OK" and answer.reason in ("", "INTERNAL") else []
    assert not leaks, "\n".join(leaks)
    assert await fingerprint(mesh.stack, TenantId(victim.tenant_id)) == before


def _shape(answer: Answer, asked: Ids) -> tuple[object, ...]:
    text = repr((answer.text, sorted(answer.metadata.items()))).encode()
    for spelling, name in asked.spellings().items():
        text = text.replace(spelling, name)
    text = re.sub(rb"\d{4}-\d\d-\d\dT[\d:.]+Z|trace id \w+", b"<varies>", text)
    return answer.code, answer.reason, text, [message.ByteSize() > 0 for message in answer.messages]


@against()
async def test_a_foreign_id_answers_as_one_that_never_existed(mesh: Mesh, surface: Surface, inside: Inside, victim: Target) -> None:
    """Status, reason, words and details are the same for another tenant's id and for one that nobody ever had."""
    # A newcomer: an attacker who has tried the ids before has made some of them its own.
    attacker = await plant(mesh, surface)
    context, differences, compared = await inside.context_of(attacker.tenant.api_key), list[str](), 0
    for rpc in surface.rpcs:
        if rpc.path in ENDS_ITS_TENANT or not names_an_id(rpc):
            continue
        for metadata in _as_attacker(rpc, inside, attacker, context):
            # Reserve judges an id by the time in it, so the one that never existed is as old as the real one.
            made_at = uuid7_time(UUID(victim.ids.reservation_id)) or datetime.now(UTC)
            absent = replace(Ids.never_existed(), reservation_id=str(new_uuid7(made_at)))
            foreign = replace(victim.ids, page_tokens=())
            answers = [_shape(await surface.call(rpc, aimed_at(rpc, ids), metadata), ids) for ids in (foreign, absent)]
            differences += [f"{rpc}: {answers}"] if answers[0] != answers[1] else []
            compared += 1
    assert not differences, "\n".join(differences)
    assert compared >= 10


# The books of calls and the comparison of claims are the same wherever content lives.
@against((PLAIN, SILO), (MTLS, SILO), (PGBOUNCER, POOL))
async def test_a_call_id_of_another_tenant_is_free_to_use(mesh: Mesh, surface: Surface, victim: Target) -> None:
    """Call ids belong to their tenant: a foreign one neither collides nor tells that it exists."""
    attacker = await plant(mesh, surface)
    rpc = surface.find("inference", "InferenceService/Generate")
    request = rpc.request_type(messages=[{"role": 1, "text": "Hello."}], options={"max_output_tokens": 10})
    metadata = [*credentials(attacker.tenant.api_key), ("x-request-id", victim.ids.call_id)]
    answer = await surface.call(rpc, request, metadata)
    assert answer.code == "OK", answer
    assert answer.messages[0].summary.call_id == victim.ids.call_id  # type: ignore[attr-defined] # a class of the reflected pool
    read = surface.find("metering", "UsageService/GetCall")
    mine = await surface.call(read, aimed_at(read, victim.ids), credentials(attacker.tenant.api_key))
    assert mine.code == "OK"
    assert victim.traces_in(mine, asked_with=replace(Ids.never_existed(), call_id=victim.ids.call_id)) == []


@over(PLAIN, MTLS)
async def test_a_claimed_tenant_beside_ones_own_key_is_refused(surface: Surface, victim: Target, attacker: Target) -> None:
    """`x-tenant-id` of another tenant beside a real key is TENANT_MISMATCH at every rpc, whether that tenant exists or not."""
    wrong: list[str] = []
    for rpc in surface.rpcs:
        for claimed in (victim.tenant_id, new_uuid7()):
            metadata = [*bearer(attacker.tenant.api_key), ("x-tenant-id", str(claimed))]
            answer = await surface.call(rpc, aimed_at(rpc, victim.ids), metadata)
            wrong += [f"{rpc}: {answer}"] if answer.refused_as != ("PERMISSION_DENIED", "TENANT_MISMATCH") else []
    assert not wrong, "\n".join(wrong)


@against()
async def test_erasing_and_exporting_a_tenant_touch_no_other(mesh: Mesh, surface: Surface, inside: Inside, victim: Target) -> None:
    """All five services export and erase exactly the tenant of the call's context."""
    before = await fingerprint(mesh.stack, TenantId(victim.tenant_id))
    doomed, wrong = await plant(mesh, surface), list[str]()
    context = await inside.context_of(doomed.tenant.api_key)
    metadata = inside.as_service("tenant", context=context, tenant_id=doomed.tenant_id)
    for rpc in sorted(surface.rpcs, key=lambda rpc: (rpc.port == "tenant", not rpc.streams)):
        if rpc.path.endswith(("LifecycleService/ExportTenant", "LifecycleService/EraseTenant")):
            answer = await surface.call(rpc, rpc.request_type(), metadata)
            wrong += [f"{rpc}: {answer}"] if answer.code != "OK" else []
            wrong += [f"{rpc}: {found}" for found in victim.traces_in(answer)]
    assert await fingerprint(mesh.stack, TenantId(victim.tenant_id)) == before
    assert not wrong, "\n".join(wrong)
