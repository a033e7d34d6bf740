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
from services.kernel.paging import decode_page_token, encode_page_token, refused_page_token
from services.kernel.tenant_scan import ScannedStore

DEFAULT_ASSISTANT_NAME = "Assistant"
_CONVERSATION_ID = re.compile("[0-9a-f]{64}")
MAX_PROMPT_BYTES = 20_000
_LISTING = "turns"


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

    async def purge(self, tenant_id: TenantId, older_than: datetime) -> tuple[Mapping[str, int], bool]:
        """Removes a batch of conversations without a turn since then; returns counts by kind, and whether there may be more."""
        ...

    async def scan(self, tenant_id: TenantId, canaries: Sequence[str]) -> Sequence[ScannedStore]:
        """Counts in every table what holds the tenant's id or one of the strings."""
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


def page_token(last: KeptTurn) -> str:
    """Returns the token of the page after a turn."""
    return encode_page_token(_LISTING, [str(last.sequence)])


def page_start(token: str) -> int:
    """Reads after which turn a page starts; 0 for the first page. Raises: InvalidRequest(page_token)."""
    position = decode_page_token(token, _LISTING, 1)
    if position is None:
        return 0
    [sequence] = position
    if not (sequence.isascii() and sequence.isdecimal() and len(sequence) <= 9):
        raise refused_page_token()
    return int(sequence)
