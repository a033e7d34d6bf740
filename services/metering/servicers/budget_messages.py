"""Budgets as messages, and messages as budgets."""

from mesh.metering.v1 import budget_service_pb2 as pb
from services.kernel.ids import TenantId, parse_uuid
from services.kernel.paging import decode_page_token, encode_page_token, position_time
from services.kernel.timestamps import to_timestamp
from services.metering.budgets.budget import (
    MOST_USED,
    Budget,
    BudgetAction,
    BudgetAlert,
    BudgetMeasure,
    BudgetPeriod,
    BudgetTerms,
    BudgetWish,
    Standing,
    wished_thresholds,
)
from services.metering.budgets.ports import AlertPosition


def budget_wish(message: pb.Budget) -> BudgetWish:
    """Reads what is asked for."""
    action = BudgetAction(message.action or pb.BUDGET_ACTION_NOTIFY)
    terms = BudgetTerms(
        BudgetMeasure(message.measure),
        message.product_unit,
        message.user,
        message.feature,
        message.amount,
        BudgetPeriod(message.period),
        message.each_user,
        message.each_feature,
    )
    return BudgetWish(message.name, terms, action, wished_thresholds(message.thresholds_percent, action))


def budget_message(budget: Budget) -> pb.Budget:
    """Writes a budget."""
    terms = budget.terms
    return pb.Budget(
        name=budget.wish.name,
        measure=pb.BudgetMeasure.ValueType(terms.measure),
        product_unit=terms.product_unit,
        user=terms.user,
        feature=terms.feature,
        amount=terms.amount,
        period=pb.BudgetPeriod.ValueType(terms.period),
        thresholds_percent=budget.wish.thresholds,
        action=pb.BudgetAction.ValueType(budget.wish.action),
        budget_id=str(budget.budget_id),
        update_time=to_timestamp(budget.update_time),
        each_user=terms.each_user,
        each_feature=terms.each_feature,
    )


def standing_message(request: pb.GetBudgetRequest, budget: Budget, standing: Standing, *, is_blocked: bool) -> pb.GetBudgetResponse:
    """Writes how a budget stands."""
    amount, used = budget.terms.amount, standing.used
    return pb.GetBudgetResponse(
        budget=budget_message(budget),
        period_start=to_timestamp(standing.span.start),
        period_end=to_timestamp(standing.span.end),
        used=used,
        remaining=max(0, amount - max(0, used)),
        overage=max(0, used - amount),
        forecast_by_period=None if standing.by_period is None else min(MOST_USED, standing.by_period),
        forecast_by_week=min(MOST_USED, standing.by_week),
        fired_percent=standing.fired,
        blocks=is_blocked,
        user=request.user or budget.terms.user,
        feature=request.feature or budget.terms.feature,
    )


def alert_message(alert: BudgetAlert) -> pb.BudgetAlert:
    """Writes an alert."""
    return pb.BudgetAlert(
        alert_id=str(alert.alert_id),
        budget_name=alert.name,
        budget_id=str(alert.budget_id),
        threshold_percent=alert.threshold,
        measure=pb.BudgetMeasure.ValueType(alert.measure),
        product_unit=alert.product_unit,
        user=alert.user,
        feature=alert.feature,
        amount=alert.amount,
        used=alert.used,
        action=pb.BudgetAction.ValueType(alert.action),
        period_start=to_timestamp(alert.span.start),
        period_end=to_timestamp(alert.span.end),
        fire_time=to_timestamp(alert.fire_time),
    )


def alert_position(token: str, tenant_id: TenantId) -> AlertPosition | None:
    """Reads where a page goes on. Raises: InvalidRequest(page_token)."""
    position = decode_page_token(token, _listing(tenant_id), 2)
    return None if position is None else AlertPosition(position_time(position[0]), parse_uuid(position[1], "page_token"))


def alert_token(last: BudgetAlert, tenant_id: TenantId) -> str:
    """Returns the token of the page after an alert."""
    return encode_page_token(_listing(tenant_id), [last.fire_time.isoformat(), str(last.alert_id)])


def _listing(tenant_id: TenantId) -> str:
    return f"budget_alerts:{tenant_id}"
