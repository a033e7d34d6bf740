"""The mesh's own contracts, found by walking the generated stubs."""

import importlib
import pkgutil
from collections.abc import Iterator

from google.protobuf.descriptor import FileDescriptor, MethodDescriptor, ServiceDescriptor

import mesh


def files() -> Iterator[FileDescriptor]:
    """Every proto file under `mesh`."""
    for module in pkgutil.walk_packages(mesh.__path__, "mesh."):
        if module.name.endswith("_pb2"):
            yield importlib.import_module(module.name).DESCRIPTOR


def services() -> Iterator[ServiceDescriptor]:
    """Every service."""
    for file in files():
        yield from file.services_by_name.values()


def methods() -> Iterator[MethodDescriptor]:
    """Every method."""
    for service in services():
        yield from service.methods
