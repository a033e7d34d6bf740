"""Answers that say that the mesh is at fault: whatever dies, a caller is told what it may do about it, and never INTERNAL."""

import grpc

from devstack.mesh_client import Refusal, refusal

_INTERNAL = grpc.StatusCode.INTERNAL.name


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
