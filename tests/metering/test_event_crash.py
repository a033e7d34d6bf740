"""kill -9 of the service in the middle of recording: what was answered is there, and a retry of everything records each event once."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import grpc
import psutil
import pytest

from devstack.ports import answers, free_port
from mesh.metering.v1 import event_service_pb2 as pb
from mesh.metering.v1 import event_service_pb2_grpc
from services.kernel.rpc import metadata as keys
from tests.metering.events import DUPLICATE, PRODUCT, RECORDED, TYPE, event, register, totals
from tests.metering.mesh import HASHES, TOKENS, Mesh, Tenant, dsn_of
from tests.metering.peers import Peers
from tests.support.waiting import eventually

PATIENCE_SECONDS = 60.0
CALLERS, BATCH = 6, 300
CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE client_port = ANY($1)"
COUNT = "SELECT count(*) FROM metering.events WHERE tenant_id = $1"


class Mortal:
    """The service in a process of its own, on the ledger of the other tests."""

    def __init__(self, dsn: str, peers: Peers, log: Path) -> None:
        self.port = free_port()
        self._log = log
        own = {
            "LISTEN_ADDRESS": f"127.0.0.1:{self.port}",
            "SERVICE_TOKEN": TOKENS["metering"],
            "PEER_TOKEN_HASHES": HASHES,
            "TENANT_ADDRESS": peers.address,
            "RATELIMIT_ADDRESS": peers.address,
            "POSTGRES_DSN": dsn_of(dsn, "metering_service"),
            "POSTGRES_JOBS_DSN": dsn_of(dsn, "metering_jobs"),
            "LEASE_SECONDS": "60",
            "SWEEP_SECONDS": "3600",
        }
        others = {name: value for name, value in os.environ.items() if not name.startswith("TENANTRY_")}
        self._environment = others | {f"TENANTRY_{name}": value for name, value in own.items()}

    async def start(self) -> None:
        """Starts the process and returns when it listens."""
        with self._log.open("ab") as log:
            command = (sys.executable, "-m", "services.metering", "serve")
            self.process = await asyncio.create_subprocess_exec(*command, env=self._environment, stdout=log, stderr=log)

        async def listens() -> bool:
            return await asyncio.to_thread(answers, self.port)

        await eventually(listens, within_seconds=PATIENCE_SECONDS)

    async def kill(self) -> list[int]:
        """Ends it as a crash does; returns the local ports of the connections it had, looked up while it stood still."""
        ports: list[int] = []
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGSTOP)
            ports = [int(connection.laddr.port) for connection in psutil.Process(self.process.pid).net_connections("tcp")]
            self.process.kill()
        await self.process.wait()
        return ports


@pytest.fixture
async def mortal(ledger_dsn: str, peers: Peers, tmp_path: Path) -> AsyncIterator[Mortal]:
    """A running process, gone at the end."""
    process = Mortal(ledger_dsn, peers, tmp_path / "metering.log")
    await process.start()
    yield process
    await process.kill()


class Sender:
    """One of several callers that each send batches of their own until the service dies under them."""

    def __init__(self, tenant: Tenant, port: int, number: int) -> None:
        self._metadata = ((keys.AUTHORIZATION, f"Bearer key-{tenant.id}"),)
        self._port = port
        self._number = number
        self.sent: list[pb.Event] = []
        self.answered: list[pb.Event] = []

    async def send_until_killed(self) -> None:
        """Sends new events and remembers which were answered."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self._port}") as channel:
            stub = event_service_pb2_grpc.EventServiceStub(channel)
            while True:
                batch = [event(f"{self._number}-{len(self.sent) + index}", quantity=3) for index in range(BATCH)]
                self.sent += batch
                try:
                    response = await stub.RecordEvents(
                        pb.RecordEventsRequest(events=batch), metadata=self._metadata, timeout=PATIENCE_SECONDS
                    )
                except grpc.aio.AioRpcError:
                    return
                assert {result.outcome for result in response.results} == {RECORDED}
                self.answered += batch

    async def send_again(self) -> list[int]:
        """Sends everything once more; what came of each."""
        found: list[int] = []
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self._port}") as channel:
            stub = event_service_pb2_grpc.EventServiceStub(channel)
            for first in range(0, len(self.sent), 5 * BATCH):
                request = pb.RecordEventsRequest(events=self.sent[first : first + 5 * BATCH])
                response = await stub.RecordEvents(request, metadata=self._metadata, timeout=PATIENCE_SECONDS, wait_for_ready=True)
                found += [result.outcome for result in response.results]
        return found


async def test_a_killed_service_loses_no_answered_event_and_counts_none_twice(mesh: Mesh, mortal: Mortal, admin: asyncpg.Pool) -> None:
    """Killed while several callers record: each batch is there whole or not at all, each answered one is, a retry completes the rest."""
    await register(mesh)
    tenant = mesh.new_tenant()
    senders = [Sender(tenant, mortal.port, number) for number in range(CALLERS)]

    async def several_are_recorded() -> bool:
        return await admin.fetchval(COUNT, tenant.id) >= 4 * BATCH

    async with asyncio.TaskGroup() as group:
        for sender in senders:
            group.create_task(sender.send_until_killed())
        await eventually(several_are_recorded, within_seconds=PATIENCE_SECONDS)
        ports = await mortal.kill()
    sent, answered = sum(len(sender.sent) for sender in senders), sum(len(sender.answered) for sender in senders)
    assert sent > answered

    async def its_connections_are_gone() -> bool:
        return not await admin.fetchval(CONNECTIONS, ports)

    # What was on its way into the database when the process died may still commit.
    await eventually(its_connections_are_gone, within_seconds=PATIENCE_SECONDS)
    there = await admin.fetchval(COUNT, tenant.id)
    assert answered <= there <= sent
    assert there % BATCH == 0
    await mortal.start()
    again = [outcome for sender in senders for outcome in await sender.send_again()]
    assert (again.count(DUPLICATE), again.count(RECORDED)) == (there, sent - there)
    assert await totals(mesh, tenant) == [(PRODUCT, TYPE, "user-1", "hiring", sent, 3 * sent)]
