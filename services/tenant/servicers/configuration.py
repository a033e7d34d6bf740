"""ConfigurationService on the wire."""

from google.protobuf.message import Message

from mesh.tenant.v1 import configuration_service_pb2 as messages
from mesh.tenant.v1 import configuration_service_pb2_grpc
from services.kernel.request_context import current_tenant, current_tenant_id
from services.kernel.timestamps import to_timestamp
from services.tenant.configuration import LIMIT_NAMES, PATH_OF, ConfigurationChange, TenantConfiguration, expand_paths
from services.tenant.effective_config import Overrides, StoredConfiguration, Value, effective
from services.tenant.servicers.caller import acting_subject
from services.tenant.servicers.limit_rules import operators_rules, own_limits_message, wished_limits
from services.tenant.servicers.tenant import config_message
from services.tenant.text import printable


class ConfigurationServicer(configuration_service_pb2_grpc.ConfigurationServiceServicer):
    """Reads and changes the configuration of the call's tenant."""

    def __init__(self, configuration: TenantConfiguration) -> None:
        self._configuration = configuration

    async def GetConfiguration(self, request: messages.GetConfigurationRequest, context: object) -> messages.GetConfigurationResponse:
        """Returns the newest configuration."""
        return messages.GetConfigurationResponse(configuration=_configuration(await self._configuration.get(current_tenant_id())))

    async def UpdateConfiguration(
        self, request: messages.UpdateConfigurationRequest, context: object
    ) -> messages.UpdateConfigurationResponse:
        """Changes what the mask names."""
        outcome = await self._configuration.update(
            current_tenant_id(),
            {name: _wanted(request.overrides, name) for name in expand_paths(request.update_mask.paths)},
            wished_limits(request.update_mask.paths, request.overrides.limit_rules),
            acting_subject(),
            by_operator=current_tenant().operator,
            expected_version=request.expected_version,
            validate_only=request.validate_only,
        )
        return messages.UpdateConfigurationResponse(configuration=_configuration(outcome.stored), changed_paths=outcome.changed_paths)

    async def ChangePlan(self, request: messages.ChangePlanRequest, context: object) -> messages.ChangePlanResponse:
        """Puts the tenant on another plan."""
        outcome = await self._configuration.change_plan(
            current_tenant_id(),
            request.plan,
            acting_subject(),
            expected_version=request.expected_version,
            validate_only=request.validate_only,
        )
        return messages.ChangePlanResponse(configuration=_configuration(outcome.stored), changed=bool(outcome.changed_paths))

    async def ListConfigurationChanges(
        self, request: messages.ListConfigurationChangesRequest, context: object
    ) -> messages.ListConfigurationChangesResponse:
        """Lists changes, newest first."""
        changes, following = await self._configuration.changes(current_tenant_id(), request.page_size, request.page_token)
        return messages.ListConfigurationChangesResponse(changes=[_change(change) for change in changes], next_page_token=following)


def _wanted(overrides: messages.ConfigurationOverrides, name: str) -> Value:
    """Reads one override out of the message: None where it is absent or empty, which takes it back."""
    part = _part(overrides, name)
    if name == "allowed_models":
        return tuple(overrides.ai.allowed_models) or None
    if part.DESCRIPTOR.fields_by_name[name].has_presence:
        value: Value = getattr(part, name) if part.HasField(name) else None
        return value
    text: str = getattr(part, name)
    # A prompt may have lines; a name, a model and an address are one each.
    return (text if name == "system_prompt_prefix" else printable(text, f"overrides.{PATH_OF[name]}")) or None


def _part(overrides: messages.ConfigurationOverrides, name: str) -> Message:
    if name in LIMIT_NAMES:
        return overrides.limits
    return overrides.ai if PATH_OF[name].startswith("ai.") else overrides


def _configuration(stored: StoredConfiguration) -> messages.Configuration:
    return messages.Configuration(
        effective=config_message(effective(stored)),
        overrides=_overrides(stored.overrides),
        operator_paths=sorted(
            [*(PATH_OF[name] for name in stored.overrides.operator_fields), *operators_rules(stored.overrides.own_limits)]
        ),
        placement=stored.placement,
    )


def _overrides(overrides: Overrides) -> messages.ConfigurationOverrides:
    message = messages.ConfigurationOverrides(limit_rules=own_limits_message(overrides.own_limits))
    for name in PATH_OF:
        value = overrides.value(name)
        if value is None:
            continue
        if name == "allowed_models":
            message.ai.allowed_models.extend(overrides.allowed_models or ())
        else:
            setattr(_part(message, name), name, value)
    return message


def _change(change: ConfigurationChange) -> messages.ConfigurationChange:
    return messages.ConfigurationChange(
        version=change.version,
        change_time=to_timestamp(change.change_time),
        subject=change.subject,
        reason=change.reason,
        changed_paths=change.changed_paths,
        before_json=change.before_json,
        after_json=change.after_json,
    )
