"""How the books leave the service: verified, as files, to Stripe and to an endpoint of the operator."""

from mesh.metering.v1.export_service_pb2_grpc import add_ExportServiceServicer_to_server
from mesh.metering.v1.export_sink_service_pb2_grpc import add_ExportSinkServiceServicer_to_server
from mesh.metering.v1.verification_service_pb2_grpc import add_VerificationServiceServicer_to_server
from services.kernel.rpc.server import Registration
from services.kernel.webhook_sender import WebhookSender
from services.metering.adapters.export_endpoint import ExportEndpoint
from services.metering.adapters.postgres_export import PostgresExport
from services.metering.adapters.postgres_export_outbox import PostgresExportOutbox
from services.metering.adapters.postgres_export_settings import PostgresExportSettings
from services.metering.adapters.postgres_known_units import PostgresKnownUnits
from services.metering.adapters.postgres_usage_queries import PostgresUsageQueries
from services.metering.adapters.postgres_verification import PostgresVerification
from services.metering.app.parts import Parts
from services.metering.exports.outgoing import Sink, Teller
from services.metering.exports.relay import ExportRelay
from services.metering.price_catalog import PriceCatalog
from services.metering.servicers.export_sinks import ExportSinkServicer
from services.metering.servicers.exports import ExportServicer
from services.metering.servicers.verification import VerificationServicer
from services.metering.verification import Verifier


def build_books(parts: Parts, queries: PostgresUsageQueries, catalog: PriceCatalog) -> list[Registration]:
    """Builds what reads whole books, and who is told of what."""
    database, jobs = parts.database, parts.jobs
    verifying = VerificationServicer(Verifier(PostgresVerification(database, jobs, catalog)))
    exporting = ExportServicer(PostgresExport(database), queries)
    telling = ExportSinkServicer(PostgresExportSettings(database, jobs), PostgresKnownUnits(jobs))
    return [
        (add_VerificationServiceServicer_to_server, verifying, "mesh.metering.v1.VerificationService"),
        (add_ExportServiceServicer_to_server, exporting, "mesh.metering.v1.ExportService"),
        (add_ExportSinkServiceServicer_to_server, telling, "mesh.metering.v1.ExportSinkService"),
    ]


def open_export_relays(parts: Parts) -> dict[str, ExportRelay]:
    """Opens what tells others of use, by the name of its loop: one a receiver, so that who hangs holds up itself alone."""
    settings, stack, jobs = parts.settings, parts.stack, parts.jobs
    outbox, tellers = PostgresExportOutbox(jobs), dict[Sink, Teller]()
    if key := settings.stripe_secret_key.get_secret_value():
        # Loaded where it is used: it is larger than the rest of the service.
        from services.metering.adapters.stripe_meter_events import StripeMeterEvents

        stripe = StripeMeterEvents(key, settings.stripe_url)
        stack.push_async_callback(stripe.close)
        tellers[Sink.STRIPE] = stripe
    if url := settings.export_endpoint_url:
        sender = WebhookSender(private_addresses=True)
        stack.push_async_callback(sender.close)
        tellers[Sink.ENDPOINT] = ExportEndpoint(sender, outbox, url, settings.export_signing_key(), region=settings.region)
    poll_seconds, max_attempts = settings.export_poll_seconds, settings.export_max_attempts
    return {
        f"export_relay_{sink.name.lower()}": ExportRelay(outbox, {sink: teller}, poll_seconds=poll_seconds, max_attempts=max_attempts)
        for sink, teller in tellers.items()
    }
