"""Feature flags: decided alike by everybody, kept with their history, and in the token of the next call."""

import asyncio
import json
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.common.v1 import error_reason_pb2, lifecycle_service_pb2
from mesh.tenant.v1 import flag_service_pb2 as pb
from mesh.tenant.v1 import tenant_service_pb2
from services.kernel.errors import InvalidRequest, Unavailable
from services.kernel.ids import NO_TENANT, TenantId
from services.tenant.app import build
from services.tenant.feature_flag import (
    MAX_NAME_BYTES,
    Flag,
    FlagRule,
    FlagSet,
    bucket_of,
    evaluate,
    refuse_contradictions,
)
from services.tenant.flag_set_cache import FlagSetCache
from tests.support.stores import PostgresStore
from tests.support.waiting import eventually
from tests.tenant.harness import Harness, as_service, call, put_flag, refusal, running_service, with_key
from tests.tenant.test_authentication import proven
from tests.tenant.test_tenants import CONFIG

TENANTS = st.uuids().map(TenantId)
TIERS = ("free", "starter", "professional", "enterprise")


def flag(name: str = "new_search", **rules: Any) -> Flag:
    """A flag that is off but for its rules."""
    fields = {
        "description": "",
        "default_value": False,
        "tenants_on": frozenset(),
        "tenants_off": frozenset(),
        "tiers_on": frozenset(),
        "tiers_off": frozenset(),
        "percentage_basis_points": 0,
    }
    return Flag(name=name, **{**fields, **rules})


async def flags_of(harness: Harness, api_key: str) -> frozenset[str]:
    """The flags that a call with this key carries."""
    return (await proven(harness, (await harness.authenticate(api_key)).context_token)).flags


@given(tenant_id=TENANTS, one=st.integers(0, 10_000), other=st.integers(0, 10_000), default=st.booleans())
def test_raising_a_percentage_only_adds_tenants(tenant_id: TenantId, one: int, other: int, default: bool) -> None:
    """A tenant for which a flag is on at a percentage has it at every higher one."""
    lower, higher = sorted((one, other))
    at_lower = evaluate(flag(percentage_basis_points=lower, default_value=default), tenant_id, "free")
    at_higher = evaluate(flag(percentage_basis_points=higher, default_value=default), tenant_id, "free")
    assert at_higher.enabled >= at_lower.enabled


@given(tenant_id=TENANTS, points=st.integers(0, 10_000), name=st.from_regex(r"[a-z][a-z0-9_]{0,62}", fullmatch=True))
def test_an_evaluation_depends_on_nothing_but_flag_and_tenant(tenant_id: TenantId, points: int, name: str) -> None:
    """Asked again, of a copy of the flag and in another process, the answer is the same."""
    first = evaluate(flag(name, percentage_basis_points=points), tenant_id, "free")
    again = evaluate(flag(name, percentage_basis_points=points), TenantId(UUID(str(tenant_id))), "enterprise")
    assert first == again
    assert 0 <= first.bucket < 10_000


def test_the_bucket_is_the_documented_digest() -> None:
    """SHA-256 over the name, a NUL and the tenant's 16 bytes, modulo 10,000: computed elsewhere once, and for ever the same."""
    tenant_id = TenantId(UUID("01900000-0000-7000-8000-000000000001"))
    assert bucket_of("new_search", tenant_id) == 4_248
    assert bucket_of("ai_interviews", tenant_id) != bucket_of("new_search", tenant_id)


def test_a_percentage_is_about_that_share_of_tenants() -> None:
    """Of many tenants about a quarter fall under 2,500 basis points, none under 0, all under 10,000."""
    tenants = [TenantId(uuid4()) for _ in range(4_000)]
    for points, low, high in ((0, 0, 0), (2_500, 850, 1_150), (10_000, 4_000, 4_000)):
        count = sum(evaluate(flag(percentage_basis_points=points), tenant, "free").enabled for tenant in tenants)
        assert low <= count <= high, points


