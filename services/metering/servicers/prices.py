"""mesh.metering.v1.PriceService: the price book in force."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mesh.metering.v1 import price_service_pb2 as pb
from mesh.metering.v1 import price_service_pb2_grpc
from services.metering.price_catalog import PriceCatalog
from services.metering.rating import ClassPrices

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]


class PriceServicer(price_service_pb2_grpc.PriceServiceServicer):
    """Reads the price book."""

    def __init__(self, catalog: PriceCatalog) -> None:
        self._catalog = catalog

    async def GetPriceBook(self, request: pb.GetPriceBookRequest, context: Context) -> pb.GetPriceBookResponse:
        """Returns the version in force, and when the next one takes over."""
        found = await self._catalog.in_force()
        response = pb.GetPriceBookResponse(
            version=found.version.version,
            prices=[_model_price(provider, model, prices) for (provider, model), prices in sorted(found.version.prices.items())],
        )
        response.effective_time.FromDatetime(found.version.effective_time)
        if found.next_effective_time is not None:
            response.next_effective_time.FromDatetime(found.next_effective_time)
        return response


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
