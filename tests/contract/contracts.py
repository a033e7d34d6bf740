"""The mesh's own contracts, found by walking the generated stubs."""

import importlib
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import FileDescriptor, MethodDescriptor, ServiceDescriptor

import mesh


def files() -> Iterator[FileDescriptor]:
    """Every proto file under `mesh`."""
    root = Path(next(iter(mesh.__path__)))
    for path in sorted(root.rglob("*_pb2.py")):
        yield importlib.import_module(".".join(["mesh", *path.relative_to(root).with_suffix("").parts])).DESCRIPTOR


def services() -> Iterator[ServiceDescriptor]:
    """Every service."""
    for file in files():
        yield from file.services_by_name.values()


def methods() -> Iterator[MethodDescriptor]:
    """Every method."""
    for service in services():
        yield from service.methods