@given(
    tenant_id=TENANTS,
    by_tenant=st.none() | st.booleans(),
    by_tier=st.none() | st.booleans(),
    points=st.sampled_from((0, 10_000)),
    default=st.booleans(),
)
def test_the_first_rule_with_a_word_decides(
    tenant_id: TenantId, by_tenant: bool | None, by_tier: bool | None, points: int, default: bool
) -> None:
    """Tenant before tier before percentage before default, whatever the later ones say."""
    rules = flag(
        tenants_on=frozenset((tenant_id,)) if by_tenant is True else frozenset(),
        tenants_off=frozenset((tenant_id,)) if by_tenant is False else frozenset(),
        tiers_on=frozenset(("free",)) if by_tier is True else frozenset(),
        tiers_off=frozenset(("free",)) if by_tier is False else frozenset(),
        percentage_basis_points=points,
        default_value=default,
    )
    found = evaluate(rules, tenant_id, "free")
    if by_tenant is not None:
        assert (found.enabled, found.rule) == (by_tenant, FlagRule.TENANT)
    elif by_tier is not None:
        assert (found.enabled, found.rule) == (by_tier, FlagRule.TIER)
    elif points:
        assert (found.enabled, found.rule) == (True, FlagRule.PERCENTAGE)
    else:
        assert (found.enabled, found.rule) == (default, FlagRule.DEFAULT)


def test_rules_that_contradict_each_other_are_refused() -> None:
    """A tenant or tier both on and off, more than a thousand tenants, and a tier that is no plan."""
    one = TenantId(uuid4())
    many = frozenset(TenantId(uuid4()) for _ in range(1_000))
    for wrong in (
        flag(tenants_on=frozenset((one,)), tenants_off=frozenset((one,))),
        flag(tiers_on=frozenset(("free",)), tiers_off=frozenset(("free",))),
        flag(tenants_on=many, tenants_off=frozenset((one,))),
        flag(tiers_on=frozenset(("golden",))),
        flag(tiers_off=frozenset(("golden",))),
    ):
        with pytest.raises(InvalidRequest):
            refuse_contradictions(wrong, TIERS)
    refuse_contradictions(flag(tenants_on=many, tiers_on=frozenset(TIERS)), TIERS)
    assert len(many) == 1_000


class CountedSource:
    """A flag set that counts how often it is asked, and may be away."""

    def __init__(self) -> None:
        self.kept = FlagSet(1, (flag(default_value=True),))
        self.looks = 0
        self.reads = 0
        self.away = False

    async def read_version(self) -> int:
        self.looks += 1
        # As a round trip does: others run meanwhile.
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable("postgres")
        return self.kept.version

    async def read_set(self) -> FlagSet:
        self.reads += 1
        return self.kept


async def test_every_question_looks_and_reads_only_what_changed() -> None:
    """A question never gets an older set than it could have seen; the flags are read only when the version moved."""
    source, tenant = CountedSource(), TenantId(uuid4())
    cache = FlagSetCache(source)
    for _ in range(3):
        assert await cache.enabled(tenant, "free") == {"new_search"}
    assert (source.looks, source.reads) == (3, 1)
    source.kept = FlagSet(2, ())
    assert await cache.enabled(tenant, "free") == frozenset()
    assert (source.looks, source.reads) == (4, 2)


async def test_questions_that_come_together_share_a_look() -> None:
    """A hundred questions at once cost two looks at most: the one under way may have begun before they came, the next one did not."""
    source, tenant = CountedSource(), TenantId(uuid4())
    cache = FlagSetCache(source)
    async with asyncio.TaskGroup() as group:
        for _ in range(100):
            group.create_task(cache.enabled(tenant, "free"))
    assert source.looks <= 2


async def test_a_set_nobody_can_look_at_is_no_answer() -> None:
    """Flags that may have changed meanwhile are not guessed: the question is refused as unavailable."""
    source, tenant = CountedSource(), TenantId(uuid4())
    cache = FlagSetCache(source)
    await cache.enabled(tenant, "free")
    source.away = True
    with pytest.raises(Unavailable):
        await cache.enabled(tenant, "free")


