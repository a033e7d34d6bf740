"""IssuerService on the wire."""

from datetime import timedelta

from mesh.tenant.v1 import issuer_service_pb2 as messages
from mesh.tenant.v1 import issuer_service_pb2_grpc
from services.kernel.ids import parse_uuid
from services.kernel.request_context import current_tenant, current_tenant_id
from services.kernel.timestamps import to_timestamp
from services.tenant.issuer import Issuer, IssuerRegistry, IssuerTerms
from services.tenant.json_web_key import Algorithm
from services.tenant.servicers.caller import acting_subject

_ALGORITHMS = {
    messages.JWT_ALGORITHM_RS256: Algorithm.RS256,
    messages.JWT_ALGORITHM_PS256: Algorithm.PS256,
    messages.JWT_ALGORITHM_ES256: Algorithm.ES256,
    messages.JWT_ALGORITHM_EDDSA: Algorithm.EDDSA,
}
_ON_THE_WIRE = {algorithm: value for value, algorithm in _ALGORITHMS.items()}


class IssuerServicer(issuer_service_pb2_grpc.IssuerServiceServicer):
    """Keeps the issuers of the call's tenant."""

    def __init__(self, registry: IssuerRegistry) -> None:
        self._registry = registry

    async def AddIssuer(self, request: messages.AddIssuerRequest, context: object) -> messages.AddIssuerResponse:
        """Registers an issuer."""
        terms = IssuerTerms(
            issuer=request.issuer,
            audience=request.audience,
            jwks_uri=request.jwks_uri,
            algorithms=tuple(_ALGORITHMS[value] for value in request.algorithms),
            scopes=frozenset(request.scopes),
            clock_skew=timedelta(seconds=request.clock_skew_seconds),
        )
        return messages.AddIssuerResponse(issuer=_issuer(await self._registry.add(current_tenant_id(), terms, acting_subject())))

    async def ListIssuers(self, request: messages.ListIssuersRequest, context: object) -> messages.ListIssuersResponse:
        """Lists issuers."""
        return messages.ListIssuersResponse(issuers=[_issuer(issuer) for issuer in await self._registry.list(current_tenant_id())])

    async def SetIssuerScopes(self, request: messages.SetIssuerScopesRequest, context: object) -> messages.SetIssuerScopesResponse:
        """Replaces what an issuer may grant."""
        issuer_id, scopes = parse_uuid(request.issuer_id, "issuer_id"), frozenset(request.scopes)
        issuer = await self._registry.set_scopes(current_tenant_id(), current_tenant().scopes, issuer_id, scopes, acting_subject())
        return messages.SetIssuerScopesResponse(issuer=_issuer(issuer))

    async def RemoveIssuer(self, request: messages.RemoveIssuerRequest, context: object) -> messages.RemoveIssuerResponse:
        """Removes an issuer."""
        await self._registry.remove(current_tenant_id(), parse_uuid(request.issuer_id, "issuer_id"), acting_subject())
        return messages.RemoveIssuerResponse()


def _issuer(issuer: Issuer) -> messages.Issuer:
    terms = issuer.terms
    return messages.Issuer(
        issuer_id=str(issuer.issuer_id),
        issuer=terms.issuer,
        audience=terms.audience,
        jwks_uri=terms.jwks_uri,
        algorithms=[_ON_THE_WIRE[algorithm] for algorithm in terms.algorithms],
        scopes=sorted(terms.scopes),
        clock_skew_seconds=int(terms.clock_skew.total_seconds()),
        create_time=to_timestamp(issuer.create_time),
    )
