"""What the ledger's decisions do to holds, at the store."""

from collections.abc import Callable

from structlog.testing import capture_logs

from services.kernel.ids import ReservationId, new_uuid7
from services.ratelimit.adapters.tenant_scripts import KINDS
from services.ratelimit.fencing import FenceVerdict
from services.ratelimit.limits import Amounts
from services.ratelimit.rebuild import Begin, CountedCall, CountedState
from services.ratelimit.settlement import CommitKind, Settlement
from services.ratelimit.standing import Verdict
from tests.ratelimit.callers import AtStore

MakeTenant = Callable[..., AtStore]


async def test_a_commit_counts_what_was_used_once(at_store: MakeTenant) -> None:
    """A repeated commit, with whatever figures, changes nothing."""
    tenant = await at_store().loaded()
    reservation_id = await tenant.held(100, 1000)
    assert await tenant.commit(reservation_id, tokens=40, cost=400)
    before = await tenant.dump()
    for tokens in (40, 41, 0):
        assert await tenant.commit(reservation_id, tokens=tokens, cost=400)
    assert await tenant.commit(reservation_id, CommitKind.VOID)
    assert await tenant.commit(reservation_id, CommitKind.PIN)
    assert await tenant.dump() == before
    assert await tenant.used() == (1, 40, 40, 400, 0)


async def test_more_than_was_held_is_charged_in_full_and_reported(at_store: MakeTenant) -> None:
    """Actual use above the hold is counted whole, even past the limit; nothing is left, and the next call is refused."""
    tenant = await at_store(tokens_per_day=100).loaded()
    reservation_id = await tenant.held(90)
    with capture_logs() as logs:
        assert await tenant.commit(reservation_id, tokens=150)
    assert [line["event"] for line in logs if line.get("tenant_id") == str(tenant.tenant_id)] == ["actual_exceeds_hold"]
    assert (await tenant.used())[2] == 150
    assert (await tenant.reserve(1))[1].verdict is Verdict.REFUSED


async def test_a_void_call_keeps_its_request_and_gives_back_the_rest(at_store: MakeTenant) -> None:
    """An unbilled call counts as a request of the last minute and as nothing else."""
    tenant = await at_store().loaded()
    await tenant.commit(await tenant.held(100, 1000), CommitKind.VOID)
    assert await tenant.used() == (1, 0, 0, 0, 0)


async def test_a_commit_after_a_release_changes_nothing(at_store: MakeTenant) -> None:
    """A hold that was given back cannot be charged: the ledger had voided it."""
    tenant = await at_store().loaded()
    reservation_id = await tenant.held(100, 1000)
    await tenant.store.release(tenant.tenant_id, reservation_id, tenant.epoch)
    assert await tenant.used() == (0, 0, 0, 0, 0)
    before = await tenant.dump()
    assert await tenant.commit(reservation_id, CommitKind.VOID)
    assert await tenant.commit(reservation_id, tokens=100, cost=1000)
    assert await tenant.dump() == before


async def test_a_pinned_call_keeps_its_hold_and_frees_its_slot(at_store: MakeTenant) -> None:
    """A call whose bill is unknown stays at its bound without a lease until the ledger knows."""
    tenant = await at_store(concurrent_calls=1).loaded()
    reservation_id = await tenant.held(100, 1000)
    assert await tenant.commit(reservation_id, CommitKind.PIN)
    assert await tenant.used() == (1, 100, 100, 1000, 0)
    assert await tenant.store.renew([(tenant.tenant_id, reservation_id)]) == [False]
    await tenant.store.release(tenant.tenant_id, reservation_id, tenant.epoch)
    assert (await tenant.used())[3] == 1000
    assert await tenant.commit(reservation_id, tokens=60, cost=600)
    assert await tenant.used() == (1, 60, 60, 600, 0)


async def test_a_commit_of_an_older_epoch_is_counted_already(at_store: MakeTenant) -> None:
    """The snapshot that began the epoch counted it: it is done, and nothing changes."""
    tenant = at_store()
    tenant.epoch = 5
    await tenant.loaded()
    reservation_id = await tenant.held(10)
    before = await tenant.dump()
    for kind in CommitKind:
        assert await tenant.commit(reservation_id, kind, tokens=3, epoch=4)
    assert await tenant.dump() == before


async def test_a_commit_of_a_newer_epoch_makes_the_limits_start_over(at_store: MakeTenant) -> None:
    """The ledger has moved on by a rebuild that was never loaded: all counters go, and the next caller rebuilds."""
    tenant = await at_store().loaded()
    await tenant.held(10)
    other = ReservationId(new_uuid7())
    assert await tenant.commit(other, tokens=3, epoch=2)
    assert set(await tenant.dump()) == {None}
    assert (await tenant.reserve(1))[1].verdict is Verdict.REBUILD


async def test_a_commit_waits_while_a_snapshot_may_be_on_its_way(at_store: MakeTenant) -> None:
    """Snapshot taken, then the call settled, then its commit, then the load: the commit waits and is counted after the load."""
    tenant = await at_store().loaded()
    reservation_id = await tenant.held(100, 1000)
    held_then = CountedCall(reservation_id, CountedState.HELD, (reservation_id.int >> 80) * 1000, 100, 1000)
    await tenant.link.send("DEL", *(f"{{{tenant.tenant_id}}}:{kind}" for kind in KINDS))
    assert await tenant.begin("first") is Begin.BEGUN
    # Settled in epoch 2, after the snapshot that began it.
    assert not await tenant.commit(reservation_id, tokens=40, cost=400, epoch=2)
    assert await tenant.load("first", 2, held_then)
    assert await tenant.commit(reservation_id, tokens=40, cost=400, epoch=2)
    assert (await tenant.used())[1:] == (40, 40, 400, 0)