async def test_a_flag_reaches_the_token_of_the_next_calls(harness: Harness) -> None:
    """A new flag is in the token soon, for keys and for operators who name the tenant; a removed one is gone again."""
    created, other = await harness.create(), await harness.create()
    tenant_id = created.tenant.tenant_id
    assert "reaches_token" not in await flags_of(harness, created.api_key)
    await put_flag(harness, "reaches_token", tenants_on=[tenant_id])

    async def is_on() -> bool:
        return "reaches_token" in await flags_of(harness, created.api_key)

    await eventually(is_on, within_seconds=10)
    assert "reaches_token" not in await flags_of(harness, other.api_key)
    operator = await harness.authenticate(str(harness.operator), claimed=UUID(tenant_id).bytes, reason="looking")
    assert "reaches_token" in (await proven(harness, operator.context_token)).flags
    await call(harness.flags.DeleteFlag, pb.DeleteFlagRequest(name="reaches_token"), harness.as_operator())

    async def is_off() -> bool:
        return "reaches_token" not in await flags_of(harness, created.api_key)

    await eventually(is_off, within_seconds=10)


async def test_every_replica_of_the_tenant_service_learns_of_a_flag(postgres: PostgresStore) -> None:
    """A flag kept through one replica is soon in the tokens that another one mints, without a call to either in between."""
    async with running_service(postgres) as harness:
        created = await harness.create()
        replica = await build(harness.settings)
        try:
            await replica.server.start()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{replica.server.bound_port}") as channel:
                other = replace(harness, app=replica, channel=channel)
                assert await flags_of(other, created.api_key) == frozenset()
                await put_flag(harness, "seen_everywhere", tiers_on=["professional"])

                async def is_on() -> bool:
                    return await flags_of(other, created.api_key) == {"seen_everywhere"}

                await eventually(is_on, within_seconds=10)
        finally:
            await replica.server.stop()
            await replica.close()


async def test_an_explanation_tells_value_rule_and_bucket(harness: Harness) -> None:
    """EvaluateFlags names for each flag what decided it; a tenant that is not there is not found."""
    created = await harness.create(plan="starter")
    tenant_id = created.tenant.tenant_id
    await put_flag(harness, "explain_a", tenants_off=[tenant_id.upper()], default_value=True)
    await put_flag(harness, "explain_b", tiers_on=["starter"])
    await put_flag(harness, "explain_c", percentage_basis_points=10_000)
    await put_flag(harness, "explain_d", default_value=True)
    answer = await call(harness.flags.EvaluateFlags, pb.EvaluateFlagsRequest(tenant_id=tenant_id), harness.as_operator())
    found = {one.name: (one.enabled, one.rule) for one in answer.evaluations if one.name.startswith("explain_")}
    assert found == {
        "explain_a": (False, pb.FLAG_RULE_TENANT),
        "explain_b": (True, pb.FLAG_RULE_TIER),
        "explain_c": (True, pb.FLAG_RULE_PERCENTAGE),
        "explain_d": (True, pb.FLAG_RULE_DEFAULT),
    }
    for one in answer.evaluations:
        assert one.bucket == bucket_of(one.name, TenantId(UUID(tenant_id)))
    error = await refusal(call(harness.flags.EvaluateFlags, pb.EvaluateFlagsRequest(tenant_id=str(uuid4())), harness.as_operator()))
    assert (error.code, error.metadata["resource"]) == (grpc.StatusCode.NOT_FOUND, "tenant")


async def test_every_change_of_a_flag_is_kept_audited_and_announced(harness: Harness) -> None:
    """History keeps both sides, the nil tenant's audit log names flag and operator, and every replica is told."""
    announced = "SELECT count(*) FROM tenant.changes WHERE kind = 'FLAGS' AND tenant_id = $1"
    before = await harness.value(announced, NO_TENANT)
    first = await put_flag(harness, "kept_flag", description="one", percentage_basis_points=10)
    second = await put_flag(harness, "kept_flag", description="one", percentage_basis_points=20)
    assert (first.changed, second.changed) == (True, True)
    assert second.flag.version > first.flag.version
    await call(harness.flags.DeleteFlag, pb.DeleteFlagRequest(name="kept_flag"), harness.as_operator())
    async with harness.superuser() as connection:
        kept = await connection.fetch("SELECT * FROM tenant.flag_changes WHERE name = 'kept_flag' ORDER BY version")
    points = [
        [None if side is None else json.loads(side)["percentage_basis_points"] for side in (row["before"], row["after"])] for row in kept
    ]
    assert points == [[None, 10], [10, 20], [20, None]]
    assert {row["subject"] for row in kept} == {f"operator:{harness.operator.key_id}"}
    audited = [*await harness.audit(str(NO_TENANT), "FLAG_CHANGED"), *await harness.audit(str(NO_TENANT), "FLAG_DELETED")]
    assert [record["action"] for record in audited if record["target"] == "flag:kept_flag"] == ["FLAG_CHANGED"] * 2 + ["FLAG_DELETED"]
    assert await harness.value(announced, NO_TENANT) == before + 3


