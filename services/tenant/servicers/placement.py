"""PlacementService on the wire."""

from mesh.common.v1 import error_reason_pb2
from mesh.tenant.v1 import placement_service_pb2 as messages
from mesh.tenant.v1 import placement_service_pb2_grpc
from services.kernel.errors import Forbidden, NotFound
from services.kernel.placement import PlacementKind
from services.kernel.request_context import current_caller, current_tenant, current_tenant_id
from services.kernel.timestamps import to_timestamp
from services.tenant.context_minting import PROVISIONING_SUBJECT
from services.tenant.moving import TenantMoves
from services.tenant.placement import Placement, Placements, PlacementWish, SiloStores, StoredPlace
from services.tenant.servicers.caller import acting_subject

_TO_PROTO = {
    PlacementKind.POOL: messages.ISOLATION_POOL,
    PlacementKind.BRIDGE: messages.ISOLATION_BRIDGE,
    PlacementKind.SILO: messages.ISOLATION_SILO,
}
_FROM_PROTO = {value: kind for kind, value in _TO_PROTO.items()}


class PlacementServicer(placement_service_pb2_grpc.PlacementServiceServicer):
    """Tells where the call's tenant is."""

    def __init__(self, placements: Placements, moves: TenantMoves) -> None:
        self._placements = placements
        self._moves = moves

    async def GetPlacement(self, request: messages.GetPlacementRequest, context: object) -> messages.GetPlacementResponse:
        """Answers for the calling service."""
        tenant_id, service = current_tenant_id(), current_caller()
        placement = await self._found()
        place, following = placement.place_for(service), placement.following_for(service)
        schema_name = f"t_{tenant_id.hex}"
        response = messages.GetPlacementResponse(place=_place(place, service, schema_name))
        if following is not None:
            response.following.CopyFrom(_place(following, service, schema_name))
        if request.for_tables:
            _refuse_but_the_makers()
            response.migration_dsn = (following or place).stores.owner_dsn_for(service)
        return response

    async def DescribePlacement(self, request: messages.DescribePlacementRequest, context: object) -> messages.DescribePlacementResponse:
        """Answers without secrets."""
        return messages.DescribePlacementResponse(placement=_state(await self._found()))

    async def MoveTenant(self, request: messages.MoveTenantRequest, context: object) -> messages.MoveTenantResponse:
        """Moves the tenant the operator named."""
        wish = placement_wish(request.to, request.silo)
        placement = await self._moves.move(current_tenant_id(), wish, acting_subject())
        return messages.MoveTenantResponse(placement=_state(placement))

    async def _found(self) -> Placement:
        placement = await self._placements.get(current_tenant_id())
        if placement is None:
            raise NotFound("tenant")
        return placement


def _refuse_but_the_makers() -> None:
    # With it a service could take down the tenant's walls: only work that this service itself began gets the owner's DSN.
    if current_tenant().subject != PROVISIONING_SUBJECT:
        raise Forbidden(
            error_reason_pb2.ERROR_REASON_CALLER_NOT_ALLOWED,
            "for_tables is for work the tenant service began; ask without it",
            caller=current_caller(),
            method="GetPlacement",
        )


def placement_wish(isolation: int, silo: messages.SiloStores) -> PlacementWish:
    """Reads what place a caller wants."""
    stores = SiloStores(
        silo.postgres_dsn,
        silo.postgres_owner_dsn,
        silo.qdrant_url,
        silo.qdrant_api_key,
        retrieval_dsn=silo.retrieval_postgres_dsn,
        inference_dsn=silo.inference_postgres_dsn,
    )
    return PlacementWish(_FROM_PROTO.get(isolation, PlacementKind.POOL), stores)  # type: ignore[call-overload] # an enum's number


def _place(place: StoredPlace, service: str, schema_name: str) -> messages.Place:
    return messages.Place(
        isolation=_TO_PROTO[place.kind],
        schema_name=schema_name if place.kind is PlacementKind.BRIDGE else "",
        postgres_dsn=place.stores.dsn_for(service),
        qdrant_url=place.stores.qdrant_url,
        qdrant_api_key=place.stores.qdrant_api_key,
    )


def _state(placement: Placement) -> messages.PlacementState:
    moving_to = messages.ISOLATION_UNSPECIFIED if placement.following is None else _TO_PROTO[placement.following.kind]
    return messages.PlacementState(
        isolation=_TO_PROTO[placement.place.kind],
        moving_to=moving_to,
        moved_services=sorted(placement.moved_services),
        update_time=None if placement.update_time is None else to_timestamp(placement.update_time),
    )
