"""mesh.metering.v1.BudgetService: the budgets of the call's tenant."""

import structlog

from mesh.metering.v1 import budget_service_pb2 as pb
from mesh.metering.v1 import budget_service_pb2_grpc
from services.kernel.paging import cut_page, page_size
from services.kernel.request_context import current_tenant, current_tenant_id, operator_reason
from services.metering.budgets.desk import BudgetDesk
from services.metering.servicers import budget_messages as messages

log = structlog.get_logger(__name__)


class BudgetServicer(budget_service_pb2_grpc.BudgetServiceServicer):
    """Keeps budgets and tells how they stand."""

    def __init__(self, desk: BudgetDesk) -> None:
        self._desk = desk

    async def PutBudget(self, request: pb.PutBudgetRequest, context: object) -> pb.PutBudgetResponse:
        """Makes or replaces a budget."""
        budget = await self._desk.put(current_tenant(), current_tenant_id(), messages.budget_wish(request.budget))
        log.info("budget_put", budget_id=str(budget.budget_id), subject=current_tenant().subject, reason=operator_reason())
        return pb.PutBudgetResponse(budget=messages.budget_message(budget))

    async def GetBudget(self, request: pb.GetBudgetRequest, context: object) -> pb.GetBudgetResponse:
        """Tells how a budget stands."""
        asked = (request.name, request.user, request.feature)
        budget, standing, is_blocked = await self._desk.standing(current_tenant(), current_tenant_id(), *asked)
        return messages.standing_message(request, budget, standing, is_blocked=is_blocked)

    async def ListBudgets(self, request: pb.ListBudgetsRequest, context: object) -> pb.ListBudgetsResponse:
        """Lists budgets by name."""
        return pb.ListBudgetsResponse(budgets=[messages.budget_message(each) for each in await self._desk.list_all(current_tenant_id())])

    async def DeleteBudget(self, request: pb.DeleteBudgetRequest, context: object) -> pb.DeleteBudgetResponse:
        """Removes a budget."""
        await self._desk.delete(current_tenant_id(), request.name)
        log.info("budget_deleted", subject=current_tenant().subject, reason=operator_reason())
        return pb.DeleteBudgetResponse()

    async def ListAlerts(self, request: pb.ListAlertsRequest, context: object) -> pb.ListAlertsResponse:
        """Lists alerts, newest first."""
        tenant_id, size = current_tenant_id(), page_size(request.page_size)
        found = await self._desk.alerts(tenant_id, messages.alert_position(request.page_token, tenant_id), size + 1)
        page, following = cut_page(found, size, lambda last: messages.alert_token(last, tenant_id))
        return pb.ListAlertsResponse(alerts=[messages.alert_message(alert) for alert in page], next_page_token=following)
