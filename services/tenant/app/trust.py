"""Who is calling: credentials, names, the feed of changes and the audit log, put together."""

from datetime import datetime, timedelta

from mesh.tenant.v1 import (
    api_key_service_pb2_grpc,
    audit_service_pb2_grpc,
    authentication_service_pb2_grpc,
    domain_service_pb2_grpc,
    issuer_service_pb2_grpc,
    user_service_pb2_grpc,
)
from services.kernel.cell import cell_of
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.rpc.channel import MeshChannel
from services.kernel.rpc.server import Registration
from services.kernel.tenant_context import TenantContext
from services.kernel.tenant_database import TenantDatabase
from services.tenant.abuse_report import AbuseReports
from services.tenant.adapters.abuse_client import GrpcAbuseListener
from services.tenant.adapters.http_jwks import HttpJwksSource
from services.tenant.adapters.postgres_audit import PostgresAuditLog
from services.tenant.adapters.postgres_changes import ChangeListener, PostgresChanges
from services.tenant.adapters.postgres_domains import PostgresDomains
from services.tenant.adapters.postgres_flags import PostgresFlags
from services.tenant.adapters.postgres_issuers import PostgresIssuers
from services.tenant.adapters.postgres_keys import PostgresKeys
from services.tenant.adapters.postgres_users import PostgresUsers
from services.tenant.app.parts import Parts, now
from services.tenant.audit_head import HeadSigner
from services.tenant.audit_log import AuditLog
from services.tenant.authentication import Authenticator
from services.tenant.change_hub import ChangeHub
from services.tenant.context_minting import public_key_id, read_public_keys
from services.tenant.domain import DomainRegistry
from services.tenant.flag_set_cache import FlagSetCache
from services.tenant.issuer import IssuerRegistry
from services.tenant.jwks_cache import JwksCache
from services.tenant.jwt_proof import JwtProof
from services.tenant.key_ring import KeyRing
from services.tenant.name_resolution import NameResolution
from services.tenant.servicers.api_key import ApiKeyServicer
from services.tenant.servicers.audit import AuditServicer
from services.tenant.servicers.authentication import AuthenticationServicer
from services.tenant.servicers.domain import DomainServicer
from services.tenant.servicers.issuer import IssuerServicer
from services.tenant.servicers.user import UserServicer
from services.tenant.user import UserDirectory

# What began in a token's life may end after it.
LONGEST_CALL = timedelta(hours=1)


async def build_trust(parts: Parts) -> tuple[Authenticator, ChangeHub, list[Registration]]:
    """Builds what answers who is calling."""
    settings, database = parts.settings, parts.database
    changes = await _changes(parts)
    jwks = HttpJwksSource(private_addresses=settings.jwks_private_addresses)
    parts.stack.push_async_callback(jwks.close)
    names = NameResolution(PostgresDomains(database), parts.tenants, settings.base_domain_names())
    authenticator = _authenticator(parts, jwks, names)
    registrations: list[Registration] = [
        (
            authentication_service_pb2_grpc.add_AuthenticationServiceServicer_to_server,
            AuthenticationServicer(authenticator, names, parts.minter, changes),
            "mesh.tenant.v1.AuthenticationService",
        ),
        (
            api_key_service_pb2_grpc.add_ApiKeyServiceServicer_to_server,
            ApiKeyServicer(KeyRing(PostgresKeys(database), clock=now)),
            "mesh.tenant.v1.ApiKeyService",
        ),
        (
            issuer_service_pb2_grpc.add_IssuerServiceServicer_to_server,
            IssuerServicer(IssuerRegistry(PostgresIssuers(database), jwks)),
            "mesh.tenant.v1.IssuerService",
        ),
        (
            domain_service_pb2_grpc.add_DomainServiceServicer_to_server,
            DomainServicer(DomainRegistry(PostgresDomains(database), settings.base_domain_names())),
            "mesh.tenant.v1.DomainService",
        ),
        (
            user_service_pb2_grpc.add_UserServiceServicer_to_server,
            UserServicer(UserDirectory(PostgresUsers(database))),
            "mesh.tenant.v1.UserService",
        ),
        (audit_service_pb2_grpc.add_AuditServiceServicer_to_server, AuditServicer(_audit_log(parts)), "mesh.tenant.v1.AuditService"),
    ]
    return authenticator, changes, registrations


def _watched(parts: Parts) -> AbuseReports:
    channel = MeshChannel(parts.settings.ratelimit_address, settings=parts.settings, target_service="ratelimit")
    parts.stack.push_async_callback(channel.close)
    reports = AbuseReports(parts.trail, GrpcAbuseListener(channel))
    parts.background.start("abuse_reports", reports.run)
    return reports


def _authenticator(parts: Parts, jwks: HttpJwksSource, names: NameResolution) -> Authenticator:
    settings = parts.settings
    return Authenticator(
        parts.credentials,
        _watched(parts),
        parts.minter,
        JwtProof(PostgresIssuers(parts.database), JwksCache(jwks), clock=now),
        names,
        flags=FlagSetCache(PostgresFlags(parts.database)),
        operator_key_hashes=settings.operator_key_hashes(),
        front_key_hashes=settings.front_key_hashes(),
        clock=now,
        cell=cell_of(settings),
    )


async def _changes(parts: Parts) -> ChangeHub:
    dsn, pooled = parts.settings.postgres_dsn.get_secret_value(), parts.settings.postgres_transaction_pooling
    database = await TenantDatabase.open(dsn, max_size=1, application_name="tenantry-tenant-changes", transaction_pooling=pooled)
    parts.stack.push_async_callback(database.close)
    hub = ChangeHub(PostgresChanges(database))
    parts.background.start("change_hub", hub.run)
    parts.background.start("change_trimmer", hub.run_trimmer)
    if not pooled:
        # Through a pooler it would hear nothing, and leave a LISTEN on somebody's connection.
        parts.background.start("change_listener", ChangeListener(dsn, hub.wake).run)
    return hub


def _audit_log(parts: Parts) -> AuditLog:
    others = read_public_keys(parts.settings.context_additional_public_keys)
    public_keys = {public_key_id(public): public for public in (parts.signing_key.private_key.public_key(), *others)}
    verifier = ContextTokenVerifier(parts.minter)

    async def prove(token: str, moment: datetime) -> TenantContext:
        return await verifier.verify_as_of(token, moment, grace=LONGEST_CALL)

    return AuditLog(PostgresAuditLog(parts.database), HeadSigner(parts.signing_key, public_keys, now), prove, now)
