"""What a gateway is answered by the interface it already speaks."""

import grpc
import pytest
from google.protobuf.wrappers_pb2 import UInt64Value

from envoy.extensions.common.ratelimit.v3.ratelimit_pb2 import RateLimitDescriptor
from envoy.service.ratelimit.v3 import rls_pb2 as messages
from envoy.service.ratelimit.v3 import rls_pb2_grpc
from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.ratelimit.v1 import rate_limit_service_pb2 as limits_messages
from services.kernel.errors import MeshError
from services.kernel.ids import new_uuid7
from services.kernel.rpc.channel import MeshChannel
from tests.ratelimit.callers import AtService, Service
from tests.ratelimit.rules import SHADOW, rule

OK, OVER = messages.RateLimitResponse.OK, messages.RateLimitResponse.OVER_LIMIT
PER_MINUTE = rule("gateway_per_minute", "gateway_requests", 60, 3)
EACH_USER = rule("gateway_each_user", "gateway_requests", 60, 2, "user")
UPLOADS = rule("uploads_a_day", "uploads", "day", 1)


async def ask(
    service: Service,
    *descriptors: dict[str, str],
    hits: int = 0,
    own_hits: int | None = None,
    domain: str = "tenantry",
    by: str = "gateway",
) -> messages.RateLimitResponse:
    """One question, as an Envoy sends it."""
    channel: MeshChannel = getattr(service, by)
    request = messages.RateLimitRequest(
        domain=domain,
        hits_addend=hits,
        descriptors=[
            RateLimitDescriptor(
                entries=[RateLimitDescriptor.Entry(key=key, value=value) for key, value in descriptor.items()],
                hits_addend=None if own_hits is None else UInt64Value(value=own_hits),
            )
            for descriptor in descriptors
        ],
    )
    stub = rls_pb2_grpc.RateLimitServiceStub(channel.channel)
    return await channel.unary(stub.ShouldRateLimit, request, timeout_seconds=5.0)


async def refused(service: Service, *descriptors: dict[str, str], **options: object) -> MeshError:
    """The error a question ends in."""
    with pytest.raises(MeshError) as caught:
        await ask(service, *descriptors, **options)  # type: ignore[arg-type] # options of `ask`
    return caught.value


def of(tenant: AtService, **entries: str) -> dict[str, str]:
    """A descriptor that proves the tenant by its context."""
    return {"tenant_context": tenant.context.token, **entries}


def headers(response: messages.RateLimitResponse) -> dict[str, str]:
    """The headers that the gateway adds to its answer."""
    return {header.key: header.value for header in response.response_headers_to_add}


async def test_requests_are_admitted_up_to_the_limit_and_told_what_is_left(service: Service) -> None:
    """Each request is counted once, with Envoy's limit, what is left and when it resets; the next one over is refused with a sentence."""
    tenant = service.tenant_with(PER_MINUTE)
    for left in (2, 1, 0):
        response = await ask(service, of(tenant))
        (status,) = response.statuses
        assert (response.overall_code, status.code, status.limit_remaining) == (OK, OK, left)
        assert (status.current_limit.requests_per_unit, status.current_limit.unit) == (3, messages.RateLimitResponse.RateLimit.MINUTE)
        assert status.current_limit.name == "gateway_per_minute"
        assert 0 < status.duration_until_reset.ToSeconds() <= 60
        assert headers(response)["x-ratelimit-remaining"] == str(left)
    response = await ask(service, of(tenant))
    assert (response.overall_code, response.statuses[0].code) == (OVER, OVER)
    assert 0 < int(headers(response)["retry-after"]) <= 60
    assert response.raw_body.decode().startswith("3 of 3 gateway per minute are in use and this use needs 1 more: try again in ")