async def test_a_dry_run_and_a_repetition_leave_no_trace(harness: Harness) -> None:
    """validate_only answers the flag as it would be kept, the same flag again changes nothing, another version is refused."""
    tried = await put_flag(harness, "dry_flag", validate_only=True, default_value=True)
    assert (tried.changed, tried.flag.default_value) == (True, True)
    assert await harness.value("SELECT count(*) FROM tenant.flags WHERE name = 'dry_flag'") == 0
    made = await put_flag(harness, "dry_flag", default_value=True)
    again = await put_flag(harness, "dry_flag", default_value=True)
    assert (again.flag, again.changed) == (made.flag, False)
    error = await refusal(put_flag(harness, "dry_flag", expected_version=made.flag.version + 1))
    assert error.reason == error_reason_pb2.ERROR_REASON_WRONG_STATE
    assert (await put_flag(harness, "dry_flag", expected_version=made.flag.version)).changed
    assert await harness.value("SELECT count(*) FROM tenant.flag_changes WHERE name = 'dry_flag'") == 2


@pytest.mark.parametrize(
    "rules",
    [
        {"name": "Upper"},
        {"name": "7up"},
        {"name": "x" * 64},
        {"name": ""},
        {"percentage_basis_points": -1},
        {"percentage_basis_points": 10_001},
        {"tenants_on": ["nobody"]},
        {"tenants_on": [str(NO_TENANT)] * 2},
        {"tenants_off": ["01900000-0000-7000-8000-000000000001"]},
        {"tiers_on": ["golden"]},
        {"tiers_on": ["free"], "tiers_off": ["free"]},
        {"description": "a\nb"},
        {"description": "x" * 501},
    ],
)
async def test_a_flag_that_makes_no_sense_is_refused(harness: Harness, rules: dict[str, Any]) -> None:
    """Malformed names, shares out of range, unknown tenants and tiers, and contradictions are invalid, in a dry run as well."""
    for validate_only in (True, False):
        error = await refusal(put_flag(harness, **{"name": "senseless", **rules}, validate_only=validate_only))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert await harness.value("SELECT count(*) FROM tenant.flags WHERE name = 'senseless'") == 0


async def test_a_flag_lists_only_tenants_that_are(harness: Harness) -> None:
    """Ids that are no tenant's are refused by name, of many the first twenty, in a dry run as well; so is a tenant that was erased."""
    created, gone = await harness.create(), await harness.create()
    wish = tenant_service_pb2.EraseTenantRequest(
        request_id=str(uuid4()), tenant_id=gone.tenant.tenant_id, confirm_slug=gone.tenant.slug, canaries=[]
    )
    await call(harness.tenants.EraseTenant, wish, harness.as_operator())
    absent, many = str(uuid4()), sorted(str(uuid4()) for _ in range(25))
    refused: list[tuple[dict[str, Any], str, list[str]]] = [
        ({"tenants_on": [created.tenant.tenant_id, absent]}, "flag.tenants_on", [absent]),
        ({"tenants_off": [absent], "tenants_on": [created.tenant.tenant_id]}, "flag.tenants_off", [absent]),
        ({"tenants_on": [gone.tenant.tenant_id]}, "flag.tenants_on", [gone.tenant.tenant_id]),
        ({"tenants_on": many}, "flag.tenants_on", many[:20]),
    ]
    for rules, field, named in refused:
        for validate_only in (True, False):
            error = await refusal(put_flag(harness, "for_nobody", validate_only=validate_only, **rules))
            assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, error_reason_pb2.ERROR_REASON_INVALID_REQUEST)
            assert error.metadata == {"field": field, "tenant_ids": ",".join(named)}
            assert all(tenant_id in error.message for tenant_id in named)
    assert error.message.endswith(" and 5 more")
    assert await harness.value("SELECT count(*) FROM tenant.flags WHERE name = 'for_nobody'") == 0
    await put_flag(harness, "for_somebody", tenants_on=[created.tenant.tenant_id])


