"""Tenants' custom domains. Refuses a domain that another tenant has, and a twenty-first."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from services.kernel.errors import AlreadyExists, NotFound
from services.kernel.ids import TenantId
from services.tenant.actor import Actor
from services.tenant.domain_name import read_domain
from services.tenant.full import too_many

MAX_DOMAINS = 20


@dataclass(frozen=True, slots=True)
class Domain:
    """A host that names a tenant."""

    domain: str
    create_time: datetime


class DomainTaken(Exception):
    """Another tenant has the domain."""


class DomainStore(Protocol):
    """Where domains are kept. Every method is one transaction of that tenant."""

    async def add_domain(self, tenant_id: TenantId, domain: str, max_domains: int, actor: Actor) -> Domain | None:
        """Keeps the domain, or returns it as it is kept; None at `max_domains`. Raises: DomainTaken."""
        ...

    async def list_domains(self, tenant_id: TenantId) -> Sequence[Domain]:
        """Returns the tenant's domains by name."""
        ...

    async def remove_domain(self, tenant_id: TenantId, domain: str, actor: Actor) -> bool:
        """Removes the domain; False when the tenant does not have it."""
        ...


class DomainRegistry:
    """The domains of whichever tenant an operator names."""

    def __init__(self, store: DomainStore, base_domains: Sequence[str]) -> None:
        self._store = store
        self._base_domains = tuple(base_domains)

    async def add(self, tenant_id: TenantId, text: str, actor: Actor) -> Domain:
        """Gives the tenant the domain; idempotent. Raises: InvalidRequest, AlreadyExists, LimitExceeded(PLAN_LIMIT)."""
        name = read_domain(text, "domain", self._base_domains)
        try:
            domain = await self._store.add_domain(tenant_id, name, MAX_DOMAINS, actor)
        except DomainTaken:
            raise AlreadyExists("domain", "domain", f"the domain {name} is another tenant's") from None
        if domain is None:
            raise too_many(tenant_id, "domains", "domains", MAX_DOMAINS)
        return domain

    async def list(self, tenant_id: TenantId) -> Sequence[Domain]:
        """Returns the tenant's domains."""
        return await self._store.list_domains(tenant_id)

    async def remove(self, tenant_id: TenantId, text: str, actor: Actor) -> None:
        """Takes the domain. Raises: InvalidRequest, NotFound for one the tenant does not have."""
        if not await self._store.remove_domain(tenant_id, read_domain(text, "domain"), actor):
            raise NotFound("domain")
