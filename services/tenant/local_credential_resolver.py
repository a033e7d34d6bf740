"""The tenant service's own entrances: the same authentication as everybody's, without a call to itself."""

from services.kernel.ids import TenantId
from services.kernel.request_context import current_peer_address, operator_reason, tenant_host, tenant_path
from services.kernel.tenant_context import TenantContext
from services.tenant.authentication import Authenticator, CredentialAttempt


class LocalCredentialResolver:
    """Resolves credentials in process, each one afresh."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def resolve(self, credential: str, claimed_tenant_id: TenantId | None) -> TenantContext:
        """Returns who the credential proves. Raises: Unauthenticated, Forbidden, Unavailable."""
        attempt = CredentialAttempt(
            credential, claimed_tenant_id, operator_reason(), current_peer_address(), tenant_host()[:512], tenant_path()[:2048]
        )
        return await self._authenticator.authenticate(attempt)
