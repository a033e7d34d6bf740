"""A product that signs its users in by itself calls inference with their JWTs, for as long as the tenant lets its issuer."""

import secrets

import grpc

from devstack.mesh_client import credentials, operator_credentials, refusal
from mesh.inference.v1 import inference_service_pb2
from mesh.tenant.v1 import issuer_service_pb2, issuer_service_pb2_grpc
from tests.support.jwks import SigningKey, claims_of, running_jwks
from tests.support.mesh import Mesh
from tests.support.waiting import eventually

# The promise is one second and is held by `python -m bench revocation`; a loaded machine only has to show that the end comes.
GENEROUS_SECONDS = 5.0
MESSAGE = inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text="Hello.")
QUESTION = inference_service_pb2.GenerateRequest(messages=[MESSAGE], options=inference_service_pb2.GenerateOptions(max_output_tokens=1))


async def answered_as(mesh: Mesh, token: str) -> str:
    """The reason a question with the token is refused for; empty where it is answered."""
    try:
        await mesh.client.inference.Generate(QUESTION, metadata=credentials(token), timeout=20)
    except grpc.aio.AioRpcError as error:
        return refusal(error).reason
    return ""


async def test_a_jwt_calls_inference_from_when_its_tenant_grants_it_until_it_takes_that_back(mesh: Mesh) -> None:
    """Refused for its scope, answered once the tenant granted it, refused again once it is taken, by replicas that know the token."""
    tenant, key, issuer = await mesh.tenant(), SigningKey(), f"https://{secrets.token_hex(8)}.example"
    operator = (*operator_credentials(mesh.stack.state.secrets.operator_key, "sign-in"), ("x-tenant-id", tenant.tenant_id))
    async with running_jwks(key) as server, grpc.aio.insecure_channel(mesh.stack.ports.address("tenant")) as channel:
        stub = issuer_service_pb2_grpc.IssuerServiceStub(channel)
        wish = issuer_service_pb2.AddIssuerRequest(
            issuer=issuer, audience="mesh", jwks_uri=server.uri, algorithms=[issuer_service_pb2.JWT_ALGORITHM_ES256], scopes=["tenant:read"]
        )
        issuer_id = (await stub.AddIssuer(wish, metadata=operator, timeout=20)).issuer.issuer_id
        token = key.sign(claims_of(issuer, "mesh", scope="tenant:read inference:generate"))

        async def granted(*scopes: str) -> None:
            request = issuer_service_pb2.SetIssuerScopesRequest(issuer_id=issuer_id, scopes=scopes)
            await stub.SetIssuerScopes(request, metadata=credentials(tenant.api_key), timeout=20)

        async def is_answered_as(reason: str) -> bool:
            return await answered_as(mesh, token) == reason

        assert await is_answered_as("SCOPE_MISSING")
        await granted("tenant:read", "inference:generate")
        await eventually(lambda: is_answered_as(""), within_seconds=GENEROUS_SECONDS)
        await granted("tenant:read")
        await eventually(lambda: is_answered_as("SCOPE_MISSING"), within_seconds=GENEROUS_SECONDS)
