"""How tenants begin, live somewhere and end: sagas, places, events and retention, put together."""

from mesh.common.v1 import lifecycle_service_pb2_grpc
from mesh.tenant.v1 import event_service_pb2_grpc, placement_service_pb2_grpc, tenant_service_pb2_grpc
from services.kernel.cell import cell_of
from services.kernel.rpc.server import Registration
from services.kernel.webhook_sender import WebhookSender
from services.tenant.adapters.postgres_erasure import PostgresErasure
from services.tenant.adapters.postgres_life import PostgresLife, PostgresRetention
from services.tenant.adapters.postgres_moves import PostgresMoves
from services.tenant.adapters.postgres_placements import PostgresPlacements
from services.tenant.adapters.postgres_provisioning import PostgresProvisioning
from services.tenant.adapters.postgres_remains import PostgresRemains
from services.tenant.adapters.postgres_sagas import PostgresDueSagas
from services.tenant.adapters.postgres_sweeps import PostgresHistory, PostgresUnrecordedKeys
from services.tenant.adapters.schema_maker import PostgresSchemaMaker
from services.tenant.adapters.silo_maker import PostgresSiloMaker
from services.tenant.adapters.smtp_mail import PostgresOwners, SmtpMail
from services.tenant.adapters.store_probe import StoreProbe
from services.tenant.adapters.webhook import Webhook
from services.tenant.app.parts import Parts, now
from services.tenant.archive import TenantArchive
from services.tenant.erasure import EraseStep, ErasurePlan, TenantErasure
from services.tenant.events import EventDesk, EventRelay, EventSink, Sink
from services.tenant.key_rotation import KeyRotation
from services.tenant.moving import TenantMoves
from services.tenant.placement import Placements
from services.tenant.provisioning import ProvisioningPlan, Step, TenantProvisioning
from services.tenant.retention import RetentionRunner
from services.tenant.saga import SagaEngine, SagaKind, SagaRunner
from services.tenant.servicers.event import EventServicer
from services.tenant.servicers.lifecycle import LifecycleServicer
from services.tenant.servicers.placement import PlacementServicer
from services.tenant.servicers.tenant import TenantServicer
from services.tenant.sweeping import HistoryKeeper, KeySweeper, sweep_forever
from services.tenant.tenant_life import TenantLife
from services.tenant.tenant_remains import TenantRemains
from services.tenant.wish_seal import WishSeal

PEER_STEPS = (Step.RETRIEVAL, Step.INFERENCE, Step.RATELIMIT, Step.METERING)
ERASURE_PEERS = ("inference", "retrieval", "metering", "ratelimit")


def build_life(parts: Parts, rotation: KeyRotation) -> list[Registration]:
    """Builds what makes, places and ends tenants, and starts its loops."""
    silos = PostgresSiloMaker(parts.settings.silo_admin_dsn.get_secret_value())
    placements, moves = _placements(parts, silos)
    parts.background.start("moves", moves.sweep_forever)
    erasure_store = PostgresErasure(parts.database, parts.jobs, silos)
    provisioning, erasure, engine = _sagas(parts, placements, erasure_store)
    runner = SagaRunner(PostgresDueSagas(parts.jobs), engine, poll_seconds=parts.settings.saga_poll_seconds)
    parts.background.start("saga_runner", runner.run)
    _start_retention(parts)
    _start_sweeps(parts)
    _start_events(parts)
    remains = PostgresRemains(parts.database)
    archive = TenantArchive(remains.export, parts.peers, parts.minter, clock=now)
    life = TenantLife(PostgresLife(parts.database), parts.sagas, parts.tenants)
    return [
        (
            tenant_service_pb2_grpc.add_TenantServiceServicer_to_server,
            TenantServicer(provisioning, parts.tenants, life, erasure, archive, cell_of(parts.settings)),
            "mesh.tenant.v1.TenantService",
        ),
        (
            placement_service_pb2_grpc.add_PlacementServiceServicer_to_server,
            PlacementServicer(placements, moves),
            "mesh.tenant.v1.PlacementService",
        ),
        (event_service_pb2_grpc.add_EventServiceServicer_to_server, EventServicer(EventDesk(parts.outbox)), "mesh.tenant.v1.EventService"),
        (
            lifecycle_service_pb2_grpc.add_TenantLifecycleServiceServicer_to_server,
            LifecycleServicer(TenantRemains(remains, placements, parts.vault, parts.secrets), rotation, erasure_store.scan),
            "mesh.common.v1.TenantLifecycleService",
        ),
    ]


