"""Makes the demo tenants and gives them their handbooks; leaves alone what is there already."""

import uuid

import grpc

from devstack.handbook import COMPANIES, Company, documents
from devstack.managed_process import ProcessFailedError
from devstack.mesh_client import MeshClient, credentials, operator_credentials, refusal
from devstack.stack import Progress, Stack
from devstack.state import DemoTenant
from mesh.retrieval.v1 import document_service_pb2
from mesh.tenant.v1 import placement_service_pb2, tenant_service_pb2

PROVISION_TIMEOUT_SECONDS = 30.0
UPSERT_TIMEOUT_SECONDS = 30.0
OPERATOR_REASON = "demo tenants of the embedded stack"


async def provision_demo_tenants(stack: Stack, client: MeshClient, progress: Progress) -> None:
    """Provisions every demo company that is not known yet and ingests its documents.

    Raises: ProcessFailedError with the refusal's own words.
    """
    for company in COMPANIES:
        try:
            if company.slug not in stack.state.tenants:
                stack.state.tenants[company.slug] = await create_tenant(stack, client, company)
                stack.state.save()
            changed = await ingest(client, company, stack.state.tenants[company.slug])
        except grpc.aio.AioRpcError as error:
            told = refusal(error)
            raise ProcessFailedError(f"making tenant {company.slug} failed: {told.code} {told.reason}: {told.message}") from error
        progress(f"tenant {company.display_name} ({company.plan}): {len(documents(company))} documents, {changed} new or changed")


async def create_tenant(stack: Stack, client: MeshClient, company: Company, *, isolation: str = "pool") -> DemoTenant:
    """Creates a company's tenant and returns it with its first API key."""
    # The id follows from the stack's own secret, so a run that was killed half-way is resumed and not repeated.
    request_id = uuid.uuid5(uuid.NAMESPACE_URL, f"{stack.state.secrets.operator_key_sha256}/{company.slug}")
    response = await client.tenants.CreateTenant(
        tenant_service_pb2.CreateTenantRequest(
            request_id=str(request_id),
            slug=company.slug,
            display_name=company.display_name,
            plan=company.plan,
            owner_email=company.owner_email,
            assistant_name=company.assistant_name,
            isolation=placement_service_pb2.Isolation.Value(f"ISOLATION_{isolation.upper()}"),
        ),
        metadata=operator_credentials(stack.state.secrets.operator_key, OPERATOR_REASON),
        timeout=PROVISION_TIMEOUT_SECONDS,
    )
    return DemoTenant(company.slug, response.tenant.tenant_id, response.api_key)


async def ingest(client: MeshClient, company: Company, tenant: DemoTenant) -> int:
    """Upserts a company's documents and returns how many were new or changed."""
    request = document_service_pb2.UpsertDocumentsRequest(
        documents=[document_service_pb2.DocumentInput(document_key=key, title=title, text=text) for key, title, text in documents(company)]
    )
    response = await client.documents.UpsertDocuments(request, metadata=credentials(tenant.api_key), timeout=UPSERT_TIMEOUT_SECONDS)
    return int(response.changed_count)
