"""Whose call is in hand: told where it was proven, and never guessed."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from services.kernel.ids import TenantId, new_uuid7
from services.kernel.request_context import bind_tenant, current_tenant_id
from services.kernel.tenant_context import TenantContext

CONTEXT = TenantContext(TenantId(new_uuid7()), "free", "local", "key:1", frozenset(), 1, datetime.now(UTC), False, "token")


def test_the_proven_tenant_is_told() -> None:
    """Within a call of a tenant its id is known."""
    with bind_tenant(CONTEXT):
        assert current_tenant_id() == CONTEXT.tenant_id


def test_a_call_without_a_tenant_has_no_id_to_give() -> None:
    """An operator who named no tenant, and no call at all, are faults of the caller's code: nothing stands in for the id."""
    with bind_tenant(replace(CONTEXT, tenant_id=None)), pytest.raises(RuntimeError, match="names no tenant"):
        current_tenant_id()
    with pytest.raises(RuntimeError, match="has no tenant"):
        current_tenant_id()
