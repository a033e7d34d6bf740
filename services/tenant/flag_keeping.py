"""Keeping the flags: making, replacing, removing, listing and explaining them. Refuses more flags than a context token can carry."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import LimitExceeded, NotFound, QuotaViolation, WrongState
from services.kernel.ids import TenantId
from services.kernel.paging import cut_page, decode_page_token, encode_page_token
from services.tenant.actor import Actor
from services.tenant.feature_flag import (
    MAX_FLAGS,
    MAX_NAME_BYTES,
    Evaluation,
    Flag,
    KeptFlag,
    evaluate,
    refuse_contradictions,
    refuse_unknown_tenants,
)
from services.tenant.tenant_record import TenantDirectory

MAX_PAGE_SIZE = 50
_LISTING = "flags"


@dataclass(frozen=True, slots=True)
class FlagsBefore:
    """What a change of a flag is judged by: the flag that is there, the names of all, the plans there are, and which of its tenants are."""

    kept: KeptFlag | None
    names: Collection[str]
    tiers: Collection[str]
    tenants: Collection[TenantId]


# Raises when the change must not be made. Pure; called while nobody else can change a flag.
Judge = Callable[[FlagsBefore], None]


class FlagStore(Protocol):
    """Where flags are kept, with their history."""

    async def put(self, flag: Flag, judge: Judge, actor: Actor, *, validate_only: bool) -> tuple[KeptFlag, bool]:
        """Keeps the flag, with history, audit record and announcement in one transaction; False when it was kept like this already."""
        ...

    async def delete(self, name: str, actor: Actor) -> bool:
        """Removes the flag in the same way; False when there is none."""
        ...

    async def list_flags(self, after_name: str, limit: int) -> Sequence[KeptFlag]:
        """Returns flags whose name sorts after another, by name."""
        ...


class FlagKeeping:
    """The operator's view of the flags."""

    def __init__(self, store: FlagStore, directory: TenantDirectory) -> None:
        self._store = store
        self._directory = directory

    async def put(self, flag: Flag, actor: Actor, *, expected_version: int, validate_only: bool) -> tuple[KeptFlag, bool]:
        """Keeps a flag; False with it when nothing changed. Raises: InvalidRequest, LimitExceeded(PLAN_LIMIT), WrongState."""

        def judge(before: FlagsBefore) -> None:
            _refuse_other_version(before.kept, expected_version)
            refuse_contradictions(flag, before.tiers)
            refuse_unknown_tenants(flag, before.tenants)
            _refuse_too_many({*before.names, flag.name})

        return await self._store.put(flag, judge, actor, validate_only=validate_only)

    async def delete(self, name: str, actor: Actor) -> None:
        """Removes a flag. Raises: NotFound."""
        if not await self._store.delete(name, actor):
            raise NotFound("flag")

    async def list(self, asked_size: int, token: str) -> tuple[Sequence[KeptFlag], str]:
        """Returns a page of flags by name and the token of the next. Raises: InvalidRequest(page_token)."""
        size = asked_size or MAX_PAGE_SIZE
        [after_name] = decode_page_token(token, _LISTING, 1) or [""]
        found = await self._store.list_flags(after_name, size + 1)
        return cut_page(found, size, lambda last: encode_page_token(_LISTING, [last.flag.name]))

    async def explain(self, tenant_id: TenantId) -> Sequence[Evaluation]:
        """Returns every flag's value for a tenant, by name, and what decided it. Raises: NotFound."""
        facts = await self._directory.get_facts(tenant_id)
        if facts is None:
            raise NotFound("tenant")
        return [evaluate(kept.flag, tenant_id, facts.tier) for kept in await self._store.list_flags("", MAX_FLAGS)]


def _refuse_other_version(kept: KeptFlag | None, expected_version: int) -> None:
    version = 0 if kept is None else kept.version
    if expected_version not in (0, version):
        raise WrongState("flag", f"VERSION_{version}", f"the flag is at version {version}, not {expected_version}; read it again")


def _refuse_too_many(names: Collection[str]) -> None:
    name_bytes = sum(map(len, names))
    if len(names) > MAX_FLAGS or name_bytes > MAX_NAME_BYTES:
        message = f"at most {MAX_FLAGS} flags, whose names together have at most {MAX_NAME_BYTES} bytes; delete one that is over"
        raise LimitExceeded(
            error_reason_pb2.ERROR_REASON_PLAN_LIMIT,
            message,
            None,
            [QuotaViolation("flags", message)],
            rule="flags",
            limit=str(MAX_FLAGS),
            used=str(len(names) - 1),
            remaining="0",
        )
