"""Counts what the limits refuse, by the minute, and tells the ledger. No call waits for it; a process that dies loses its last seconds."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

import structlog

from mesh.common.v1 import error_reason_pb2
from services.inference.call import Question
from services.kernel.errors import MeshError
from services.kernel.ids import TenantId

log = structlog.get_logger(__name__)

TELL_SECONDS = 2.0
# Beyond so many names that are not told yet, users and features are left out.
MOST_NAMES = 10_000
MOST_PER_REQUEST = 500
# A minute is over when no call can be refused in it any more, whatever this clock is corrected by.
_MINUTES_KEPT = 2
_CLOSE_SECONDS = 2.0
# What the limits refuse with besides what waiting may mend.
_OF_LIMITS = frozenset((error_reason_pb2.ERROR_REASON_REQUEST_TOO_LARGE, error_reason_pb2.ERROR_REASON_FEATURE))


class RefusedNames(NamedTuple):
    """What a count is of; the minute is counted from 1970."""

    tenant_id: TenantId
    minute: int
    reason: str
    rule: str
    model: str
    feature: str
    user: str


class RefusalTold(NamedTuple):
    """How many calls of these names were refused in their minute so far, and what proves their tenant."""

    names: RefusedNames
    context_token: str
    refusals: int


class RefusalLedger(Protocol):
    """Where counts are told."""

    async def record_refusals(self, counts: Sequence[RefusalTold]) -> None:
        """Records counts of this process; a repeat changes nothing. Raises: MeshError."""
        ...


class RefusalTally:
    """The counts of one process. Its loop runs as a background task of the app."""

    def __init__(
        self, ledger: RefusalLedger, *, tell_seconds: float = TELL_SECONDS, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ):
        self._ledger = ledger
        self._tell_seconds = tell_seconds
        self._now = now
        self._counts: dict[RefusedNames, int] = {}
        self._untold: set[RefusedNames] = set()
        # The last one seen: it proves the tenant for longest.
        self._tokens: dict[TenantId, str] = {}

    @property
    def counts(self) -> Mapping[RefusedNames, int]:
        """What is counted and may still grow."""
        return self._counts

    def add(self, question: Question, refusal: MeshError) -> None:
        """Counts a call that ended in this error, if it was the limits' refusal."""
        if refusal.code.name != "RESOURCE_EXHAUSTED" and refusal.reason not in _OF_LIMITS:
            return
        names = RefusedNames(
            question.tenant_id,
            int(self._now().timestamp()) // 60,
            refusal.reason_name,
            refusal.metadata.get("rule", ""),
            question.model.name,
            question.feature,
            question.user,
        )
        if names not in self._counts and len(self._counts) >= MOST_NAMES:
            names = names._replace(rule="", model="", feature="", user="")
        self._counts[names] = self._counts.get(names, 0) + 1
        self._untold.add(names)
        self._tokens[question.tenant_id] = question.tenant.token

    async def run(self) -> None:
        """Tells for ever, at a steady pace."""
        while True:
            await asyncio.sleep(self._tell_seconds)
            try:
                await self.tell()
            except MeshError as error:
                log.warning("refusals_not_told", names=len(self._untold), error=str(error))

    async def tell(self) -> None:
        """Tells what was counted since it was told last; what fails is told again next time. Raises: MeshError."""
        untold = sorted(self._untold)
        for start in range(0, len(untold), MOST_PER_REQUEST):
            part = untold[start : start + MOST_PER_REQUEST]
            told = [RefusalTold(names, self._tokens[names.tenant_id], self._counts[names]) for names in part]
            try:
                await self._ledger.record_refusals(told)
            except MeshError as error:
                if error.reason != error_reason_pb2.ERROR_REASON_INVALID_REQUEST:
                    raise
                # Said again it would be refused again, and keep all others from being told.
                log.error("refusals_refused", names=len(told), error=str(error))
            # What was counted meanwhile is more than was told.
            self._untold.difference_update(each.names for each in told if self._counts[each.names] == each.refusals)
        self._forget()

    async def close(self) -> None:
        """Tells what is left, if the ledger takes it in time."""
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self.tell()
        except (MeshError, TimeoutError):
            log.warning("refusals_lost", names=len(self._untold))

    def _forget(self) -> None:
        oldest = int(self._now().timestamp()) // 60 - _MINUTES_KEPT
        for names in [names for names in self._counts if names.minute < oldest and names not in self._untold]:
            del self._counts[names]
        tenants = {names.tenant_id for names in self._counts}
        self._tokens = {tenant_id: token for tenant_id, token in self._tokens.items() if tenant_id in tenants}
