"""What tenants took of provider accounts, in Redis: each method is one script. Keys start with the account in braces: one slot each."""

from importlib.resources import files
from typing import cast

from redis.exceptions import NoScriptError

from services.kernel.ids import TenantId
from services.ratelimit.adapters.redis_link import Link
from services.ratelimit.adapters.scripts import Script, make_script
from services.ratelimit.provider_share import WINDOW_US, AccountUse, ShareAnswer, ShareVerdict, TakenShare

KINDS = ("members", "active", "lacking", "totals")


class RedisShares:
    """Implements ShareStore, and forgets erased tenants."""

    def __init__(self, link: Link, *, window_us: int = WINDOW_US) -> None:
        self._link = link
        self._window_us = window_us
        self._scripts = {name: _load(name) for name in ("take", "give_back", "forget")}

    async def take(self, account: str, limits: AccountUse, tenant_id: TenantId, weight: int, need: AccountUse) -> ShareAnswer:
        """Takes the need, or says why not. A refusal takes nothing; it is remembered who lacks its share."""
        reply = await self._run("take", account, str(tenant_id), weight, self._window_us, *limits.in_order(), *need.in_order())
        verdict, *figures = cast("list[int]", reply)
        return ShareAnswer(ShareVerdict(verdict), *figures)

    async def give_back(self, share: TakenShare, unused: AccountUse) -> None:
        """Takes off what was not used, where it is still in the window."""
        await self._run("give_back", share.account, str(share.tenant_id), self._window_us, share.taken_us, *unused.in_order())

    async def forget(self, account: str, tenant_id: TenantId) -> int:
        """Removes the tenant from the account; returns how many records there were."""
        return cast("int", await self._run("forget", account, str(tenant_id)))

    async def holds(self, account: str, tenant_id: TenantId) -> bool:
        """Tells whether anything of the tenant is kept under the account."""
        member = await self._link.send("HEXISTS", _keys(account)[0], str(tenant_id))
        return member == 1 or await self._link.send("ZSCORE", _keys(account)[1], str(tenant_id)) is not None

    async def _run(self, name: str, account: str, *arguments: str | int) -> object:
        script, keys = self._scripts[name], _keys(account)
        try:
            return await self._link.send("EVALSHA", script.sha, len(keys), *keys, *arguments)
        except NoScriptError:
            return await self._link.send("EVAL", script.text, len(keys), *keys, *arguments)


def _keys(account: str) -> list[str]:
    return [f"{{acct:{account}}}:{kind}" for kind in KINDS]


def _load(name: str) -> Script:
    folder = files("services.ratelimit.adapters.share_scripts")
    return make_script(name, "\n".join((folder / file).read_text("utf-8") for file in ("common.lua", f"{name}.lua")))
