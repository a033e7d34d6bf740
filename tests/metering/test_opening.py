"""Opening calls: durable before dispatch, idempotent, and refused without a trace."""

from datetime import timedelta

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.metering.v1 import ledger_service_pb2 as pb
from services.kernel.context_token import SigningKey
from services.kernel.ids import new_uuid7
from tests.metering.mesh import Mesh, bill, not_billed, ref, unknown


async def outcome(mesh: Mesh, call: pb.OpenCall) -> int:
    """How one open goes."""
    (result,) = await mesh.open(call)
    return result.outcome


async def test_an_opened_call_is_a_durable_row_with_a_lease(mesh: Mesh) -> None:
    """An open that was answered OPENED is in the table with everything it said, and has a lease."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    row = await mesh.row(call.ref)
    assert row is not None
    assert (row["state"], row["bound_nano_usd"], row["user_name"], row["open_epoch"]) == (pb.CALL_STATE_OPEN, 5_000_000, "user-1", 0)
    assert await mesh.admin.fetchval("SELECT count(*) FROM metering.call_leases WHERE tenant_id = $1", tenant.id) == 1


async def test_repeated_open_answers_the_same_and_changes_nothing(mesh: Mesh) -> None:
    """The same open again, alone or twice in one batch, is answered OPENED and leaves one row."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    again, and_again = await mesh.open(call, call)
    assert (again.outcome, and_again.outcome) == (pb.OPEN_OUTCOME_OPENED, pb.OPEN_OUTCOME_OPENED)
    assert await mesh.admin.fetchval("SELECT count(*) FROM metering.calls WHERE tenant_id = $1", tenant.id) == 1


async def test_open_of_an_older_epoch_is_refused_without_a_row(mesh: Mesh) -> None:
    """A reservation taken before the limits were rebuilt cannot open a call."""
    tenant = mesh.new_tenant()
    await mesh.begin_epoch(tenant)
    call = mesh.opening(tenant, epoch=0)
    assert await outcome(mesh, call) == pb.OPEN_OUTCOME_STALE_EPOCH
    assert await mesh.state(call.ref) == 0
    assert await outcome(mesh, mesh.opening(tenant, epoch=1)) == pb.OPEN_OUTCOME_OPENED


