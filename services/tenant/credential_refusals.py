"""The words in which a credential is refused: the same for everything that strangers must not tell apart."""

from datetime import UTC, datetime

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import Forbidden, MeshError, Unauthenticated

MAX_REASON_LENGTH = 500


def invalid() -> MeshError:
    """Builds the refusal of a credential that proves nothing, whatever was wrong with it."""
    return Unauthenticated(error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID, "the credential is not valid; check the key")


def expired(expire_time: datetime) -> MeshError:
    """Builds the refusal of a right credential whose time has passed."""
    stamp = expire_time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return Unauthenticated(
        error_reason_pb2.ERROR_REASON_CREDENTIAL_EXPIRED, f"the credential ended at {stamp}; use a newer one", expire_time=stamp
    )


def suspended() -> MeshError:
    """Builds the refusal of a suspended tenant."""
    return Forbidden(error_reason_pb2.ERROR_REASON_TENANT_SUSPENDED, "the tenant is suspended; ask the operator of the system")


def mismatch(claimed_by: str) -> MeshError:
    """Builds the refusal of a claim to another tenant, made by the named metadata key."""
    return Forbidden(
        error_reason_pb2.ERROR_REASON_TENANT_MISMATCH,
        f"{claimed_by} names another tenant than your credential proves; leave it out or correct it",
    )


def reason_missing() -> MeshError:
    """Builds the refusal of an operator who does not say why."""
    return Forbidden(
        error_reason_pb2.ERROR_REASON_OPERATOR_REASON_MISSING,
        f"say why you act, in 1 to {MAX_REASON_LENGTH} characters, as x-operator-reason",
    )