async def test_a_refused_question_counts_nothing(service: Service) -> None:
    """Where one descriptor is over its limit none of the others is counted either: no byte of what is kept changes."""
    tenant = service.tenant_with(PER_MINUTE, EACH_USER, UPLOADS)
    await ask(service, of(tenant, unit="uploads"))
    before = await tenant.store.dump()
    response = await ask(service, of(tenant, user="ada"), of(tenant, unit="uploads"))
    assert [status.code for status in response.statuses] == [OK, OVER]
    assert await tenant.store.dump() == before
    assert (await tenant.limits(user="ada"))["gateway_per_minute"].used == 0


async def test_descriptors_of_one_question_are_added_up(service: Service) -> None:
    """Two descriptors on one limit need room for both."""
    tenant = service.tenant_with(PER_MINUTE)
    assert (await ask(service, of(tenant), of(tenant), hits=2)).overall_code == OVER
    assert (await ask(service, of(tenant), of(tenant), own_hits=1, hits=9)).overall_code == OK
    assert (await tenant.limits())["gateway_per_minute"].used == 2


async def test_users_have_limits_of_their_own(service: Service) -> None:
    """A user over its own limit is refused while another is served."""
    tenant = service.tenant_with(EACH_USER)
    for _ in range(2):
        assert (await ask(service, of(tenant, user="ada"))).overall_code == OK
    assert (await ask(service, of(tenant, user="ada"))).overall_code == OVER
    assert (await ask(service, of(tenant, user="bob"))).overall_code == OK


async def test_what_has_no_rule_is_not_limited(service: Service) -> None:
    """A unit without a rule, and no hits, are admitted and leave nothing behind."""
    tenant = service.tenant_with(PER_MINUTE)
    response = await ask(service, of(tenant, unit="unheard_of"), of(tenant), own_hits=0)
    assert [(status.code, status.HasField("current_limit")) for status in response.statuses] == [(OK, False), (OK, False)]
    assert await tenant.store.dump() == [None] * len(await tenant.store.dump())


async def test_a_limit_by_the_day_is_in_the_ledger(service: Service) -> None:
    """Use that counts by the day is recorded before the gateway is answered, so that it survives the limits' store."""
    tenant = service.tenant_with(UPLOADS)
    await ask(service, of(tenant, unit="uploads"))
    (entry,) = service.peer.ledger.of(tenant.tenant_id).calls.values()
    assert (entry.product_unit, entry.quantity) == ("uploads", 1)
    await tenant.store.lose()
    assert (await ask(service, of(tenant, unit="uploads"))).overall_code == OVER


async def test_a_shadow_rule_refuses_no_gateway(service: Service) -> None:
    """A rule in shadow mode is counted and admits."""
    tenant = service.tenant_with(rule("tried_out", "gateway_requests", 60, 1, mode=SHADOW))
    assert [(await ask(service, of(tenant))).overall_code for _ in range(3)] == [OK] * 3


async def test_a_tenant_that_the_guard_keeps_out_is_over_its_limit_and_no_error(service: Service) -> None:
    """A gateway lets a request pass when its question ends in an error: an open guard is an answer, for units without a rule too."""
    guard = rules.AbuseGuard(refusals_per_minute=1, first_seconds=60, most_seconds=60)
    told = rules.LimitRules(rules=[PER_MINUTE], abuse_guard=guard)
    proof = {"tenant_context": service.peer.tenants.context(new_uuid7(), told).token}
    for _ in range(3):
        response = await ask(service, proof, proof, hits=2)
    assert (response.overall_code, [status.code for status in response.statuses]) == (OVER, [OVER, OVER])
    assert headers(response).keys() == {"retry-after"}
    assert 0 < int(headers(response)["retry-after"]) <= 60
    assert b"is kept out for" in response.raw_body
    assert (await ask(service, proof | {"unit": "unheard_of"})).overall_code == OVER