def _placements(parts: Parts, silos: PostgresSiloMaker) -> tuple[Placements, TenantMoves]:
    settings, store = parts.settings, PostgresPlacements(parts.database, parts.box)
    placements = Placements(
        store,
        PostgresSchemaMaker(settings.postgres_placement_dsn.get_secret_value(), settings.max_bridge_schemas),
        silos,
        StoreProbe(),
    )
    moves = TenantMoves(
        placements,
        PostgresMoves(parts.database, store),
        parts.tenants,
        dict(parts.peers),
        parts.minter,
        grace_seconds=settings.move_grace_seconds,
    )
    return placements, moves


def _sagas(parts: Parts, placements: Placements, erasure_store: PostgresErasure) -> tuple[TenantProvisioning, TenantErasure, SagaEngine]:
    settings = parts.settings
    store = PostgresProvisioning(parts.database, with_mail=bool(settings.smtp_url.get_secret_value()))
    peers = {step: (step.name.lower(), parts.peers[step.name.lower()]) for step in PEER_STEPS}
    seal = WishSeal(store, parts.box, parts.vault)
    creation = ProvisioningPlan(store, parts.tenants, peers, placements, seal, parts.vault, parts.minter)
    ending = ErasurePlan(
        erasure_store,
        parts.sagas,
        {EraseStep[name.upper()]: parts.peers[name] for name in ERASURE_PEERS},
        placements,
        parts.vault,
        parts.secrets,
        parts.minter,
        parts.signing_key,
        clock=now,
    )
    engine = SagaEngine(
        parts.sagas,
        {SagaKind.PROVISION: creation, SagaKind.ERASE: ending},
        lease_seconds=settings.saga_lease_seconds,
        max_attempts=settings.saga_max_attempts,
    )
    provisioning = TenantProvisioning(
        store, parts.sagas, creation, engine, parts.tenants, parts.tenants, placements, seal, region=settings.region
    )
    return provisioning, TenantErasure(erasure_store, parts.sagas, ending, engine), engine


def _start_retention(parts: Parts) -> None:
    calendar = PostgresRetention(parts.database, parts.jobs)
    runner = RetentionRunner(calendar, calendar, parts.peers, parts.minter, clock=now, poll_seconds=parts.settings.retention_poll_seconds)
    parts.background.start("retention", runner.run)


def _start_sweeps(parts: Parts) -> None:
    keys = KeySweeper(PostgresUnrecordedKeys(parts.database, parts.jobs), parts.vault)
    parts.background.start("key_sweep", lambda: sweep_forever(keys.sweep, parts.settings.retention_poll_seconds))
    if parts.settings.history_days:
        history = HistoryKeeper(PostgresHistory(parts.database, parts.jobs), days=parts.settings.history_days)
        parts.background.start("history_sweep", lambda: sweep_forever(history.sweep, parts.settings.retention_poll_seconds))


def _start_events(parts: Parts) -> None:
    settings = parts.settings
    sinks: dict[Sink, EventSink] = {}
    if settings.event_webhook_url:
        sender = WebhookSender(private_addresses=True)
        parts.stack.push_async_callback(sender.close)
        sinks[Sink.WEBHOOK] = Webhook(sender, settings.event_webhook_url, settings.webhook_signing_key(), region=settings.region)
    if settings.smtp_url.get_secret_value():
        owners = PostgresOwners(parts.database)
        sinks[Sink.MAIL] = SmtpMail(settings.smtp_url.get_secret_value(), settings.smtp_from, owners.find)
    if sinks:
        relay = EventRelay(parts.outbox, sinks, poll_seconds=settings.event_poll_seconds, max_attempts=settings.event_max_attempts)
        parts.background.start("event_relay", relay.run)
