"""`python -m services.metering [serve|migrate|preview-billing-plans|preview-price-book]`."""

from services.kernel.command import main
from services.metering.app import build
from services.metering.app.loading import migrate_schema, preview_billing_plans, preview_price_book
from services.metering.settings import MeteringSettings

if __name__ == "__main__":
    previews = {"preview-billing-plans": preview_billing_plans, "preview-price-book": preview_price_book}
    main(MeteringSettings, build, migrate_schema, previews)
