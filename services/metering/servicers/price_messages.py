"""Prices, what changes of them, and re-ratings as messages."""

from mesh.common.v1.money_pb2 import NanoUsd
from mesh.metering.v1 import price_service_pb2 as pb
from services.kernel.timestamps import to_timestamp
from services.metering.price_loading import VersionChange
from services.metering.rating import BatchPrices, ClassPrices
from services.metering.rerate_job import RerateRun
from services.metering.rerating import RerateAnswer


def model_price(provider: str, model: str, prices: ClassPrices) -> pb.ModelPrice:
    """Builds what a model costs."""
    return pb.ModelPrice(
        provider=provider,
        model=model,
        input=prices.input,
        output=prices.output,
        cache_read=prices.cache_read,
        cache_write_5m=prices.cache_write_5m,
        cache_write_1h=prices.cache_write_1h,
        batch=None if prices.batch is None else _batch_price(prices.batch),
    )


def _batch_price(batch: BatchPrices) -> pb.BatchPrice:
    return pb.BatchPrice(
        input=batch.input,
        output=batch.output,
        cache_read=batch.cache_read,
        cache_write_5m=batch.cache_write_5m,
        cache_write_1h=batch.cache_write_1h,
    )


def change_message(change: VersionChange) -> pb.PriceVersionChange:
    """Builds what a new version changes."""
    version = change.version
    return pb.PriceVersionChange(
        version=version.version,
        effective_time=to_timestamp(version.effective_time),
        source=version.source,
        retrieved=version.retrieved.isoformat(),
        is_retroactive=change.is_retroactive,
        models=[
            pb.ModelPriceChange(
                provider=item.provider,
                model=item.model,
                before=None if item.before is None else model_price(item.provider, item.model, item.before),
                after=None if item.after is None else model_price(item.provider, item.model, item.after),
            )
            for item in change.models
        ],
    )


def rerate_response(answer: RerateAnswer) -> pb.RerateUsageResponse:
    """Builds how far a re-rating is."""
    return pb.RerateUsageResponse(
        is_done=answer.is_done,
        call_count=sum(item.call_count for item in answer.models),
        difference=NanoUsd(nano_usd=sum(item.difference_nano_usd for item in answer.models)),
        models=[
            pb.ModelDifference(
                provider=item.provider,
                model=item.model,
                call_count=item.call_count,
                difference=NanoUsd(nano_usd=item.difference_nano_usd),
            )
            for item in answer.models
        ],
        cutoff_time=to_timestamp(answer.cutoff_time),
        told_count=answer.told_count,
        outstanding_count=answer.outstanding_count,
    )


def rerate_run(run: RerateRun) -> pb.RerateRun:
    """Builds a re-rating as it was begun."""
    rerating = run.rerating
    return pb.RerateRun(
        tenant_id=str(run.tenant_id),
        rerating_id=str(rerating.rerating_id),
        start_time=to_timestamp(rerating.order.start_time),
        end_time=to_timestamp(rerating.order.end_time),
        price_versions=rerating.order.price_versions,
        right_version=rerating.order.right_version,
        cutoff_time=to_timestamp(rerating.cutoff_time),
        begin_time=to_timestamp(run.begin_time),
        finish_time=to_timestamp(run.finish_time),
    )
