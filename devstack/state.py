"""What the embedded stack remembers between runs: its secrets and the demo tenants' keys, readable by their owner alone."""

import base64
import hashlib
import json
import os
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from devstack.managed_process import ProcessFailedError
from services.tenant.api_key import new_operator_key

BEGIN_ANEW = "Stop the stack and remove its folder to begin anew (what is in it is lost): rm -rf .tenantry"
SERVICES = ("tenant", "ratelimit", "inference", "retrieval", "metering")


@dataclass(frozen=True, slots=True)
class Secrets:
    """Every secret of one stack; generated once, never committed, never printed."""

    postgres_password: str
    redis_password: str
    qdrant_api_key: str
    provider_api_key: str
    context_signing_key: str
    operator_key: str
    master_keys: str
    role_passwords: dict[str, str]
    service_tokens: dict[str, str]

    @classmethod
    def generate(cls) -> "Secrets":
        """Makes new ones from the operating system's randomness."""
        return cls(
            postgres_password=secrets.token_hex(24),
            redis_password=secrets.token_hex(24),
            qdrant_api_key=secrets.token_urlsafe(32),
            provider_api_key="sk-stub-" + secrets.token_urlsafe(24),
            context_signing_key=base64.b64encode(secrets.token_bytes(32)).decode(),
            operator_key=str(new_operator_key()),
            master_keys="local-1:" + base64.b64encode(secrets.token_bytes(32)).decode(),
            role_passwords={name: secrets.token_hex(24) for name in (*SERVICES, "tenant_keys")},
            service_tokens={service: secrets.token_urlsafe(32) for service in SERVICES},
        )

    @property
    def operator_key_sha256(self) -> str:
        """What the tenant service is given instead of the operator's key."""
        return hashlib.sha256(self.operator_key.encode()).hexdigest()

    @property
    def webhook_secret(self) -> str:
        """What signs the events of tenants' lives. It follows from the operator's key, so that stacks of before have one too."""
        return hashlib.sha256(f"webhooks/{self.operator_key}".encode()).hexdigest()

    @property
    def webhook_seal_keys(self) -> str:
        """What seals the secrets of tenants' receivers. As above: it follows from what is there."""
        return "1:" + base64.b64encode(hashlib.sha256(f"receivers/{self.master_keys}".encode()).digest()).decode()

    @property
    def peer_token_hashes(self) -> str:
        """What every service is given to recognise the others by."""
        return ",".join(f"{name}={hashlib.sha256(token.encode()).hexdigest()}" for name, token in self.service_tokens.items())


@dataclass(frozen=True, slots=True)
class DemoTenant:
    """A demo tenant as it was provisioned."""

    slug: str
    tenant_id: str
    api_key: str


@dataclass(slots=True)
class StackState:
    """The folder `.tenantry/` and what is in it."""

    folder: Path
    secrets: Secrets
    tenants: dict[str, DemoTenant] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "StackState":
        """Reads the folder's state, or begins a new one in it. Raises: ProcessFailedError when it cannot be read or written."""
        path = folder / "secrets.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o711)
            if path.exists():
                path.chmod(0o600)
                state = cls.read(folder)
                state.save()
                return state
            state = cls(folder, Secrets.generate())
            state.save()
        except OSError as error:
            raise ProcessFailedError(f"{path} cannot be used: {error.strerror}. Run this where you may write.") from None
        return state

    @classmethod
    def read(cls, folder: Path) -> "StackState":
        """Reads the state of a stack that was begun. Raises: ProcessFailedError when there is none, or it is damaged."""
        path = folder / "secrets.json"
        try:
            kept = json.loads(path.read_text())
            tenants = {name: DemoTenant(**tenant) for name, tenant in kept.pop("tenants").items()}
            return cls(folder, Secrets(**kept), tenants)
        except FileNotFoundError:
            raise ProcessFailedError(f"{path} is not there: the stack that runs here was started from another folder") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ProcessFailedError(f"{path} is damaged. {BEGIN_ANEW}") from None

    def save(self) -> None:
        """Writes everything, atomically, with mode 0600."""
        path = self.folder / "secrets.json"
        draft = path.with_suffix(".draft")
        draft.unlink(missing_ok=True)
        content = asdict(self.secrets) | {"tenants": {name: asdict(tenant) for name, tenant in self.tenants.items()}}
        with os.fdopen(os.open(draft, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    def log_path(self, name: str) -> Path:
        """Returns where a part's output goes."""
        return self.folder / "logs" / f"{name}.log"