async def test_a_commit_without_counters_and_without_a_pending_snapshot_is_done(at_store: MakeTenant) -> None:
    """Whatever is loaded later was asked for later, so it counts the settlement: the outbox need not keep it."""
    tenant = at_store()
    assert await tenant.commit(ReservationId(new_uuid7()), tokens=40)
    assert set(await tenant.dump()) == {None}


async def test_a_pending_snapshot_dies_with_its_nonce(at_store: MakeTenant) -> None:
    """A nonce that is never answered does not keep commits waiting for ever, and its snapshot cannot load afterwards."""
    tenant = at_store()
    await tenant.begin("first")
    life = await tenant.link.send("PTTL", f"{{{tenant.tenant_id}}}:meta")
    assert isinstance(life, int)
    assert 0 < life <= 10_000
    await tenant.link.send("DEL", f"{{{tenant.tenant_id}}}:meta")
    assert await tenant.commit(ReservationId(new_uuid7()), tokens=40)
    assert not await tenant.load("first", 1)


async def test_what_an_expired_epoch_left_behind_does_not_count(at_store: MakeTenant) -> None:
    """When only the epoch is gone, everything else goes as the snapshot loads: counters are the snapshot's alone."""
    tenant = await at_store().loaded()
    reservation_id = await tenant.held(10, 10)
    await tenant.link.send("DEL", f"{{{tenant.tenant_id}}}:meta")
    assert (await tenant.reserve(1))[1].verdict is Verdict.REBUILD
    assert await tenant.store.renew([(tenant.tenant_id, reservation_id)]) == [False]
    tenant.epoch = 2
    await tenant.loaded()
    assert await tenant.used() == (0, 0, 0, 0, 0)
    assert await tenant.state(reservation_id) is None


async def test_a_batch_over_tenants_is_answered_item_by_item(at_store: MakeTenant) -> None:
    """One tenant's missing counters hold up nobody else's commits."""
    ready, waiting = await at_store().loaded(), at_store()
    await waiting.begin("pending")
    ids = [await ready.held(2) for _ in range(120)]
    items = [Settlement(ready.tenant_id, reservation_id, 1, CommitKind.SETTLED, Amounts(1, 0)) for reservation_id in ids]
    items.insert(60, Settlement(waiting.tenant_id, ids[0], 1, CommitKind.SETTLED, Amounts(1, 0)))
    done = await ready.store.commit(items)
    assert [place for place, item in enumerate(done) if not item] == [60]
    assert (await ready.used())[1] == 120


async def test_release_counts_only_in_its_own_epoch(at_store: MakeTenant) -> None:
    """A release that was sent before a rebuild lets nothing go."""
    tenant = await at_store().loaded()
    reservation_id = await tenant.held(10)
    for epoch in (0, 2):
        await tenant.store.release(tenant.tenant_id, reservation_id, epoch)
    assert await tenant.state(reservation_id) == "held"


async def test_renewal_prolongs_live_leases_and_names_lost_ones(at_store: MakeTenant) -> None:
    """Ended leases stay ended, unknown ones are lost, live ones go on."""
    tenant, other = await at_store().loaded(), await at_store().loaded()
    alive, lapsed, foreign = await tenant.held(), await tenant.held(), await other.held()
    await tenant.end_lease(lapsed)
    asked = [(tenant.tenant_id, alive), (tenant.tenant_id, lapsed), (tenant.tenant_id, foreign), (other.tenant_id, foreign)]
    assert await tenant.store.renew(asked) == [True, False, False, True]
    assert (await tenant.used())[4] == 1


async def test_an_ended_lease_frees_the_slot_and_keeps_the_hold(at_store: MakeTenant) -> None:
    """Time alone gives back the slot, never the tokens or the money."""
    tenant = await at_store(concurrent_calls=1).loaded()
    reservation_id = await tenant.held(50, 500)
    assert (await tenant.reserve())[1].verdict is Verdict.REFUSED
    await tenant.end_lease(reservation_id)
    await tenant.held()
    assert (await tenant.used())[1:4] == (50, 50, 500)


async def test_a_fence_answer_moves_only_holds_of_its_epoch(at_store: MakeTenant) -> None:
    """VOID and SETTLED_BEFORE release, UNRESOLVED pins, SETTLED waits; late answers change nothing."""
    tenant = await at_store().loaded()
    ids = {verdict: await tenant.held(10) for verdict in FenceVerdict}
    answers = [(reservation_id, verdict) for verdict, reservation_id in ids.items()]
    assert await tenant.store.apply_fences([(tenant.tenant_id, 2, answers)]) == [0]
    assert await tenant.store.apply_fences([(tenant.tenant_id, 1, answers)]) == [3]
    states = {verdict: await tenant.state(reservation_id) for verdict, reservation_id in ids.items()}
    assert states == {
        FenceVerdict.VOID: "released",
        FenceVerdict.SETTLED_BEFORE: "released",
        FenceVerdict.UNRESOLVED: "pinned",
        FenceVerdict.SETTLED: "held",
    }
    assert (await tenant.used())[1] == 20
    assert await tenant.store.apply_fences([(tenant.tenant_id, 1, answers)]) == [0]
