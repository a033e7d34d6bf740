"""What says that the mesh is at fault: whatever dies, a caller is told what it may do about it and never INTERNAL, and nothing crashes."""

import json
from collections.abc import Iterator
from pathlib import Path

import grpc

from devstack.mesh_client import Refusal, refusal
from devstack.stack import START_ORDER

_INTERNAL = grpc.StatusCode.INTERNAL.name
_TRACEBACK = "Traceback (most recent call last)"
# grpc's own line where an answer could not be sent because nobody waits for it any more.
_CALLER_GONE = "ExecuteBatchError"
_MOST_CHARACTERS = 300


class Faults:
    """The INTERNAL answers of one storm: `said` has a sentence for each, with the method, whom it was about, and what was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def read(self, method: str, about: str, error: grpc.aio.AioRpcError) -> Refusal:
        """Reads a failed call; keeps it when it is a fault."""
        told = refusal(error)
        if _INTERNAL in (told.code, told.reason):
            self.said.append(f"{method} of {about} was answered {told.code} {told.reason}: {told.message} {told.metadata}")
        return told


def logged(folder: Path) -> Iterator[str]:
    """Says in a sentence each what the services logged with a traceback: a failure that nobody had foreseen."""
    for service in START_ORDER:
        for line in (folder / f"{service}.log").read_text(errors="replace").splitlines():
            if _TRACEBACK in line and _CALLER_GONE not in line:
                yield f"{service} logged {_told(line)}"


def _told(line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError:
        # No line of a service's own, or the last one of a service that was killed.
        return line[:_MOST_CHARACTERS]
    where = record.get("method") or record.get("loop") or ""
    return f"{record['event']} {where}: {record['exception'].strip().splitlines()[-1]}"
