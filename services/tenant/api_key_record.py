"""A tenant's key as it is listed and judged. Refuses nothing; it holds no secret."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class ApiKeyRecord:
    """A key without its secret."""

    key_id: str
    display_name: str
    scopes: tuple[str, ...]
    create_time: datetime
    expire_time: datetime | None
    revoke_time: datetime | None
    last_use_time: datetime | None
    allowed_cidrs: tuple[str, ...]
    replaced_by: str
