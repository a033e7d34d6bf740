"""The scripts as they are, but for their clock: they read the time that a test sets, so that days pass in no time, to the microsecond."""

from uuid import uuid4

from services.ratelimit.adapters.redis_link import Link
from services.ratelimit.adapters.scripts import NAMES, load_script, make_script
from services.ratelimit.adapters.tenant_scripts import TenantScripts
from tests.ratelimit.callers import now_us

_OWN_TIME = """local function store_time()
  local t = call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end"""
_SET_TIME = """local function store_time()
  return tonumber(call('GET', '%s'))
end"""


class SetClockScripts(TenantScripts):
    """Every tenant's scripts on one clock. It stands still until it is set, and begins with the machine's time."""

    def __init__(self, link: Link) -> None:
        super().__init__(link, link)
        self.now_us = now_us()
        self._key = f"clock:{uuid4()}"
        self._scripts = {name: make_script(name, self._text(name)) for name in NAMES}

    async def set_clock(self, to_us: int) -> None:
        """Sets the time of everything that follows."""
        self.now_us = to_us
        await self.link.send("SET", self._key, to_us)

    def _text(self, name: str) -> str:
        text = load_script(name).text
        assert text.count(_OWN_TIME) == text.count("'TIME'") <= 1, "a script that reads the time does so in one place"
        return text.replace(_OWN_TIME, _SET_TIME % self._key)