async def test_a_credential_proves_the_tenant_from_where_its_caller_was_seen(service: Service) -> None:
    """The caller's own key is proof; a key bound to networks is held to the address the gateway saw."""
    tenant = service.tenant_with(PER_MINUTE)
    service.peer.tenants.credentials["ten_key", "10.1.2.3"] = tenant.context
    seen = {"credential": "Bearer ten_key", "remote_address": "10.1.2.3"}
    assert (await ask(service, seen)).overall_code == OK
    assert (await ask(service, seen | {"credential": "bearer ten_key"})).overall_code == OK
    assert (await refused(service, seen | {"remote_address": "10.9.9.9"})).code is grpc.StatusCode.UNAUTHENTICATED
    assert (await refused(service, {"credential": "ten_other"})).code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_tenant_is_proven_and_never_named(service: Service) -> None:
    """A tenant's id proves nothing, an altered context is refused, and one question is about one tenant."""
    one, other = service.tenant_with(PER_MINUTE), service.tenant_with(PER_MINUTE)
    assert (await refused(service, {"tenant_id": str(one.tenant_id)})).reason_name == "INVALID_REQUEST"
    assert (await refused(service, {"user": "ada"})).reason_name == "INVALID_REQUEST"
    altered = one.context.token[:-8] + "AAAAAAAA"
    assert (await refused(service, {"tenant_context": altered})).code is grpc.StatusCode.UNAUTHENTICATED
    assert (await refused(service, of(one), of(other))).reason_name == "INVALID_REQUEST"
    assert (await refused(service, of(one), by="inference")).reason_name == "CALLER_NOT_ALLOWED"
    assert (await one.limits())["gateway_per_minute"].used == 0


@pytest.mark.parametrize(
    ("descriptors", "options"),
    [
        ([], {}),
        ([{"usr": "ada"}], {}),
        ([{}], {"domain": "edge"}),
        ([{}] * 21, {}),
        ([{}], {"own_hits": 2**40}),
    ],
    ids=["none", "slip", "domain", "many", "hits"],
)
async def test_a_question_with_a_slip_is_told_what_to_correct(
    service: Service, descriptors: list[dict[str, str]], options: dict[str, object]
) -> None:
    """What is not understood is refused: a slip must not become a limit that is never reached."""
    tenant = service.tenant_with(PER_MINUTE)
    error = await refused(service, *(of(tenant, **entries) for entries in descriptors), **options)
    assert error.reason_name == "INVALID_REQUEST"
    look = limits_messages.ListLimitsRequest()
    response = await service.inference.unary(tenant.stub.ListLimits, look, timeout_seconds=5.0, tenant=tenant.context)
    assert response.limits[0].used == 0


@pytest.mark.parametrize("entries", [{"user": "a" * 201}, {"feature": "é" * 101}, {"user": "a\0b"}], ids=["user", "feature", "NUL"])
@pytest.mark.parametrize("unit", ["gateway_requests", "uploads"])
async def test_a_name_that_no_ledger_keeps_is_over_its_limit_and_no_error(service: Service, entries: dict[str, str], unit: str) -> None:
    """A caller may have chosen it, and an error lets a gateway's request pass: it is kept out, told why, and nothing of it is kept."""
    tenant = service.tenant_with(PER_MINUTE, UPLOADS)
    response = await ask(service, of(tenant, unit=unit, **entries), of(tenant))
    assert (response.overall_code, [status.code for status in response.statuses]) == (OVER, [OVER, OVER])
    assert response.raw_body.decode().startswith(f"{next(iter(entries))}: must")
    assert await tenant.store.dump() == [None] * len(await tenant.store.dump())
    assert (await ask(service, of(tenant, user="é" * 200, feature="f" * 100))).overall_code == OK


async def test_a_tenant_of_another_region_is_counted_in_its_own_cell_alone(service: Service) -> None:
    """As every other question about it: refused with the region, and nothing of it is kept here."""
    tenant = service.tenant_with(PER_MINUTE)
    elsewhere = service.peer.tenants.context(tenant.tenant_id, rules.LimitRules(rules=[PER_MINUTE]), region="elsewhere")
    service.peer.tenants.credentials["ten_elsewhere", ""] = elsewhere
    for proof in ({"tenant_context": elsewhere.token}, {"credential": "ten_elsewhere"}):
        assert (await refused(service, proof)).reason_name == "WRONG_CELL"
    assert await tenant.store.dump() == [None] * len(await tenant.store.dump())