async def test_only_an_operator_sees_and_keeps_flags(harness: Harness) -> None:
    """A tenant's key is refused at every method, and so is deleting what is not there."""
    created = await harness.create()
    key = with_key(created.api_key)
    for refused in (
        call(harness.flags.PutFlag, pb.PutFlagRequest(flag=pb.Flag(name="stolen")), key),
        call(harness.flags.DeleteFlag, pb.DeleteFlagRequest(name="stolen"), key),
        call(harness.flags.ListFlags, pb.ListFlagsRequest(), key),
        call(harness.flags.EvaluateFlags, pb.EvaluateFlagsRequest(tenant_id=created.tenant.tenant_id), key),
    ):
        assert (await refusal(refused)).code is grpc.StatusCode.PERMISSION_DENIED
    error = await refusal(call(harness.flags.DeleteFlag, pb.DeleteFlagRequest(name="never_was"), harness.as_operator()))
    assert (error.code, error.metadata["resource"]) == (grpc.StatusCode.NOT_FOUND, "flag")


async def test_as_many_flags_as_a_token_can_carry_and_no_more(postgres: PostgresStore) -> None:
    """200 flags, whose names have 4,000 bytes, fit in a token that metadata can carry; one more is refused; pages show them all."""
    async with running_service(postgres) as harness:
        created = await harness.create()
        names = [f"flag_{number:03}_".ljust(MAX_NAME_BYTES // 200, "x") for number in range(200)]
        for name in names:
            await put_flag(harness, name, default_value=True)
        error = await refusal(put_flag(harness, "one_more"))
        assert (error.code, error.metadata["rule"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "flags")
        await call(harness.flags.DeleteFlag, pb.DeleteFlagRequest(name=names[0]), harness.as_operator())
        error = await refusal(put_flag(harness, "x" * 21))
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        await put_flag(harness, names[0], default_value=True)

        async def all_on() -> bool:
            return await flags_of(harness, created.api_key) == set(names)

        await eventually(all_on, within_seconds=10)
        token = (await harness.authenticate(created.api_key)).context_token
        assert len(token) < 8_192
        # The token as metadata of a call: what is too long for a header would be refused here.
        metadata = as_service("inference", token)
        assert (await call(harness.tenants.GetTenantConfig, CONFIG, metadata)).config.tenant_id == created.tenant.tenant_id
        listed, page_token = [], ""
        while True:
            page = await call(harness.flags.ListFlags, pb.ListFlagsRequest(page_size=30, page_token=page_token), harness.as_operator())
            listed += [one.name for one in page.flags]
            if not (page_token := page.next_page_token):
                break
        assert listed == names


async def test_an_erased_tenant_is_taken_out_of_every_flag(harness: Harness) -> None:
    """Erasing counts the flags that listed the tenant and leaves the others in the lists as they were."""
    created, other = await harness.create(), await harness.create()
    both = [created.tenant.tenant_id, other.tenant.tenant_id]
    await put_flag(harness, "lists_tenants_on", tenants_on=both)
    await put_flag(harness, "lists_tenants_off", tenants_off=both)
    metadata = as_service("tenant", (await harness.authenticate(created.api_key)).context_token)
    erased = await call(harness.lifecycle.EraseTenant, lifecycle_service_pb2.EraseTenantRequest(), metadata)
    assert {item.kind: item.count for item in erased.erased}["postgres:tenant.flags"] == 2
    lists = "SELECT tenants_on || tenants_off FROM tenant.flags WHERE name = $1"
    for name in ("lists_tenants_on", "lists_tenants_off"):
        assert await harness.value(lists, name) == [UUID(other.tenant.tenant_id)]
    [record] = await harness.audit(created.tenant.tenant_id, "TENANT_ERASED")
    assert str(record["tenant_id"]) == created.tenant.tenant_id
