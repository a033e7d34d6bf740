"""A tenant's prompt, conversations and their turns as values, the words of a first prompt, and the store they need."""

import re
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from services.inference.worst_case import text_bytes
from services.kernel.errors import InvalidRequest
from services.kernel.ids import TenantId

DEFAULT_ASSISTANT_NAME = "Assistant"
DEFAULT_PAGE_SIZE = 100
_CONVERSATION_ID = re.compile("[0-9a-f]{64}")
MAX_PROMPT_BYTES = 20_000


@dataclass(frozen=True, slots=True)
class Prompt:
    """One version of a tenant's prompt, from 1."""

    version: int
    text: str
    create_time: datetime


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation of one of the tenant's users, or of nobody named."""

    conversation_id: str
    user: str
    create_time: datetime


@dataclass(frozen=True, slots=True)
class KeptTurn:
    """A stored turn; `sequence` counts from 1."""

    sequence: int
    role: str
    text: str
    call_id: UUID
    create_time: datetime


class Store(Protocol):
    """What prompts, conversations and a tenant's life need of the store."""

    async def put_prompt(self, tenant_id: TenantId, text: str, *, only_first: bool) -> Prompt:
        """Stores a new version unless the text is the newest already, or, with `only_first`, unless there is any."""
        ...

    async def newest_prompt(self, tenant_id: TenantId) -> Prompt:
        """Returns the newest version. Raises: NotFound."""
        ...

    async def add_conversation(self, tenant_id: TenantId, conversation_id: str, user: str) -> Conversation:
        """Begins a conversation."""
        ...

    async def turns(self, tenant_id: TenantId, conversation_id: str, after: int, count: int) -> Sequence[KeptTurn]:
        """Returns the turns after a sequence number, oldest first. Raises: NotFound."""
        ...

    async def delete_conversation(self, tenant_id: TenantId, conversation_id: str) -> None:
        """Removes a conversation with its turns. Idempotent."""
        ...

    async def erase(self, tenant_id: TenantId) -> Mapping[str, int]:
        """Removes everything of the tenant and returns how many records of each kind. Idempotent."""
        ...

    def export(self, tenant_id: TenantId) -> AsyncGenerator[tuple[str, bytes], None]:
        """Yields every record of the tenant as its kind and one JSON object."""
        ...


def new_conversation_id() -> str:
    """Returns an id that cannot be guessed: 32 random bytes in hexadecimal."""
    return secrets.token_hex(32)


def is_conversation_id(text: str) -> bool:
    """Tells whether the text can name a conversation at all."""
    return _CONVERSATION_ID.fullmatch(text) is not None


def refuse_unstorable_user(user: str) -> None:
    """Refuses a name the store would not take. Raises: InvalidRequest."""
    if "\x00" in user:
        raise InvalidRequest("user", "must not contain NUL characters")


def first_prompt(display_name: str, assistant_name: str) -> str:
    """Returns the words a new tenant's assistant starts from."""
    return (
        f"You are {assistant_name or DEFAULT_ASSISTANT_NAME}, the assistant of {display_name}. "
        "Answer helpfully, briefly and truthfully, in the language of the question. Say so when you do not know."
    )


def refuse_long_prompt(text: str) -> None:
    """Refuses what the store would not take. Raises: InvalidRequest."""
    if text_bytes(text) > MAX_PROMPT_BYTES or "\x00" in text:
        raise InvalidRequest("text", f"must be at most {MAX_PROMPT_BYTES} bytes without NUL characters")


def page_start(page_token: str) -> int:
    """Reads where a page starts. Raises: InvalidRequest for a token this service did not give out."""
    if not page_token:
        return 0
    if not (page_token.isascii() and page_token.isdecimal() and len(page_token) <= 9):
        raise InvalidRequest("page_token", "must be empty or the next_page_token of the page before")
    return int(page_token)
