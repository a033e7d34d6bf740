"""Which service is calling: from the peer certificate's SPIFFE-style URI SAN, or on loopback from a bearer of that service."""

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import Unauthenticated
from services.kernel.rpc.metadata import MESH_SERVICE, MESH_SERVICE_TOKEN

SPIFFE_PREFIX = "spiffe://tenantry/service/"
_AUTH_CONTEXT_KEYS = ("peer_spiffe_id", "peer_uri", "x509_subject_alternative_name")


class ServiceIdentity:
    """Answers the calling service's name, or None for a caller that is no service of the mesh."""

    def __init__(self, *, tls: bool, peer_hashes: Mapping[str, bytes]) -> None:
        self._tls = tls
        self._hashes = dict(peer_hashes)

    def of(self, context: Any, metadata: Mapping[str, str]) -> str | None:
        """Identifies the caller. Raises: Unauthenticated(CREDENTIAL_INVALID) for a service bearer that is wrong.

        With TLS only the certificate counts: metadata could be sent by any client that has one.
        """
        if self._tls:
            return service_of_certificate(context.auth_context())
        name = metadata.get(MESH_SERVICE)
        if name is None:
            return None
        digest = hashlib.sha256(metadata.get(MESH_SERVICE_TOKEN, "").encode()).digest()
        # Compared against something in every case, so that an unknown name takes as long as a wrong bearer.
        expected = self._hashes.get(name)
        if not hmac.compare_digest(digest, expected or bytes(32)) or expected is None:
            raise Unauthenticated(error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID, "the service's bearer is not known here")
        return name


def service_of_certificate(auth_context: Mapping[str, Any]) -> str | None:
    """Reads the service's name from the verified peer certificate; None when it names none, or more than one."""
    names: set[str] = set()
    for key in _AUTH_CONTEXT_KEYS:
        for value in auth_context.get(key, ()):
            text = value.decode("utf-8", "replace")
            if text.startswith(SPIFFE_PREFIX):
                names.add(text.removeprefix(SPIFFE_PREFIX))
    if len(names) != 1:
        return None
    return next(iter(names)) or None


def peer_host(peer: str) -> str:
    """Returns the address without scheme and port from grpc's `ipv4:10.0.0.1:4711` or `ipv6:%5B::1%5D:4711`."""
    scheme, _, rest = peer.partition(":")
    if scheme not in ("ipv4", "ipv6"):
        return ""
    return rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