async def test_open_that_was_recorded_is_repeated_even_after_the_epoch_rose(mesh: Mesh) -> None:
    """A call that is open stays opened: the snapshot of the new epoch counted it."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    await mesh.begin_epoch(tenant)
    assert await outcome(mesh, call) == pb.OPEN_OUTCOME_OPENED


async def test_an_open_repeated_after_its_lease_lapsed_is_answered_as_before(mesh: Mesh) -> None:
    """A call that became unresolved meanwhile is still opened: a refusal would make its holder let go of a hold that is counted on."""
    tenant = mesh.new_tenant()
    call = await mesh.opened(tenant)
    await mesh.void(unknown(call.ref))
    [result] = await mesh.open(call)
    assert (result.outcome, result.state) == (pb.OPEN_OUTCOME_OPENED, pb.CALL_STATE_UNRESOLVED)
    other = mesh.opening(tenant)
    other.ref.CopyFrom(call.ref)
    assert await outcome(mesh, other) == pb.OPEN_OUTCOME_ENDED


async def test_ended_calls_cannot_be_opened_again(mesh: Mesh) -> None:
    """After void, settled or a tombstone, an open is answered ENDED with the state."""
    tenant = mesh.new_tenant()
    voided, settled = [await mesh.opened(tenant) for _ in range(2)]
    buried = mesh.opening(tenant)
    await mesh.void(not_billed(voided.ref), not_billed(buried.ref))
    await mesh.settle(bill(settled.ref))
    results = await mesh.open(voided, settled, buried)
    assert {result.outcome for result in results} == {pb.OPEN_OUTCOME_ENDED}
    assert [result.state for result in results] == [
        pb.CALL_STATE_VOID,
        pb.CALL_STATE_SETTLED,
        pb.CALL_STATE_VOID,
    ]


async def test_call_id_of_a_live_call_cannot_be_used_by_another_reservation(mesh: Mesh) -> None:
    """One call id and attempt belong to one reservation while it is not void; another attempt number is another thing."""
    tenant = mesh.new_tenant()
    first = await mesh.opened(tenant)
    second = mesh.opening(tenant, call_id=first.call_id)
    assert await outcome(mesh, second) == pb.OPEN_OUTCOME_CALL_ID_TAKEN
    assert await mesh.state(second.ref) == 0
    assert await outcome(mesh, mesh.opening(tenant, call_id=first.call_id, attempt=2)) == pb.OPEN_OUTCOME_OPENED
    await mesh.settle(bill(first.ref))
    assert await outcome(mesh, second) == pb.OPEN_OUTCOME_CALL_ID_TAKEN


async def test_call_id_of_a_voided_call_may_be_used_again(mesh: Mesh) -> None:
    """A caller whose call was not billed may try again under the same id."""
    tenant = mesh.new_tenant()
    first = await mesh.opened(tenant)
    await mesh.void(not_billed(first.ref))
    assert await outcome(mesh, mesh.opening(tenant, call_id=first.call_id)) == pb.OPEN_OUTCOME_OPENED


async def test_same_call_id_of_two_tenants_is_two_calls(mesh: Mesh) -> None:
    """Ids of one tenant mean nothing to another, reservation and call id alike."""
    one, other = mesh.new_tenant(), mesh.new_tenant()
    reservation, call_id = new_uuid7(), new_uuid7().bytes
    results = await mesh.open(mesh.opening(one, reservation, call_id=call_id), mesh.opening(other, reservation, call_id=call_id))
    assert [result.outcome for result in results] == [pb.OPEN_OUTCOME_OPENED] * 2


async def test_reservation_opened_with_other_content_is_refused(mesh: Mesh) -> None:
    """A reservation that is open for one call cannot be reused for another, and the first stays as it was."""
    tenant = mesh.new_tenant()
    first = await mesh.opened(tenant)
    other = pb.OpenCall()
    other.CopyFrom(first)
    other.bound_nano_usd += 1
    assert await outcome(mesh, other) == pb.OPEN_OUTCOME_CALL_ID_TAKEN
    row = await mesh.row(first.ref)
    assert row is not None
    assert row["bound_nano_usd"] == first.bound_nano_usd


async def test_unpriced_model_or_version_is_refused_without_a_row(mesh: Mesh) -> None:
    """A call nobody could bill is not opened."""
    tenant = mesh.new_tenant()
    calls = [mesh.opening(tenant, model="gpt-9"), mesh.opening(tenant, price_version="1999-01"), mesh.opening(tenant, provider="acme")]
    results = await mesh.open(*calls)
    assert {result.outcome for result in results} == {pb.OPEN_OUTCOME_PRICE_MISSING}
    assert [await mesh.state(call.ref) for call in calls] == [0, 0, 0]


async def test_each_item_must_prove_its_own_tenant(mesh: Mesh) -> None:
    """Another tenant's token, a forged one, an expired one and none at all prove nothing; the proven item beside them is opened."""
    tenant, other = mesh.new_tenant(), mesh.new_tenant()
    forged = mesh.peers.tenants.token(tenant.id, key=SigningKey("test-key", Ed25519PrivateKey.generate()))
    expired = mesh.peers.tenants.token(tenant.id, lifetime=timedelta(microseconds=1))
    wrong = [mesh.opening(tenant, context_token=token) for token in (other.context.token, forged, expired, "", "a.b")]
    *refused, fine = await mesh.open(*wrong, mesh.opening(tenant))
    assert {result.outcome for result in refused} == {pb.OPEN_OUTCOME_TENANT_NOT_PROVEN}
    assert fine.outcome == pb.OPEN_OUTCOME_OPENED
    assert [await mesh.state(call.ref) for call in wrong] == [0] * 5


async def test_one_batch_answers_each_item_in_its_place(mesh: Mesh) -> None:
    """Items of many tenants in any order get their own answers, in the order they were sent."""
    tenants = [mesh.new_tenant() for _ in range(5)]
    calls = [mesh.opening(tenants[(7 * index) % 5], model="gpt-9" if index % 3 == 0 else "claude-sonnet-4-6") for index in range(40)]
    results = await mesh.open(*calls)
    expected = [pb.OPEN_OUTCOME_PRICE_MISSING if index % 3 == 0 else pb.OPEN_OUTCOME_OPENED for index in range(40)]
    assert [result.outcome for result in results] == expected
    assert [await mesh.state(call.ref) for call in calls] == [0 if index % 3 == 0 else 1 for index in range(40)]


async def test_unknown_reservation_has_no_row(mesh: Mesh) -> None:
    """Nothing is recorded for a call nobody spoke of."""
    assert await mesh.state(ref(mesh.new_tenant())) == 0
