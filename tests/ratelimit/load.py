"""Callers of a running service: they reserve, extend, consume, settle, let go, die and repeat, and write down what they are told."""

import asyncio
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.common.v1 import limit_rule_pb2 as rules
from mesh.metering.v1 import ledger_service_pb2 as ledger
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.errors import MeshError
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.rpc.wire_status import decode
from services.kernel.tenant_context import TenantContext
from services.ratelimit.calendar_periods import microseconds
from services.ratelimit.limits import NOBODY, Amounts, Demand, Subject
from services.ratelimit.terms import Terms
from tests.ratelimit.callers import now_us
from tests.ratelimit.decision_log import Asked, DecisionLog, Raise, Told
from tests.ratelimit.limiters import Limiters
from tests.ratelimit.outbox import Outbox
from tests.ratelimit.scripted_peer import LedgerCall, Peer, ScriptedTenants

TRY_SECONDS = 5.0
_MOST_TRIES = 8
# Longer than all tries of one call.
_LONGEST_USE = timedelta(seconds=90)
_REFUSED = ("PLAN_LIMIT", "BURST_LIMIT", "BUDGET", "CONCURRENCY", "RETRY_BUDGET")
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


@dataclass
class LoadedTenant:
    """One tenant, its rules, and whom of it calls serve."""

    tenants: ScriptedTenants
    tenant_id: TenantId
    told: rules.LimitRules
    terms: Terms
    subjects: list[Subject]
    units: list[str]
    _context: TenantContext | None = None

    @property
    def context(self) -> TenantContext:
        """A context that is proven for some while yet: a long load outlives one."""
        if self._context is None or self._context.expire_time < datetime.now(UTC) + _LONGEST_USE:
            self._context = self.tenants.context(self.tenant_id, self.told)
        return self._context


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of a call. `response`: None where it was refused or given up. `is_first`: the first try was answered."""

    response: Any
    is_first: bool
    since_us: int


@dataclass
class Load:
    """Makes decisions until there are `decision_count` of them."""

    limiters: Limiters
    peer: Peer
    tenants: list[LoadedTenant]
    decision_count: int
    random: random.Random
    log: DecisionLog = field(default_factory=DecisionLog)
    outbox: Outbox = field(init=False)

    def __post_init__(self) -> None:
        self.outbox = Outbox(self.limiters, self.peer.ledger)

    async def run(self, callers: int) -> None:
        """Runs so many callers at the same time; returns when all they held has ended or was left behind on purpose."""
        async with asyncio.TaskGroup() as background:
            background.create_task(self.outbox.run())
            async with asyncio.TaskGroup() as self._lives:
                for _ in range(callers):
                    self._lives.create_task(self._call_on())
            await self.outbox.empty()

    async def _call_on(self) -> None:
        while self.log.decision_count < self.decision_count:
            tenant, dice = self.random.choice(self.tenants), self.random.random()
            if dice < 0.12 and tenant.units:
                await self._consume(tenant)
            elif dice < 0.55:
                await self._reserve(tenant)
            else:
                await self._reserve_many(tenant)

    def _asked(self, tenant: LoadedTenant, demand: Demand, product_unit: str = "") -> Asked:
        # The callers' clocks are wrong by up to 40 s either way.
        minted = datetime.now(UTC) + timedelta(seconds=self.random.uniform(-40, 40))
        asked = Asked(new_uuid7(minted), tenant.tenant_id, self.random.choice(tenant.subjects), demand, product_unit)
        self.log.asked[asked.id] = asked
        return asked

    def _call(self, tenant: LoadedTenant) -> Asked:
        amounts = Amounts(self.random.choice((0, 1, 10, 50, 200)), self.random.randint(0, 5000))
        return self._asked(tenant, Demand(amounts, attempt=2 if self.random.random() < 0.1 else 1))

    async def _reserve(self, tenant: LoadedTenant) -> None:
        asked = self._call(tenant)
        request = _request(asked)
        copies, sent_us = 2 if self.random.random() < 0.05 else 1, now_us()
        async with asyncio.TaskGroup() as group:
            # A caller that hedges sends the same id to two replicas at once: both answers must be the one hold.
            tries = [group.create_task(self._tried("Reserve", request, asked, tenant)) for _ in range(copies)]
        for tried in tries:
            answer = tried.result()
            if copies > 1:
                # The later of the two prolonged what the earlier one held.
                asked.renewals.append((sent_us, now_us(), False))
            if answer.response is not None:
                self._held(asked, answer.response, sent_us, has_figures=answer.is_first and copies == 1)
        if any(tried.result().response is not None for tried in tries):
            self._live(asked, tenant)

    async def _reserve_many(self, tenant: LoadedTenant) -> None:
        # Half of the batches are of one tenant, half of several, whose items lie between each other's.
        among = self.tenants if self.random.random() < 0.5 else [tenant]
        owners = [self.random.choice(among) for _ in range(self.random.randint(8, 40))]
        every = [self._call(owner) for owner in owners]
        items = [
            messages.ReserveBatchItem(context_token=owner.context.token, request=_request(asked))
            for owner, asked in zip(owners, every, strict=True)
        ]
        tried = await self._tried("ReserveBatch", messages.ReserveBatchRequest(items=items), None, None)
        for asked in () if tried.is_first else every:
            asked.renewals.append((tried.since_us, now_us(), False))
        for owner, asked, outcome in zip(owners, every, tried.response.outcomes if tried.response is not None else (), strict=False):
            match outcome.WhichOneof("outcome"):
                case "held":
                    self._held(asked, outcome.held, tried.since_us, has_figures=tried.is_first)
                    self._live(asked, owner)
                case "refused":
                    refused, status = outcome.refused, outcome.refused.status
                    self._refused(asked, status.rule, status.used, refused.decide_time, refused.reason, tried.since_us)
                case _:
                    self.log.note(decode(outcome.error_status).reason_name)

    async def _consume(self, tenant: LoadedTenant) -> None:
        unit = self.random.choice(tenant.units)
        asked = self._asked(tenant, Demand(attempt=0, quantity=self.random.choice((1, 1, 2, 5))), unit)
        request = messages.ConsumeRequest(
            consumption_id=str(asked.id),
            product_unit=unit,
            quantity=asked.demand.quantity,
            user=asked.subject.user,
            feature=asked.subject.feature,
        )
        tried = await self._tried("Consume", request, asked, tenant)
        asked.renewals.append((tried.since_us, now_us(), False))
        if tried.response is not None:
            self.log.decision_count += 1
            figures = {status.rule: status.used for status in tried.response.limits} if tried.is_first else {}
            decide_us = tried.response.decide_time.ToMicroseconds()
            self.log.date(asked, decide_us, tried.since_us, now_us())
            self.log.held.append(Told(asked, decide_us, figures=figures))
        # Whatever the caller was told: what the ledger has, its outbox tells.
        self.outbox.look(asked)

    def _held(self, asked: Asked, response: messages.ReserveResponse, since_us: int, *, has_figures: bool) -> None:
        self.log.decision_count += 1
        reserve_us = response.reserve_time.ToMicroseconds()
        self.log.date(asked, reserve_us, since_us, now_us())
        if asked.reserve_us not in (0, reserve_us):
            self.log.second_holds.append(f"{asked.id}: held at {asked.reserve_us} and at {reserve_us}")
        asked.reserve_us = reserve_us
        figures = {status.rule: status.used for status in response.limits} if has_figures else {}
        self.log.held.append(Told(asked, reserve_us, figures=figures))

    def _refused(
        self, asked: Asked, rule: str, used: int, time: Timestamp, reason: str, since_us: int, more: Amounts | None = None
    ) -> None:
        if reason not in _REFUSED:
            self.log.note(reason)
            return
        self.log.decision_count += 1
        self.log.date(asked, time.ToMicroseconds(), since_us, now_us())
        self.log.refused.append(Told(asked, time.ToMicroseconds(), rule, used, more=more))

    def _live(self, asked: Asked, tenant: LoadedTenant) -> None:
        self._lives.create_task(self._life(asked, tenant))

    async def _life(self, asked: Asked, tenant: LoadedTenant) -> None:
        """What a call does after it is held."""
        amounts, dice = asked.demand.amounts, self.random.random()
        if dice < 0.1:
            asked.let_go = True
            request = messages.ReleaseRequest(reservation_id=str(asked.id), epoch=1)
            await self._tried("Release", request, None, tenant)
            return
        call = LedgerCall(ledger.CALL_STATE_OPEN, asked.reserve_us, amounts.tokens, amounts.cost_nano_usd, epoch=1)
        if dice > 0.04 + 0.1:
            # A fence may have voided it meanwhile, as in the ledger.
            self.peer.ledger.of(asked.tenant_id).calls.setdefault(asked.id.bytes, call)
        await asyncio.sleep(self.random.expovariate(1 / 0.08))
        if self.random.random() < 0.3:
            amounts = await self._extend(asked, tenant, amounts)
        if dice < 0.18:
            # It dies here: before it was opened, or after.
            self.outbox.left_behind.append(asked)
            return
        share = self.random.choice((0.0, 0.3, 1.0, 1.0, 1.3))
        actual = Amounts(int(amounts.tokens * share), int(amounts.cost_nano_usd * share))
        self.outbox.end(asked, actual if self.random.random() < 0.9 else None)

    async def _extend(self, asked: Asked, tenant: LoadedTenant, held: Amounts) -> Amounts:
        whole = Amounts(held.tokens + self.random.randint(0, 100), held.cost_nano_usd + self.random.randint(0, 2000))
        request = messages.ExtendRequest(
            reservation_id=str(asked.id), epoch=1, amounts=messages.Amounts(tokens=whole.tokens, cost_nano_usd=whole.cost_nano_usd)
        )
        more = Amounts(whole.tokens - held.tokens, whole.cost_nano_usd - held.cost_nano_usd)
        tried = await self._tried("Extend", request, asked, tenant, more)
        if tried.response is None and tried.is_first:
            return held
        raised = Raise(whole, tried.since_us, None)
        if tried.response is not None:
            self.log.decision_count += 1
            raised.to_us = tried.response.decide_time.ToMicroseconds()
            self.log.date(asked, raised.to_us, tried.since_us, now_us())
            raised.from_us = raised.to_us if tried.is_first else raised.from_us
        asked.raises.append(raised)
        return whole if tried.response is not None else held

    async def _tried(
        self, method: str, request: Any, asked: Asked | None, tenant: LoadedTenant | None, more: Amounts | None = None
    ) -> Tried:
        """Calls until it is answered."""
        since_us = now_us()
        for number in range(_MOST_TRIES):
            limiter = self.limiters.any()
            sent_us = now_us()
            try:
                call = getattr(limiter.as_inference, method)
                context = tenant.context if tenant else None
                response = await limiter.inference.unary(call, request, timeout_seconds=TRY_SECONDS, tenant=context)
            except MeshError as error:
                if asked is not None:
                    asked.renewals.append((sent_us, now_us(), False))
                if error.code in _PASSING:
                    self.log.unknown_count += 1
                    self.log.note(error.reason_name)
                    await asyncio.sleep(0.02)
                    continue
                if asked is not None and error.reason_name in _REFUSED:
                    used = int(error.metadata["used"])
                    self._refused(asked, error.metadata["rule"], used, _time(error), error.reason_name, since_us, more)
                else:
                    self.log.note(error.reason_name)
                # What an earlier try asked for may still be on its way to the store, from a process that was killed.
                return Tried(None, number == 0, since_us)
            if asked is not None and number:
                asked.renewals.append((sent_us, now_us(), False))
            return Tried(response, number == 0, since_us)
        return Tried(None, is_first=False, since_us=since_us)


def _request(asked: Asked) -> messages.ReserveRequest:
    amounts = asked.demand.amounts
    return messages.ReserveRequest(
        reservation_id=str(asked.id),
        amounts=messages.Amounts(tokens=amounts.tokens, cost_nano_usd=amounts.cost_nano_usd),
        user=asked.subject.user,
        feature=asked.subject.feature,
        attempt=asked.demand.attempt,
    )


def _time(error: MeshError) -> Timestamp:
    time = Timestamp()
    time.FromMicroseconds(microseconds(datetime.fromisoformat(error.metadata["decide_time"])))
    return time


EVERYBODY = [NOBODY] + [Subject(user, feature) for user in ("ada", "bob", "cleo") for feature in ("", "chat", "search")]
