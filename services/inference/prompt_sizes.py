"""How large tenants' prompts were last seen: what to hold for a prompt that will be read a moment later. A guess that is always checked."""

from collections import OrderedDict

from services.kernel.ids import TenantId

UNSEEN_PROMPT_BYTES = 2_000
CAPACITY = 100_000


class PromptSizes:
    """Bytes of the newest prompt by tenant, the least recently used forgotten first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._bytes: OrderedDict[TenantId, int] = OrderedDict()

    def expected(self, tenant_id: TenantId) -> int:
        """Returns the bytes to hold for the tenant's prompt."""
        return self._bytes.get(tenant_id, UNSEEN_PROMPT_BYTES)

    def seen(self, tenant_id: TenantId, byte_count: int) -> None:
        """Keeps the size of a prompt that was just read."""
        self._bytes[tenant_id] = byte_count
        self._bytes.move_to_end(tenant_id)
        if len(self._bytes) > self._capacity:
            self._bytes.popitem(last=False)
