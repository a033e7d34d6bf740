"""DomainService on the wire."""

from mesh.tenant.v1 import domain_service_pb2 as messages
from mesh.tenant.v1 import domain_service_pb2_grpc
from services.kernel.request_context import current_tenant_id
from services.kernel.timestamps import to_timestamp
from services.tenant.domain import Domain, DomainRegistry
from services.tenant.servicers.caller import acting_subject


class DomainServicer(domain_service_pb2_grpc.DomainServiceServicer):
    """Gives domains to the tenant an operator names."""

    def __init__(self, registry: DomainRegistry) -> None:
        self._registry = registry

    async def AddDomain(self, request: messages.AddDomainRequest, context: object) -> messages.AddDomainResponse:
        """Gives a domain."""
        return messages.AddDomainResponse(domain=_domain(await self._registry.add(current_tenant_id(), request.domain, acting_subject())))

    async def ListDomains(self, request: messages.ListDomainsRequest, context: object) -> messages.ListDomainsResponse:
        """Lists domains."""
        return messages.ListDomainsResponse(domains=[_domain(domain) for domain in await self._registry.list(current_tenant_id())])

    async def RemoveDomain(self, request: messages.RemoveDomainRequest, context: object) -> messages.RemoveDomainResponse:
        """Takes a domain."""
        await self._registry.remove(current_tenant_id(), request.domain, acting_subject())
        return messages.RemoveDomainResponse()


def _domain(domain: Domain) -> messages.Domain:
    return messages.Domain(domain=domain.domain, create_time=to_timestamp(domain.create_time))
