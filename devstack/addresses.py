"""Where everything of the embedded stack listens: fixed ports for people, free ones for tests."""

from dataclasses import dataclass, fields

from devstack.managed_process import ProcessFailedError
from devstack.ports import LOOPBACK, free_port, is_free


@dataclass(frozen=True, slots=True)
class Ports:
    """One loopback port for each part."""

    tenant: int = 7401
    ratelimit: int = 7402
    inference: int = 7403
    retrieval: int = 7404
    metering: int = 7405
    postgres: int = 7411
    redis: int = 7412
    pgbouncer: int = 7413
    events: int = 7414
    qdrant: int = 7416
    traces: int = 7417
    provider: int = 7418

    @classmethod
    def free(cls) -> "Ports":
        """Chooses a free port for each part."""
        return cls(**{field.name: free_port() for field in fields(cls)})

    def address(self, part: str) -> str:
        """Returns `127.0.0.1:port` of a part, by its field's name."""
        port: int = getattr(self, part)
        return f"{LOOPBACK}:{port}"

    def require_free(self) -> None:
        """Raises ProcessFailedError naming every port that something else holds."""
        taken = [f"{field.name} {getattr(self, field.name)}" for field in fields(self) if not is_free(getattr(self, field.name))]
        if taken:
            raise ProcessFailedError(
                f"port taken: {', '.join(taken)}. Is the stack running already? "
                "Stop it with Ctrl-C where it runs, or free the port and try again."
            )
