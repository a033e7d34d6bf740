"""TenantService on the wire."""

from collections.abc import AsyncIterator

from mesh.tenant.v1 import tenant_service_pb2 as messages
from mesh.tenant.v1 import tenant_service_pb2_grpc
from services.kernel.cell import Cell
from services.kernel.errors import NotFound
from services.kernel.ids import TenantId, parse_uuid
from services.kernel.paging import cut_page, decode_page_token, encode_page_token, page_size
from services.kernel.request_context import current_tenant_id
from services.kernel.tenant_scan import scan_response
from services.kernel.timestamps import to_timestamp
from services.tenant.archive import TenantArchive
from services.tenant.erasure import ErasureWish, TenantErasure, is_clean
from services.tenant.provisioning import TenantProvisioning
from services.tenant.servicers.caller import acting_subject
from services.tenant.servicers.life_messages import progress, receipt_message
from services.tenant.servicers.limit_rules import limit_rules_message
from services.tenant.servicers.placement import placement_wish
from services.tenant.servicers.plan import ai_settings, feature_terms, plan_limits
from services.tenant.tenant_life import TenantLife
from services.tenant.tenant_record import Tenant, TenantConfig, TenantDirectory, TenantState
from services.tenant.tenant_wish import TenantWish
from services.tenant.text import printable

_LISTING = "tenants"
STATES = {
    TenantState.PROVISIONING: messages.TENANT_STATE_PROVISIONING,
    TenantState.ACTIVE: messages.TENANT_STATE_ACTIVE,
    TenantState.SUSPENDED: messages.TENANT_STATE_SUSPENDED,
    TenantState.ERASING: messages.TENANT_STATE_ERASING,
    TenantState.FAILED: messages.TENANT_STATE_FAILED,
}


