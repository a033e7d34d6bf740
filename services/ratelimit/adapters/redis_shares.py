"""What tenants took of provider accounts, in Redis: each method is one script. Keys start with the account in braces: one slot each."""

from collections.abc import Sequence
from importlib.resources import files
from typing import cast

from redis.exceptions import NoScriptError

from services.kernel.ids import ReservationId, TenantId
from services.ratelimit.adapters.redis_link import Link
from services.ratelimit.adapters.scripts import Script, make_script
from services.ratelimit.adapters.tenant_scripts import Argument
from services.ratelimit.provider_share import NOTHING_USED, WINDOW_US, AccountUse, CountedCall, ShareAnswer, ShareVerdict, TakenShare
from services.ratelimit.turn import Stand

KINDS = ("members", "active", "claims", "totals", "calls", "recent", "request_turns", "input_turns", "output_turns", "lines", "fronts")
# Bounds how long one script keeps the store from others.
_CALLS_A_SCRIPT = 50
_TICKETS_A_SCRIPT = 500
_NAMES = ("take", "count", "forget", "keep_places", "leave")


class RedisShares:
    """Implements ShareStore, and forgets erased tenants."""

    def __init__(self, link: Link, bulk: Link | None = None, *, window_us: int = WINDOW_US) -> None:
        self._link = link
        self._bulk = bulk or link
        self._window_us = window_us
        self._scripts = {name: _load(name) for name in _NAMES}

    async def take(
        self,
        account: str,
        limits: AccountUse,
        tenant_id: TenantId,
        weight: int,
        call_id: ReservationId,
        need: AccountUse,
        stand: Stand | None = None,
        attempt: int = 0,
    ) -> ShareAnswer:
        """Takes the need once, or says why not. A refusal takes nothing; it is remembered who lacks its share.

        `attempt`: who may give it back, 0 nobody. Of a call that has its share already one attempt more has it.
        """
        standing = (0, 0) if stand is None else (1 + stand.keep, stand.since_us)
        arguments = (str(tenant_id), weight, self._window_us, *limits.in_order(), *need.in_order(), call_id.bytes, *standing, attempt)
        verdict, *figures = cast("list[int]", await self._run(self._link, "take", account, *arguments))
        return ShareAnswer(ShareVerdict(verdict), *figures)

    async def count(self, account: str, calls: Sequence[CountedCall]) -> None:
        """Counts calls with what they used, where they are known and still in the window."""
        for start in range(0, len(calls), _CALLS_A_SCRIPT):
            arguments: list[Argument] = []
            for item in calls[start : start + _CALLS_A_SCRIPT]:
                arguments += (str(item.tenant_id), item.call_id.bytes, *item.use.in_order(), 0)
            await self._run(self._bulk, "count", account, self._window_us, *arguments)

    async def give_back(self, shares: Sequence[TakenShare]) -> None:
        """Takes attempts of one account off their calls' shares; what no attempt has any more is nobody's."""
        for start in range(0, len(shares), _CALLS_A_SCRIPT):
            arguments: list[Argument] = []
            for item in shares[start : start + _CALLS_A_SCRIPT]:
                arguments += (str(item.tenant_id), item.call_id.bytes, *NOTHING_USED.in_order(), item.attempt)
            # On the way of decisions: what comes back may be taken again at once.
            await self._run(self._link, "count", shares[0].account, self._window_us, *arguments)

    async def keep_places(self, account: str, tenant_id: TenantId, ids: Sequence[ReservationId]) -> list[bool]:
        """Prolongs tickets of those who wait for the account; tells of each whether it still has its place. Raises: Unavailable."""
        kept: list[bool] = []
        for start in range(0, len(ids), _TICKETS_A_SCRIPT):
            some = [item.bytes for item in ids[start : start + _TICKETS_A_SCRIPT]]
            answers = cast("list[int]", await self._run(self._bulk, "keep_places", account, str(tenant_id), *some))
            kept += [answer == 1 for answer in answers]
        return kept

    async def leave(self, account: str, tenant_id: TenantId, ids: Sequence[ReservationId]) -> None:
        """Takes tickets out of the account's line. Raises: Unavailable."""
        await self._run(self._link, "leave", account, str(tenant_id), *(item.bytes for item in ids))

    async def forget(self, account: str, tenant_id: TenantId) -> int:
        """Removes the tenant from the account; returns how many records there were."""
        return cast("int", await self._run(self._link, "forget", account, str(tenant_id)))

    async def holds(self, account: str, tenant_id: TenantId) -> bool:
        """Tells whether anything of the tenant is kept under the account."""
        member = await self._link.send("HEXISTS", _keys(account)[0], str(tenant_id))
        return member == 1 or await self._link.send("ZSCORE", _keys(account)[1], str(tenant_id)) is not None

    async def _run(self, link: Link, name: str, account: str, *arguments: Argument) -> object:
        script, keys = self._scripts[name], _keys(account)
        try:
            return await link.send("EVALSHA", script.sha, len(keys), *keys, *arguments)
        except NoScriptError:
            return await link.send("EVAL", script.text, len(keys), *keys, *arguments)


def _keys(account: str) -> list[str]:
    return [f"{{acct:{account}}}:{kind}" for kind in KINDS]


def _load(name: str) -> Script:
    folder = files("services.ratelimit.adapters.share_scripts")
    return make_script(name, "\n".join((folder / file).read_text("utf-8") for file in ("common.lua", "line.lua", f"{name}.lua")))
