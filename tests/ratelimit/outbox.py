"""Metering's part of a load: what the ledger decides of calls and units, told to the limits until they say that it is done."""

import asyncio
from uuid import UUID

from mesh.metering.v1 import ledger_service_pb2 as ledger
from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.errors import MeshError
from services.ratelimit.limits import Amounts
from tests.ratelimit.decision_log import Asked
from tests.ratelimit.limiters import Limiters
from tests.ratelimit.scripted_peer import ScriptedLedger

_BATCH = 200


class Outbox:
    """Commits that wait, and what dead callers left behind."""

    def __init__(self, limiters: Limiters, kept: ScriptedLedger) -> None:
        self._limiters = limiters
        self._ledger = kept
        self._waiting: list[messages.Commit] = []
        self._units: list[Asked] = []
        self.left_behind: list[Asked] = []
        self._filled = asyncio.Event()
        self.closed = False

    def end(self, asked: Asked, actual: Amounts | None) -> None:
        """A call ended: billed what was used, or not billed (None)."""
        call = self._ledger.of(asked.tenant_id).calls.get(asked.id.bytes)
        if call is None or call.state not in (ledger.CALL_STATE_OPEN, ledger.CALL_STATE_UNRESOLVED):
            # A fence was faster, and what it said stands.
            return
        call.state = ledger.CALL_STATE_VOID if actual is None else ledger.CALL_STATE_SETTLED
        call.tokens, call.cost = (actual.tokens, actual.cost_nano_usd) if actual else (0, 0)
        self._put(asked)

    def look(self, asked: Asked) -> None:
        """Tells of a use of units as soon as the ledger has it."""
        self._units.append(asked)
        self._filled.set()

    def resolve(self) -> None:
        """The dead callers' calls that were opened are settled in the end, at what they held."""
        for asked in self.left_behind:
            call = self._ledger.of(asked.tenant_id).calls.get(asked.id.bytes)
            if call is not None and call.state in (ledger.CALL_STATE_OPEN, ledger.CALL_STATE_UNRESOLVED):
                self.end(asked, Amounts(call.tokens, call.cost))
        self.left_behind.clear()
        # A use whose caller gave up may have reached the ledger later.
        for tenant_id, tenant in self._ledger.tenants.items():
            for id, call in tenant.calls.items():
                if call.product_unit and call.state == ledger.CALL_STATE_SETTLED:
                    self._waiting.append(self._commit(tenant_id, id))

    async def run(self) -> None:
        """Delivers until closed."""
        while not self.closed:
            await self._filled.wait()
            await asyncio.sleep(0.02)
            self._filled.clear()
            await self._deliver()

    async def empty(self) -> None:
        """Delivers everything."""
        self.closed = True
        self._filled.set()
        while self._waiting or self._units:
            await self._deliver()

    def _put(self, asked: Asked) -> None:
        self._waiting.append(self._commit(asked.tenant_id, asked.id.bytes))
        self._filled.set()

    def _commit(self, tenant_id: UUID, id: bytes) -> messages.Commit:
        call = self._ledger.of(tenant_id).calls[id]
        kind = messages.COMMIT_KIND_SETTLED if call.state == ledger.CALL_STATE_SETTLED else messages.COMMIT_KIND_VOID
        ref = messages.ReservationRef(tenant_id=tenant_id.bytes, reservation_id=id)
        epoch = self._ledger.of(tenant_id).epoch
        return messages.Commit(
            reservation=ref, epoch=epoch, kind=kind, actual=messages.Amounts(tokens=call.tokens, cost_nano_usd=call.cost)
        )

    async def _deliver(self) -> None:
        units, self._units = self._units, []
        for asked in units:
            call = self._ledger.of(asked.tenant_id).calls.get(asked.id.bytes)
            if call is not None and call.state == ledger.CALL_STATE_SETTLED:
                self._waiting.append(self._commit(asked.tenant_id, asked.id.bytes))
        batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
        if not batch:
            return
        limiter = self._limiters.any()
        try:
            request = messages.CommitRequest(commits=batch)
            outcomes = (await limiter.metering.unary(limiter.as_metering.Commit, request, timeout_seconds=5.0)).outcomes
        except MeshError:
            outcomes = [messages.COMMIT_OUTCOME_RETRY] * len(batch)
            await asyncio.sleep(0.02)
        self._waiting += [item for item, outcome in zip(batch, outcomes, strict=True) if outcome != messages.COMMIT_OUTCOME_DONE]
        if self._waiting:
            self._filled.set()
