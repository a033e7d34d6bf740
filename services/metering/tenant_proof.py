"""Whether a context token proves the tenant an item of a batch names. A token that cannot be judged now is no proof and no disproof."""

from services.kernel.context_token import ContextTokenVerifier
from services.kernel.errors import Unauthenticated


class TenantProof:
    """Judges tokens by the kernel's verifier, which remembers those it has seen."""

    def __init__(self, verifier: ContextTokenVerifier) -> None:
        self._verifier = verifier

    async def tier_of(self, context_token: str, tenant_id: bytes) -> str | None:
        """Returns the plan tier of a valid token of that tenant, None for any other.

        Raises: Unavailable when the signing keys cannot be fetched.
        """
        try:
            context = await self._verifier.verify(context_token)
        except Unauthenticated:
            return None
        return context.tier if context.tenant_id is not None and context.tenant_id.bytes == tenant_id else None
