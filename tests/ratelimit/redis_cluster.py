"""Redis Cluster from the bundled binary: masters, a replica of each, and what an operator does to them."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from redis.crc import key_slot

from devstack.embedded_redis import binary
from devstack.managed_process import ManagedProcess, ProcessFailedError
from devstack.ports import LOOPBACK, free_port
from services.kernel.errors import Unavailable
from services.ratelimit.adapters.redis_link import PipelinedLink
from tests.support.waiting import eventually

NODE_TIMEOUT_MS = 1_000
_SLOTS = 16_384
_READY_SECONDS = 20
_ATTEMPTS = 5


@dataclass
class Node:
    """One server of the cluster."""

    process: ManagedProcess
    port: int
    link: PipelinedLink
    id: str = ""

    async def says(self, text: str, *command: str) -> bool:
        """Whether the answer to a command has this text in it."""
        try:
            return text in cast("bytes", await self.link.send(*command)).decode()
        except Unavailable:
            return False

    async def answers(self) -> bool:
        """Whether it is there."""
        return await self.says("PONG", "PING")


@dataclass
class Cluster:
    """All of them: a replica follows the master at its own place."""

    masters: Sequence[Node]
    replicas: Sequence[Node]

    @property
    def url(self) -> str:
        """Where a client begins."""
        return f"redis://{LOOPBACK}:{self.masters[0].port}/0"

    def owner_place(self, key: str) -> int:
        """Which master a key lies at, as the slots were given out."""
        return key_slot(key.encode()) * len(self.masters) // _SLOTS

    async def move(self, key: str, to: Node, source: Node | None = None) -> None:
        """Moves the key's slot with all its keys to another master, as a resharding does; from where it was given out, or `source`."""
        slot, source = key_slot(key.encode()), source or self.masters[self.owner_place(key)]
        await to.link.send("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        await source.link.send("CLUSTER", "SETSLOT", slot, "MIGRATING", to.id)
        # One by one, the hard way: in between, part of a tenant is here and part there.
        while keys := cast("list[bytes]", await source.link.send("CLUSTER", "GETKEYSINSLOT", slot, 1)):
            await source.link.send("MIGRATE", LOOPBACK, to.port, keys[0], 0, 5_000)
        for node in (to, source, *(each for each in self.masters if each not in (to, source))):
            await node.link.send("CLUSTER", "SETSLOT", slot, "NODE", to.id)


@asynccontextmanager
async def running_cluster(folder: Path) -> AsyncIterator[Cluster]:
    """Three masters and three replicas on free ports, gone at the end."""
    nodes: list[Node] = []
    try:
        for number in range(6):
            nodes.append(await _started(folder / str(number)))
        cluster = Cluster(nodes[:3], nodes[3:])
        await _join(cluster)
        yield cluster
    finally:
        for node in nodes:
            await _end(node)


async def _started(folder: Path) -> Node:
    """A server that answers. A port, or that of its bus, may be taken by somebody else between the look and the bind: then another."""
    folder.mkdir()
    for attempt in range(_ATTEMPTS):
        node = _node(folder / str(attempt))
        try:
            await node.process.start()
            await node.process.wait_ready(node.answers, timeout_seconds=_READY_SECONDS)
            node.id = cast("bytes", await node.link.send("CLUSTER", "MYID")).decode()
        except ProcessFailedError:
            await _end(node)
            if attempt == _ATTEMPTS - 1:
                raise
        else:
            return node
    raise AssertionError("unreachable")


async def _end(node: Node) -> None:
    await node.link.close()
    node.process.kill()
    if node.process.exit_code is None:
        await node.process.wait()


def _node(folder: Path) -> Node:
    folder.mkdir()
    port = free_port()
    (folder / "redis.conf").write_text(
        f'bind {LOOPBACK}\nport {port}\ndir "{folder}"\ncluster-enabled yes\ncluster-node-timeout {NODE_TIMEOUT_MS}\n'
        'cluster-replica-validity-factor 0\ncluster-require-full-coverage no\nrepl-diskless-sync yes\nrepl-diskless-sync-delay 0\nsave ""\n'
    )
    process = ManagedProcess("redis", [binary("redis-server"), str(folder / "redis.conf")], log_path=folder / "redis.log")
    return Node(process, port, PipelinedLink(f"redis://{LOOPBACK}:{port}/0", timeout_seconds=5.0))


async def _join(cluster: Cluster) -> None:
    every = [*cluster.masters, *cluster.replicas]
    for place, node in enumerate(cluster.masters):
        # The same place that owner_place tells.
        own = [slot for slot in range(_SLOTS) if slot * len(cluster.masters) // _SLOTS == place]
        await node.link.send("CLUSTER", "ADDSLOTS", *own)
        await node.link.send("CLUSTER", "SET-CONFIG-EPOCH", place + 1)
    for node in every[1:]:
        await node.link.send("CLUSTER", "MEET", LOOPBACK, every[0].port)
    for node in every:
        await _until(node, "cluster_known_nodes:6", "CLUSTER", "INFO")
    for master, replica in zip(cluster.masters, cluster.replicas, strict=True):
        await replica.link.send("CLUSTER", "REPLICATE", master.id)
    for replica in cluster.replicas:
        await _until(replica, "master_link_status:up", "INFO", "replication")
    for node in every:
        await _until(node, "cluster_state:ok", "CLUSTER", "INFO")


async def _until(node: Node, text: str, *command: str) -> None:
    async def holds() -> bool:
        return await node.says(text, *command)

    await eventually(holds, within_seconds=_READY_SECONDS)
