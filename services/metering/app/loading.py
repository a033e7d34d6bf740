"""What is loaded before the service runs: the schema, the months of events, prices and billing plans."""

import asyncio
from pathlib import Path

from services.kernel.migrate import MigrationRefused, migrate
from services.kernel.tenant_database import JobsDatabase
from services.metering.adapters.postgres_billing_plans import billing_plan_changes, load_billing_plans
from services.metering.adapters.postgres_event_months import PostgresEventMonths
from services.metering.adapters.postgres_prices import load_price_book, price_book_changes
from services.metering.app.parts import utc_now
from services.metering.billing.plan_file import BillingPlansRefused, parse_billing_plans
from services.metering.billing.plan_file import describe as describe_plans
from services.metering.billing.terms import PlanVersion
from services.metering.event_months import make_months
from services.metering.price_book import PriceBookRefused, PriceVersion, parse_price_book
from services.metering.price_loading import describe as describe_prices
from services.metering.settings import MeteringSettings

MIGRATIONS = Path(__file__).parent.parent / "migrations"
SCHEMA = "metering"


async def migrate_schema(settings: MeteringSettings) -> None:
    """Brings the schema forward, makes the months of events, loads prices and billing plans. Idempotent. Raises: MigrationRefused."""
    admin_dsn = settings.postgres_admin_dsn.get_secret_value()
    versions = _read_price_book(settings)
    plans = _read_billing_plans(settings)
    roles = {
        "service": settings.postgres_dsn.get_secret_value(),
        "jobs": settings.postgres_jobs_dsn.get_secret_value(),
        "partitions": settings.postgres_partitions_dsn.get_secret_value(),
    }
    await migrate(admin_dsn, SCHEMA, MIGRATIONS, roles)
    admin = await JobsDatabase.open(admin_dsn, max_size=1, application_name="metering-migrate")
    try:
        await make_months(PostgresEventMonths(admin), utc_now())
        await load_price_book(admin, versions)
        await load_billing_plans(admin, plans)
    except (PriceBookRefused, BillingPlansRefused) as error:
        raise MigrationRefused(str(error)) from None
    finally:
        await admin.close()


def preview_billing_plans(settings: MeteringSettings) -> str:
    """Says in a line each what `migrate` would load of the billing plans, and loads nothing. Raises: MigrationRefused."""
    return asyncio.run(_preview_plans(settings))


def preview_price_book(settings: MeteringSettings) -> str:
    """Says in a line each what `migrate` would load of the price book, and loads nothing. Raises: MigrationRefused."""
    return asyncio.run(_preview_prices(settings))


async def _preview_prices(settings: MeteringSettings) -> str:
    versions = _read_price_book(settings)
    admin = await JobsDatabase.open(settings.postgres_admin_dsn.get_secret_value(), max_size=1, application_name="metering-preview")
    try:
        return describe_prices(await price_book_changes(admin, versions))
    except PriceBookRefused as error:
        raise MigrationRefused(str(error)) from None
    finally:
        await admin.close()


async def _preview_plans(settings: MeteringSettings) -> str:
    plans = _read_billing_plans(settings)
    admin = await JobsDatabase.open(settings.postgres_admin_dsn.get_secret_value(), max_size=1, application_name="metering-preview")
    try:
        return describe_plans(await billing_plan_changes(admin, plans))
    except BillingPlansRefused as error:
        raise MigrationRefused(str(error)) from None
    finally:
        await admin.close()


def price_book_text(settings: MeteringSettings) -> str:
    """Returns the reviewed file. Raises: PriceBookRefused."""
    try:
        return settings.price_book_path.read_text()
    except OSError as error:
        raise PriceBookRefused(f"the price book {settings.price_book_path} cannot be read: {error.strerror}") from None


def _read_price_book(settings: MeteringSettings) -> list[PriceVersion]:
    try:
        return parse_price_book(price_book_text(settings))
    except PriceBookRefused as error:
        raise MigrationRefused(str(error)) from None


def _read_billing_plans(settings: MeteringSettings) -> list[PlanVersion]:
    try:
        return parse_billing_plans(settings.billing_plans_path.read_text())
    except OSError as error:
        raise MigrationRefused(f"the billing plans {settings.billing_plans_path} cannot be read: {error.strerror}") from None
    except BillingPlansRefused as error:
        raise MigrationRefused(str(error)) from None
