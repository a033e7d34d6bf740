"""Budgets, what fires them, and the tenants' receivers that are told."""

from mesh.metering.v1.budget_service_pb2_grpc import add_BudgetServiceServicer_to_server
from mesh.metering.v1.webhook_service_pb2_grpc import add_WebhookServiceServicer_to_server
from services.kernel.rpc.server import Registration
from services.kernel.tenant_config import TenantConfigCache
from services.kernel.webhook_sender import WebhookSender
from services.metering.adapters.postgres_budget_marks import PostgresBudgetMarks
from services.metering.adapters.postgres_budgets import PostgresBudgets
from services.metering.adapters.postgres_deliveries import PostgresDeliveries
from services.metering.adapters.postgres_usage_queries import PostgresUsageQueries
from services.metering.adapters.postgres_webhooks import PostgresWebhooks
from services.metering.adapters.tenant_calendars import RememberedCalendars, TenantCalendars
from services.metering.adapters.tenant_rules import TenantRules
from services.metering.app.parts import Parts
from services.metering.budgets.desk import BudgetDesk
from services.metering.budgets.keeper import BudgetKeeper
from services.metering.budgets.long_looks import LongLooks
from services.metering.budgets.look import BudgetLook
from services.metering.budgets.spending import UsageSpending
from services.metering.servicers.budgets import BudgetServicer
from services.metering.servicers.webhooks import WebhookServicer
from services.metering.webhooks.desk import WebhookDesk
from services.metering.webhooks.relay import DeliveryRelay
from services.metering.webhooks.secrets import EndpointSecrets, parse_seal_keys

# For one answer about a tenant that is looked at by itself.
_PATIENCE_SECONDS = 60


def build_budgets(parts: Parts, configs: TenantConfigCache, calendars: RememberedCalendars) -> Registration:
    """Builds budgets and starts the loop that looks at them."""
    store = PostgresBudgets(parts.database)
    # On the primary: what is committed is counted.
    spending = UsageSpending(PostgresUsageQueries(parts.database, parts.database, parts.jobs))
    patient = UsageSpending(PostgresUsageQueries(parts.database, parts.database, parts.jobs, patience_seconds=_PATIENCE_SECONDS))
    marks = PostgresBudgetMarks(parts.jobs)
    long_looks = LongLooks(marks, BudgetLook(store, patient, calendars))
    keeper = BudgetKeeper(marks, BudgetLook(store, spending, calendars), long_looks, poll_seconds=parts.settings.budget_poll_seconds)
    parts.background.start("budget_keeper", keeper.run)
    parts.background.start("long_looks_at_budgets", long_looks.run)
    desk = BudgetDesk(store, spending, TenantCalendars(configs), TenantRules(configs), clock=parts.clock)
    return add_BudgetServiceServicer_to_server, BudgetServicer(desk), "mesh.metering.v1.BudgetService"


def open_sender(parts: Parts) -> WebhookSender:
    """Opens what sends to receivers."""
    sender = WebhookSender(private_addresses=parts.settings.webhook_private_addresses)
    parts.stack.push_async_callback(sender.close)
    return sender


def build_webhooks(parts: Parts, sender: WebhookSender) -> Registration:
    """Builds receivers and starts the relay that sends to them."""
    settings = parts.settings
    secrets = EndpointSecrets(parse_seal_keys(settings.webhook_seal_keys.get_secret_value()))
    relay = DeliveryRelay(
        PostgresDeliveries(parts.jobs),
        sender,
        secrets,
        region=settings.region,
        poll_seconds=settings.webhook_poll_seconds,
        max_attempts=settings.webhook_max_attempts,
        history_days=settings.webhook_history_days,
    )
    parts.background.start("webhook_relay", relay.run)
    desk = WebhookDesk(PostgresWebhooks(parts.database), secrets, private_addresses=settings.webhook_private_addresses)
    return add_WebhookServiceServicer_to_server, WebhookServicer(desk), "mesh.metering.v1.WebhookService"
