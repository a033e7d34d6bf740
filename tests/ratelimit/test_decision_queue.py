"""Demands of one tenant that come close together: who is decided with whom, and what one that leaves or fails does to the others."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from services.kernel.errors import Unavailable
from services.kernel.ids import ReservationId, TenantId, new_uuid7
from services.ratelimit.adapters.decision_queue import DecisionQueue
from services.ratelimit.adapters.redis_store import RedisStore
from services.ratelimit.adapters.tenant_scripts import TenantScripts
from services.ratelimit.limits import Demand, Subject
from services.ratelimit.request import Ask
from services.ratelimit.standing import Answer, Verdict
from services.ratelimit.terms import Terms

TERMS = Terms(())
PLAN = TERMS.plan(Subject())


class Store:
    """Decides when it is let, and remembers what it was asked at once: each demand's attempt names it."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.may_answer = asyncio.Event()
        self.fails = False

    async def decide(self, tenant_id: TenantId, terms: Terms, asks: Sequence[Ask]) -> list[Answer]:
        """Answers each demand with its own number."""
        self.asked.append([ask.demand.attempt for ask in asks])
        await self.may_answer.wait()
        if self.fails:
            raise Unavailable("redis")
        return [Answer(Verdict.HELD, epoch=ask.demand.attempt) for ask in asks]


def ask(number: int) -> Ask:
    """A demand that can be told from others."""
    return Ask(ReservationId(new_uuid7()), 0, PLAN, Demand(attempt=number))


async def turns(count: int = 5) -> None:
    """Lets everything run that can."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_those_who_come_in_one_turn_are_decided_together_in_their_order() -> None:
    """One script call decides them, the first of them first; each gets its own answer."""
    store, tenant_id = Store(), TenantId(new_uuid7())
    queue = DecisionQueue(store.decide)
    store.may_answer.set()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(queue.submit(tenant_id, TERMS, ask(number))) for number in (1, 2, 3)]
    assert [task.result().epoch for task in tasks] == [1, 2, 3]
    assert store.asked == [[1, 2, 3]]


async def test_what_comes_meanwhile_makes_the_next_call_and_other_tenants_wait_for_nobody() -> None:
    """A tenant's second call holds all who came while the first was under way."""
    store, tenant_id = Store(), TenantId(new_uuid7())
    queue = DecisionQueue(store.decide)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(queue.submit(tenant_id, TERMS, ask(1)))
        await turns()
        others = [group.create_task(queue.submit(tenant_id, TERMS, ask(number))) for number in (2, 3)]
        elsewhere = group.create_task(queue.submit(TenantId(new_uuid7()), TERMS, ask(4)))
        await turns()
        assert store.asked == [[1], [4]]
        store.may_answer.set()
    assert [task.result().epoch for task in (first, *others, elsewhere)] == [1, 2, 3, 4]
    assert store.asked == [[1], [4], [2, 3]]


@pytest.mark.parametrize("together", [True, False], ids=["came in its turn", "came while it was decided"])
async def test_a_first_caller_that_leaves_takes_nobody_along(*, together: bool) -> None:
    """Whether its demand was under way or not, those behind it are decided, and so is who comes later."""
    store, tenant_id = Store(), TenantId(new_uuid7())
    queue = DecisionQueue(store.decide)
    first = asyncio.get_running_loop().create_task(queue.submit(tenant_id, TERMS, ask(1)))
    await turns(1 if together else 5)
    second = asyncio.get_running_loop().create_task(queue.submit(tenant_id, TERMS, ask(2)))
    await turns(0 if together else 5)
    first.cancel()
    store.may_answer.set()
    assert (await asyncio.wait_for(second, 5)).epoch == 2
    assert first.cancelled()
    assert (await asyncio.wait_for(queue.submit(tenant_id, TERMS, ask(3)), 5)).epoch == 3


async def test_a_failed_decision_fails_those_it_was_for_and_no_later_one() -> None:
    """Everyone who was asked for in the call hears of it; the next call is made all the same."""
    store, tenant_id = Store(), TenantId(new_uuid7())
    queue = DecisionQueue(store.decide)
    store.may_answer.set()
    store.fails = True
    for count in (1, 3):
        tasks = [asyncio.get_running_loop().create_task(queue.submit(tenant_id, TERMS, ask(number))) for number in range(count)]
        await asyncio.wait(tasks)
        assert all(isinstance(task.exception(), Unavailable) for task in tasks)
    store.fails = False
    assert (await queue.submit(tenant_id, TERMS, ask(1))).epoch == 1


class SentError(Exception):
    """A command reached the link."""


class Reached:
    """A link that tells when it is asked, by failing."""

    async def send(self, *command: str | bytes | int) -> object:
        """Raises."""
        raise SentError

    async def scan(self, pattern: str, cursor: object) -> tuple[object, list[bytes]]:
        """Finds nothing."""
        return None, []

    async def close(self) -> None:
        """Nothing is open."""


def test_what_came_with_others_in_one_message_waits_for_no_more() -> None:
    """A lone demand lets those in that have arrived with it; one of a batch is sent at once."""
    store = RedisStore(TenantScripts(Reached(), Reached()))
    alone = store.reserve(TenantId(new_uuid7()), TERMS, [ask(1)])
    alone.send(None)
    alone.close()
    with pytest.raises(SentError):
        store.reserve(TenantId(new_uuid7()), TERMS, [replace(ask(1), gathered=True)]).send(None)
