"""Which tenant a host or a path names. Authenticates nobody: the answer is whose page to show, or a claim to hold against a credential."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.kernel.errors import InvalidRequest, NotFound
from services.kernel.ids import TenantId
from services.tenant.credential_refusals import mismatch
from services.tenant.domain_name import NameClaim, read_claim
from services.tenant.tenant_record import Tenant, TenantDirectory


@dataclass(frozen=True, slots=True)
class Named:
    """Whose the names of a claim are; None for a name that was not claimed or that nobody has."""

    host_slug: TenantId | None
    domain: TenantId | None
    path_slug: TenantId | None


class NameStore(Protocol):
    """Where slugs and domains are looked up, over all tenants."""

    async def find_names(self, claim: NameClaim) -> Named:
        """Returns whose each name is, in one round trip."""
        ...


class NameResolution:
    """Resolves what front ends say callers asked them for."""

    def __init__(self, store: NameStore, directory: TenantDirectory, base_domains: Sequence[str]) -> None:
        self._store = store
        self._directory = directory
        self._base_domains = tuple(base_domains)

    async def claimed_tenants(self, host: str, path: str) -> frozenset[TenantId | None]:
        """Returns every tenant that is claimed, None among them for a slug nobody has; empty when nothing is claimed.

        A domain that nobody has claims nothing: front ends are called by names of their own, too.
        """
        claim = read_claim(host, path, self._base_domains)
        if claim.is_empty:
            return frozenset()
        named = await self._store.find_names(claim)
        claimed: set[TenantId | None] = set()
        if claim.host_slug is not None:
            claimed.add(named.host_slug)
        if named.domain is not None:
            claimed.add(named.domain)
        if claim.path_slug is not None:
            claimed.add(named.path_slug)
        return frozenset(claimed)

    async def resolve(self, host: str, path: str) -> Tenant:
        """Returns the tenant. Raises: InvalidRequest without a name, NotFound for names nobody has, Forbidden(TENANT_MISMATCH) for two."""
        if not host and not path:
            raise InvalidRequest("host", "neither host nor path was sent; send the host or the path your caller asked for, as it came")
        claimed = await self.claimed_tenants(host, path)
        if len(claimed - {None}) > 1:
            raise mismatch("the path")
        if len(claimed) != 1:
            raise _nobody()
        [tenant_id] = claimed
        tenant = None if tenant_id is None else await self._directory.get_tenant(tenant_id)
        if tenant is None:
            raise _nobody()
        return tenant


def _nobody() -> NotFound:
    return NotFound("tenant", "no tenant has this host or path; check its spelling, or have the operator add the domain to the tenant")
