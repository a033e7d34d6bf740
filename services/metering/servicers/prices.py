"""mesh.metering.v1.PriceService: the price book in force."""

from mesh.metering.v1 import price_service_pb2 as pb
from mesh.metering.v1 import price_service_pb2_grpc
from services.kernel.timestamps import to_timestamp
from services.metering.price_catalog import PriceCatalog
from services.metering.rating import ClassPrices


class PriceServicer(price_service_pb2_grpc.PriceServiceServicer):
    """Reads the price book."""

    def __init__(self, catalog: PriceCatalog) -> None:
        self._catalog = catalog

    async def GetPriceBook(self, request: pb.GetPriceBookRequest, context: object) -> pb.GetPriceBookResponse:
        """Returns the version in force, and when the next one takes over."""
        found = await self._catalog.in_force()
        return pb.GetPriceBookResponse(
            version=found.version.version,
            effective_time=to_timestamp(found.version.effective_time),
            next_effective_time=to_timestamp(found.next_effective_time),
            prices=[_model_price(provider, model, prices) for (provider, model), prices in sorted(found.version.prices.items())],
        )


def _model_price(provider: str, model: str, prices: ClassPrices) -> pb.ModelPrice:
    return pb.ModelPrice(
        provider=provider,
        model=model,
        input=prices.input,
        output=prices.output,
        cache_read=prices.cache_read,
        cache_write_5m=prices.cache_write_5m,
        cache_write_1h=prices.cache_write_1h,
    )