class TenantServicer(tenant_service_pb2_grpc.TenantServiceServicer):
    """Makes, reads, suspends, exports and erases tenants."""

    def __init__(
        self,
        provisioning: TenantProvisioning,
        directory: TenantDirectory,
        life: TenantLife,
        erasure: TenantErasure,
        archive: TenantArchive,
        cell: Cell,
    ) -> None:
        self._provisioning = provisioning
        self._directory = directory
        self._life = life
        self._erasure = erasure
        self._archive = archive
        self._cell = cell

    async def CreateTenant(self, request: messages.CreateTenantRequest, context: object) -> messages.CreateTenantResponse:
        """Makes a tenant, or finishes making it."""
        self._cell.refuse_elsewhere(request.region)
        wish = TenantWish(
            slug=request.slug,
            display_name=printable(request.display_name, "display_name"),
            plan=printable(request.plan, "plan"),
            owner_email=printable(request.owner_email, "owner_email"),
            assistant_name=printable(request.assistant_name, "assistant_name"),
            placement=placement_wish(request.isolation, request.silo),
        )
        created = await self._provisioning.create(parse_uuid(request.request_id, "request_id"), wish, acting_subject())
        return messages.CreateTenantResponse(tenant=_tenant(created.tenant), api_key=created.api_key)

    async def GetTenant(self, request: messages.GetTenantRequest, context: object) -> messages.GetTenantResponse:
        """Returns the tenant of the call's context."""
        tenant = await self._directory.get_tenant(current_tenant_id())
        if tenant is None:
            raise NotFound("tenant")
        return messages.GetTenantResponse(tenant=_tenant(tenant))

    async def ListTenants(self, request: messages.ListTenantsRequest, context: object) -> messages.ListTenantsResponse:
        """Returns a page of tenants by slug."""
        size = page_size(request.page_size)
        [after_slug] = decode_page_token(request.page_token, _LISTING, 1) or [""]
        found = await self._directory.list_tenants(after_slug, size + 1)
        page, following = cut_page(found, size, lambda last: encode_page_token(_LISTING, [last.slug]))
        return messages.ListTenantsResponse(tenants=[_tenant(tenant) for tenant in page], next_page_token=following)

    async def GetTenantConfig(self, request: messages.GetTenantConfigRequest, context: object) -> messages.GetTenantConfigResponse:
        """Returns the newest configuration of the call's tenant."""
        config = await self._directory.get_config(current_tenant_id())
        if config is None:
            raise NotFound("tenant")
        return messages.GetTenantConfigResponse(config=config_message(config))

    async def WatchProvisioning(
        self, request: messages.WatchProvisioningRequest, context: object
    ) -> AsyncIterator[messages.WatchProvisioningResponse]:
        """Streams how a creation goes."""
        async for saga in self._life.watch(parse_uuid(request.request_id, "request_id")):
            yield progress(saga)

    async def SuspendTenant(self, request: messages.SuspendTenantRequest, context: object) -> messages.SuspendTenantResponse:
        """Suspends a tenant."""
        tenant = await self._life.suspend(_named(request.tenant_id), acting_subject())
        return messages.SuspendTenantResponse(tenant=_tenant(tenant))

    async def ResumeTenant(self, request: messages.ResumeTenantRequest, context: object) -> messages.ResumeTenantResponse:
        """Resumes a tenant."""
        tenant = await self._life.resume(_named(request.tenant_id), acting_subject())
        return messages.ResumeTenantResponse(tenant=_tenant(tenant))

    async def ExportTenantArchive(
        self, request: messages.ExportTenantArchiveRequest, context: object
    ) -> AsyncIterator[messages.ExportTenantArchiveResponse]:
        """Streams the archive of the call's tenant."""
        async for chunk in self._archive.chunks(current_tenant_id()):
            yield messages.ExportTenantArchiveResponse(chunk=chunk)

    async def EraseTenant(self, request: messages.EraseTenantRequest, context: object) -> messages.EraseTenantResponse:
        """Erases a tenant."""
        request_id = parse_uuid(request.request_id, "request_id")
        wish = ErasureWish(_named(request.tenant_id), request_id, request.confirm_slug, tuple(request.canaries))
        return messages.EraseTenantResponse(receipt=receipt_message(await self._erasure.erase(wish, acting_subject())))

    async def GetErasureReceipt(self, request: messages.GetErasureReceiptRequest, context: object) -> messages.GetErasureReceiptResponse:
        """Returns a receipt."""
        receipt = await self._erasure.receipt(_named(request.tenant_id))
        return messages.GetErasureReceiptResponse(receipt=receipt_message(receipt))

    async def VerifyErasure(self, request: messages.VerifyErasureRequest, context: object) -> messages.VerifyErasureResponse:
        """Looks for what is left of an erased tenant."""
        found = await self._erasure.verify(_named(request.tenant_id), list(request.canaries))
        return messages.VerifyErasureResponse(verified=is_clean(found), stores=scan_response(found).stores)


def _named(tenant_id: str) -> TenantId:
    return TenantId(parse_uuid(tenant_id, "tenant_id"))


def _tenant(tenant: Tenant) -> messages.Tenant:
    return messages.Tenant(
        tenant_id=str(tenant.tenant_id),
        slug=tenant.slug,
        display_name=tenant.display_name,
        plan=tenant.plan,
        region=tenant.region,
        state=STATES[tenant.state],
        create_time=to_timestamp(tenant.create_time),
    )


def config_message(config: TenantConfig) -> messages.TenantConfig:
    """Returns what the services are told of a tenant, as a message."""
    ai = ai_settings(config.plan, config.assistant_name)
    ai.system_prompt_prefix, ai.dedicated_endpoint = config.system_prompt_prefix, config.dedicated_endpoint
    return messages.TenantConfig(
        tenant_id=str(config.tenant_id),
        version=config.version,
        tier=config.plan.name,
        region=config.region,
        limits=plan_limits(config.plan),
        ai=ai,
        display_name=config.display_name,
        data_retention_days=config.plan.data_retention_days,
        encrypt_content=config.plan.encrypt_content,
        features=feature_terms(config.plan),
        limit_rules=limit_rules_message(config.limit_rules, config.plan.weight),
    )
