"""What others do in a tenant's beginning and end, as ports."""

from collections.abc import Sequence
from typing import Protocol
from uuid import UUID

from services.kernel.ids import TenantId
from services.tenant.placement import PlacementWish, Refusal, never


class PlaceKeeper(Protocol):
    """Where a tenant's content is: made before anything is put there, dropped after everything is removed. Safe to repeat."""

    async def refuse_impossible(self, wish: PlacementWish) -> None:
        """Refuses a wish that could not be fulfilled, before anything is recorded. Raises: InvalidRequest, WrongState, Unavailable."""
        ...

    async def settle(self, tenant_id: TenantId, wish: PlacementWish, lease: UUID, refuse_unwanted: Refusal = never) -> None:
        """Makes the tenant's schema or database, empty. Raises: MeshError, LeaseLost unless that is still the creation's."""
        ...

    async def drop(self, tenant_id: TenantId) -> Sequence[str]:
        """Drops the tenant's own schema or database, if it has one, and says what was dropped. Raises: MeshError."""
        ...


class DataKeyStore(Protocol):
    """The tenant's own data keys."""

    async def destroy(self, tenant_id: TenantId) -> int:
        """Destroys every data key, so that no backup opens any more; returns how many there were. Safe to repeat. Raises: MeshError."""
        ...


class SecretSeal(Protocol):
    """Seals what must be kept until it is used, under the tenant's own data key."""

    async def seal(self, tenant_id: TenantId, purpose: str, plaintext: bytes) -> bytes:
        """Returns the sealed form. Raises: MeshError."""
        ...

    async def open(self, tenant_id: TenantId, purpose: str, sealed: bytes) -> bytes:
        """Returns what was sealed for the same tenant and purpose. Raises: MeshError."""
        ...
