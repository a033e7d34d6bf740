"""One call as it is billed: from the moment generation starts until the one line that says how it ended."""

from dataclasses import dataclass
from datetime import UTC, datetime

from devstack.provider_stub.cache import InputUsage
from devstack.provider_stub.ledger import Entry, Ledger


@dataclass(frozen=True, slots=True)
class CallIdentity:
    """Who asked for what."""

    request_id: str
    call_id: str | None
    api_key_hash: str
    model: str


class BilledCall:
    """Counts what is generated and tells the ledger; only the first ending is recorded."""

    def __init__(self, ledger: Ledger, identity: CallIdentity, usage: InputUsage) -> None:
        self.identity = identity
        self.usage = usage
        self.generated_tokens = 0
        self._ledger = ledger
        self._started_at = _now()
        self._ended = False

    def start(self) -> None:
        """Record that the call is billed."""
        self._ledger.record(self._entry("started", None))

    def end(self, outcome: str) -> None:
        """Record how the call ended and what it generated; a later ending changes nothing."""
        if not self._ended:
            self._ended = True
            self._ledger.record(self._entry(outcome, _now()))

    async def durable(self) -> None:
        """Return when all that was recorded is on disk."""
        await self._ledger.durable()

    def _entry(self, outcome: str, ended_at: str | None) -> Entry:
        return Entry(
            request_id=self.identity.request_id,
            call_id=self.identity.call_id,
            api_key_hash=self.identity.api_key_hash,
            model=self.identity.model,
            input_tokens=self.usage.input_tokens,
            output_tokens=self.generated_tokens,
            cache_creation_5m=self.usage.cache_creation_5m,
            cache_creation_1h=self.usage.cache_creation_1h,
            cache_read=self.usage.cache_read,
            outcome=outcome,
            started_at=self._started_at,
            ended_at=ended_at,
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
