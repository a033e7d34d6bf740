"""Metadata keys of the mesh, and the one way to read them: each at most once, printable, bounded."""

from collections.abc import Iterable
from uuid import UUID

import grpc

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import InvalidRequest, MeshError
from services.kernel.ids import parse_uuid

TENANT_ID = "x-tenant-id"
TENANT_CONTEXT = "x-tenant-context"
REQUEST_ID = "x-request-id"
OPERATOR_REASON = "x-operator-reason"
TENANT_HOST = "x-tenant-host"
TENANT_PATH = "x-tenant-path"
AUTHORIZATION = "authorization"
MESH_SERVICE = "x-mesh-service"
MESH_SERVICE_TOKEN = "x-mesh-service-token"  # noqa: S105 - the name of a key
TRACEPARENT = "traceparent"

BEARER = "Bearer "
OWN_KEYS = frozenset(
    (TENANT_ID, TENANT_CONTEXT, REQUEST_ID, OPERATOR_REASON, TENANT_HOST, TENANT_PATH, AUTHORIZATION, MESH_SERVICE, MESH_SERVICE_TOKEN),
)
MAX_VALUE_LENGTH = 8192


def invalid(key: str, description: str) -> MeshError:
    """Builds the refusal of one malformed metadata key."""
    return MeshError(
        grpc.StatusCode.INVALID_ARGUMENT,
        error_reason_pb2.ERROR_REASON_INVALID_METADATA,
        f"metadata {key} {description}",
        metadata={"key": key},
    )


def refuse_malformed(pairs: Iterable[tuple[str, str | bytes]]) -> None:
    """Refuses a mesh key that occurs twice, is not printable ASCII or is too long.

    Twice matters: a proxy may look at the first value and this process at the last.
    """
    seen: set[str] = set()
    for key, value in pairs:
        if key not in OWN_KEYS:
            continue
        if key in seen:
            raise invalid(key, "must not occur twice")
        seen.add(key)
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            raise invalid(key, "must be printable ASCII")
        if len(value) > MAX_VALUE_LENGTH:
            raise invalid(key, f"must be at most {MAX_VALUE_LENGTH} characters")


def parse_uuid_key(value: str, key: str) -> UUID:
    """Reads a UUID from metadata. Raises: INVALID_METADATA with the key."""
    try:
        return parse_uuid(value, key)
    except InvalidRequest:
        raise invalid(key, "must be a UUID") from None
