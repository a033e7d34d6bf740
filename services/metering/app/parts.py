"""What the rooms of the service are built from: its settings, stores and loops. Built once, closed in reverse order."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

from services.kernel.background import BackgroundTasks
from services.kernel.rpc.channel import MeshChannel
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.metering.settings import MeteringSettings

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Returns the time."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the rooms share. Whoever opens something closes it by the stack; `background` is closed when its owner says."""

    settings: MeteringSettings
    stack: AsyncExitStack
    background: BackgroundTasks
    database: TenantDatabase
    jobs: JobsDatabase
    clock: Clock

    @classmethod
    async def opened(cls, settings: MeteringSettings, stack: AsyncExitStack, clock: Clock) -> "Parts":
        """Opens the pools."""
        dsn, jobs_dsn = settings.postgres_dsn.get_secret_value(), settings.postgres_jobs_dsn.get_secret_value()
        pooling = settings.postgres_transaction_pooling
        database = await TenantDatabase.open(dsn, max_size=12, application_name="metering", transaction_pooling=pooling)
        stack.push_async_callback(database.close)
        jobs = await JobsDatabase.open(jobs_dsn, max_size=7, application_name="metering-jobs", transaction_pooling=pooling)
        stack.push_async_callback(jobs.close)
        return cls(settings, stack, BackgroundTasks(), database, jobs, clock)

    def channel(self, address: str, service: str) -> MeshChannel:
        """Opens a channel to another service."""
        channel = MeshChannel(address, settings=self.settings, target_service=service)
        self.stack.push_async_callback(channel.close)
        return channel
