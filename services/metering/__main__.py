"""`python -m services.metering [serve|migrate|preview-billing-plans]`."""

from services.kernel.command import main
from services.metering.app import build, migrate_schema, preview_billing_plans
from services.metering.settings import MeteringSettings

if __name__ == "__main__":
    main(MeteringSettings, build, migrate_schema, {"preview-billing-plans": preview_billing_plans})
