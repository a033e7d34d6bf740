"""Tells receivers what waits, at least once and under the same id, with pauses that grow; gives up after a bound."""

import asyncio
import random
from collections.abc import Mapping

import structlog

from services.kernel.errors import MeshError
from services.kernel.webhook_signing import pause_seconds
from services.metering.exports.outgoing import ExportOutbox, Outgoing, OutgoingKey, Sink, Teller, TellFailed

log = structlog.get_logger(__name__)

_AT_ONCE = 32


class ExportRelay:
    """One loop for `BackgroundTasks`: `run`. Any number of replicas may run it."""

    def __init__(self, outbox: ExportOutbox, tellers: Mapping[Sink, Teller], *, poll_seconds: float, max_attempts: int) -> None:
        self._outbox = outbox
        self._tellers = tellers
        self._poll_seconds = poll_seconds
        self._max_attempts = max_attempts

    async def run(self) -> None:
        """Tells what is due until cancelled."""
        while True:
            try:
                while await self.tell_due():
                    continue
            except MeshError as error:
                log.warning("export_relay_failed", reason=error.reason_name)
            await asyncio.sleep(self._poll_seconds * random.uniform(0.8, 1.2))  # noqa: S311 - jitter

    async def tell_due(self) -> int:
        """Tells what is due, some at once, and returns how many."""
        items = await self._outbox.take_due(tuple(self._tellers), _AT_ONCE)
        async with asyncio.TaskGroup() as group:
            telling = [group.create_task(self._told(item)) for item in items]
        delivered = [key for task in telling if (key := task.result()) is not None]
        if delivered:
            # Told again, should this fail: the receiver knows the ids.
            await self._outbox.delivered(delivered)
        return len(items)

    async def _told(self, item: Outgoing) -> OutgoingKey | None:
        try:
            await self._tellers[item.key.sink].tell(item)
        except TellFailed as error:
            await self._note(item, error)
            return None
        except MeshError as error:
            # The record could not be read: nothing was sent. What is told beside it goes on; its lease ends by itself.
            log.warning("export_not_read", usage_id=str(item.key.usage_id), reason=error.reason_name)
            return None
        return item.key

    async def _note(self, item: Outgoing, error: TellFailed) -> None:
        given_up = error.is_final or (error.pause_seconds is None and item.attempts >= self._max_attempts)
        pause = None if given_up else max(error.pause_seconds or 0.0, pause_seconds(item.attempts))
        log.warning(
            "export_not_delivered",
            tenant_id=str(item.key.tenant_id),
            sink=item.key.sink.name,
            usage_id=str(item.key.usage_id),
            error=str(error),
            given_up=given_up,
        )
        try:
            await self._outbox.failed(item, error, pause)
        except MeshError as failure:
            # The lease ends by itself and it is told again.
            log.warning("export_not_noted", reason=failure.reason_name)
