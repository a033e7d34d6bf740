"""The price book for callers and operators, and the re-ratings that are left to be ended."""

import asyncio

from mesh.metering.v1.price_service_pb2_grpc import add_PriceServiceServicer_to_server
from services.kernel.rpc.server import Registration
from services.metering.adapters.postgres_prices import PostgresPriceBook
from services.metering.adapters.postgres_rerate_runs import PostgresRerateRuns
from services.metering.adapters.postgres_reratings import PostgresReratings
from services.metering.app.loading import price_book_text
from services.metering.app.parts import Parts
from services.metering.price_catalog import PriceCatalog
from services.metering.price_loading import PriceLoading
from services.metering.rerate_job import RerateJob
from services.metering.rerating import RerateDesk
from services.metering.servicers.prices import PriceServicer


def build_prices(parts: Parts, catalog: PriceCatalog) -> Registration:
    """Builds the price service, and starts the loop that ends re-ratings nobody goes on with."""

    async def read() -> str:
        return await asyncio.to_thread(price_book_text, parts.settings)

    loading = PriceLoading(read, PostgresPriceBook(parts.jobs), catalog)
    desk, runs = RerateDesk(PostgresReratings(parts.database), catalog), PostgresRerateRuns(parts.jobs)
    parts.background.start("rerate_job", RerateJob(runs, desk, resume_seconds=parts.settings.rerating_resume_seconds).run)
    return add_PriceServiceServicer_to_server, PriceServicer(catalog, loading, desk, runs), "mesh.metering.v1.PriceService"
