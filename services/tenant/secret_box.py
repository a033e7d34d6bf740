"""Seals secrets a tenant entrusts to this service under its own data key, each for one purpose: a value moved elsewhere does not open."""

from services.kernel.ids import TenantId
from services.kernel.sealing import SealBroken, VersionUnknown, row_identity
from services.tenant.authentication import UsageTrail
from services.tenant.data_keys import DataKeyVault, report_key_failure


class SecretBox:
    """Seals and opens; stores nothing."""

    def __init__(self, vault: DataKeyVault, trail: UsageTrail) -> None:
        self._vault = vault
        self._trail = trail

    async def seal(self, tenant_id: TenantId, purpose: str, plaintext: bytes) -> bytes:
        """Seals under the active key; `purpose` names what and where it is. Raises: WrongState(DESTROYED), Unavailable."""
        return (await self._vault.keys(tenant_id)).seal(plaintext, _identity(purpose))

    async def open(self, tenant_id: TenantId, purpose: str, sealed: bytes) -> bytes:
        """Opens what was sealed for the same tenant and purpose. Raises: KeyUseFailed, which is on record; WrongState, Unavailable."""
        keys = await self._vault.keys(tenant_id)
        try:
            return keys.open(sealed, _identity(purpose))
        except (SealBroken, VersionUnknown):
            report_key_failure(self._trail, tenant_id, f"secret:{purpose}")

    async def reseal(self, tenant_id: TenantId, purpose: str, sealed: bytes) -> bytes:
        """Opens and seals under the key that is active now."""
        return await self.seal(tenant_id, purpose, await self.open(tenant_id, purpose, sealed))


def _identity(purpose: str) -> bytes:
    return row_identity("tenant.secret", purpose)
