"""Tenants as the rest of the mesh knows them: what they are called, where they are in their life, what they may use."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from services.kernel.ids import TenantId
from services.tenant.limit_rules import LimitRules
from services.tenant.plan import Plan

DEFAULT_ASSISTANT_NAME = "Assistant"


class TenantState(StrEnum):
    """Where a tenant is in its life."""

    PROVISIONING = "PROVISIONING"
    ACTIVE = "ACTIVE"
    SUSPENDED = "SUSPENDED"
    ERASING = "ERASING"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class TenantFacts:
    """What a credential's answer says of its tenant, read with the credential in one round trip."""

    state: TenantState
    tier: str
    region: str
    config_version: int
    placement: str
    encrypt_content: bool


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant."""

    tenant_id: TenantId
    slug: str
    display_name: str
    plan: str
    region: str
    state: TenantState
    create_time: datetime


@dataclass(frozen=True, slots=True)
class TenantConfig:
    """What services need to serve a tenant. `version` rises with every change of the tenant's settings or of its plan's terms.

    `plan` carries the terms in force, the tenant's own overrides among them; effective_config.py alone builds them.
    """

    tenant_id: TenantId
    version: int
    region: str
    display_name: str
    assistant_name: str
    plan: Plan
    limit_rules: LimitRules
    system_prompt_prefix: str = ""
    dedicated_endpoint: str = ""


class TenantDirectory(Protocol):
    """Where tenants are read. Each method is one round trip."""

    async def get_tenant(self, tenant_id: TenantId) -> Tenant | None:
        """Returns the tenant."""
        ...

    async def list_tenants(self, after_slug: str, limit: int) -> Sequence[Tenant]:
        """Returns at most `limit` tenants whose slug sorts after `after_slug`, by slug."""
        ...

    async def get_facts(self, tenant_id: TenantId) -> TenantFacts | None:
        """Returns what a token says of the tenant, in every state of the tenant."""
        ...

    async def get_config(self, tenant_id: TenantId) -> TenantConfig | None:
        """Returns the tenant's configuration, in every state of the tenant."""
        ...
