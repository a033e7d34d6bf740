"""What is remembered of credentials: bounded, forgotten by tenant, and never kept when a change overtook it on its way here."""

from collections import OrderedDict
from dataclasses import dataclass

from services.kernel.ids import TenantId
from services.kernel.tenant_context import TenantContext

# SHA-256 of the credential, the claimed tenant, the caller's address, the operator's reason, and the host and path named beside it.
CacheKey = tuple[bytes, TenantId | None, str, str, str, str]
_HOST = 4
# The kind of a change that says whose a host is.
_DOMAIN = "DOMAIN"

_OVERTAKEN_CAPACITY = 10_000


@dataclass(frozen=True, slots=True)
class Answer:
    """Who a credential proved; both times on time.monotonic()."""

    context: TenantContext
    asked_at: float
    # From here on a new answer is asked for: calls that begin with a token must find it alive at their end.
    renew_at: float


class CredentialAnswers:
    """The newest answers by question; `forget` is a listener for the change feed."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._answers: OrderedDict[CacheKey, Answer] = OrderedDict()
        self._keys_of: dict[TenantId | None, set[CacheKey]] = {}
        self._heard = 0
        # Whose answers were forgotten when, for questions that are still under way.
        self._forgotten: dict[TenantId, int] = {}
        self._all_forgotten = 0
        self._hosts_forgotten = 0

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def heard(self) -> int:
        """How many changes were heard: read it before asking, and give it to `keep`."""
        return self._heard

    def get(self, key: CacheKey) -> Answer | None:
        """Returns the answer to a question."""
        return self._answers.get(key)

    def keep(self, key: CacheKey, answer: Answer, heard: int) -> bool:
        """Remembers an answer; False when a change of its tenant was heard since it was asked for: it may tell of the time before."""
        tenant_id = answer.context.tenant_id
        forgotten = 0 if tenant_id is None else self._forgotten.get(tenant_id, 0)
        self.drop(key)
        if max(forgotten, self._all_forgotten, self._hosts_forgotten if key[_HOST] else 0) > heard:
            return False
        self._answers[key] = answer
        self._keys_of.setdefault(tenant_id, set()).add(key)
        while len(self._answers) > self._capacity:
            self.drop(next(iter(self._answers)))
        return True

    def drop(self, key: CacheKey) -> None:
        """Forgets one answer."""
        answer = self._answers.pop(key, None)
        if answer is None:
            return
        tenant_id = answer.context.tenant_id
        keys = self._keys_of[tenant_id]
        keys.discard(key)
        if not keys:
            del self._keys_of[tenant_id]

    def forget(self, tenant_id: TenantId | None, kind: str) -> None:
        """Forgets every answer of a tenant, or of everybody, whatever it was that changed; with its domains, of whoever came by a host."""
        self._heard += 1
        if tenant_id is None or len(self._forgotten) >= _OVERTAKEN_CAPACITY:
            self._all_forgotten = self._heard
            self._forgotten.clear()
        if tenant_id is None:
            self._answers.clear()
            self._keys_of.clear()
            return
        self._forgotten[tenant_id] = self._heard
        for key in list(self._keys_of.get(tenant_id, ())):
            self.drop(key)
        if kind == _DOMAIN:
            self._forget_hosts()

    def _forget_hosts(self) -> None:
        # A host that was nobody's claimed nothing, whoever came by it; it is this tenant's now, and must agree with the credential.
        self._hosts_forgotten = self._heard
        for key in [key for key in self._answers if key[_HOST]]:
            self.drop(key)

    def nothing_is_asked(self) -> None:
        """Says that no question is under way: none can be overtaken by what was heard so far."""
        self._forgotten.clear()
