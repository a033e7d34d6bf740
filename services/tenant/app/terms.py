"""What a tenant may use and with which keys: plans, settings, flags, data keys and secrets, put together."""

from mesh.tenant.v1 import (
    configuration_service_pb2_grpc,
    data_key_service_pb2_grpc,
    flag_service_pb2_grpc,
    plan_service_pb2_grpc,
    secret_service_pb2_grpc,
)
from services.kernel.rpc.server import Registration
from services.tenant.adapters.postgres_configuration import PostgresConfiguration
from services.tenant.adapters.postgres_flags import PostgresFlags
from services.tenant.app.parts import Parts
from services.tenant.configuration import TenantConfiguration
from services.tenant.flag_keeping import FlagKeeping
from services.tenant.key_rotation import KeyRotation
from services.tenant.provider_keys import ProviderKeys
from services.tenant.servicers.configuration import ConfigurationServicer
from services.tenant.servicers.data_key import DataKeyServicer
from services.tenant.servicers.flag import FlagServicer
from services.tenant.servicers.plan import PlanServicer
from services.tenant.servicers.secret import SecretServicer


def build_terms(parts: Parts) -> tuple[KeyRotation, list[Registration]]:
    """Builds what answers with terms and keys."""
    rotation = KeyRotation(parts.vault, parts.box, parts.secrets, list(parts.peers.values()), parts.tenants, parts.minter)
    registrations: list[Registration] = [
        (plan_service_pb2_grpc.add_PlanServiceServicer_to_server, PlanServicer(parts.tenants), "mesh.tenant.v1.PlanService"),
        (
            configuration_service_pb2_grpc.add_ConfigurationServiceServicer_to_server,
            ConfigurationServicer(TenantConfiguration(PostgresConfiguration(parts.database))),
            "mesh.tenant.v1.ConfigurationService",
        ),
        (
            flag_service_pb2_grpc.add_FlagServiceServicer_to_server,
            FlagServicer(FlagKeeping(PostgresFlags(parts.database), parts.tenants)),
            "mesh.tenant.v1.FlagService",
        ),
        (
            data_key_service_pb2_grpc.add_DataKeyServiceServicer_to_server,
            DataKeyServicer(parts.vault, rotation),
            "mesh.tenant.v1.DataKeyService",
        ),
        (
            secret_service_pb2_grpc.add_SecretServiceServicer_to_server,
            SecretServicer(ProviderKeys(parts.secrets, parts.box)),
            "mesh.tenant.v1.SecretService",
        ),
    ]
    return rotation, registrations
