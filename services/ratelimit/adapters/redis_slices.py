"""Slices in Redis: each is one script, so one atomic step."""

from collections.abc import Sequence
from typing import cast

from services.kernel.ids import TenantId
from services.ratelimit.adapters.tenant_scripts import Argument, TenantScripts
from services.ratelimit.limit_rule import SECOND_US
from services.ratelimit.packing import packed
from services.ratelimit.request import LARGEST_ID_AGE_SECONDS, minted_us
from services.ratelimit.slice import SliceAnswer, SliceRequest, SliceReturn
from services.ratelimit.standing import Verdict
from services.ratelimit.terms import Plan, Terms

_FORGET_US = 2 * LARGEST_ID_AGE_SECONDS * SECOND_US
# One holder gets such a part of what is left, so that the next ones find something too.
_PART = 4
_RETURNS_A_SCRIPT = 50


class RedisSlices:
    """Implements the store of slices."""

    def __init__(self, scripts: TenantScripts) -> None:
        self._scripts = scripts

    async def take(self, tenant_id: TenantId, terms: Terms, plan: Plan, request: SliceRequest) -> SliceAnswer:
        """Charges as many as are wanted, or as the rules let one holder have; or says why none."""
        head = (_FORGET_US, LARGEST_ID_AGE_SECONDS * SECOND_US, terms.version, terms.families_digest, plan.packed)
        own = (request.slice_id.bytes, minted_us(request.slice_id), request.quantity, request.lease_us, _PART, packed(plan.lanes))
        word, *rest = cast("list[object]", await self._scripts.run("take_slice", tenant_id, *head, *own))
        if word == b"rebuild":
            return SliceAnswer(Verdict.REBUILD)
        if word == b"behind":
            return SliceAnswer(Verdict.BEHIND, version=cast("int", rest[0]))
        now_us, epoch, (verdict, quantity, lease_us, largest_use, *figures) = cast("tuple[int, int, list[int]]", rest)
        return SliceAnswer(Verdict(verdict), now_us, epoch, figures=figures, quantity=quantity, lease_us=lease_us, largest_use=largest_use)

    async def give_back(self, tenant_id: TenantId, returns: Sequence[SliceReturn]) -> int:
        """Takes back what was not used; ignores slices that are over. Returns how many ended by it."""
        ended = 0
        for start in range(0, len(returns), _RETURNS_A_SCRIPT):
            arguments: list[Argument] = []
            for item in returns[start : start + _RETURNS_A_SCRIPT]:
                arguments += (item.slice_id.bytes, item.epoch, item.used)
            ended += cast("int", await self._scripts.run("return_slices", tenant_id, *arguments))
        return ended
