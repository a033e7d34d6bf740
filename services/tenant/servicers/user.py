"""UserService on the wire."""

from mesh.tenant.v1 import user_service_pb2 as messages
from mesh.tenant.v1 import user_service_pb2_grpc
from services.kernel.ids import parse_uuid
from services.kernel.request_context import current_tenant_id
from services.kernel.timestamps import to_timestamp
from services.tenant.servicers.caller import acting_subject
from services.tenant.user import User, UserDirectory, UserRole

_ROLES = {
    messages.USER_ROLE_OWNER: UserRole.OWNER,
    messages.USER_ROLE_ADMIN: UserRole.ADMIN,
    messages.USER_ROLE_MEMBER: UserRole.MEMBER,
}
_ON_THE_WIRE = {role: value for value, role in _ROLES.items()}


class UserServicer(user_service_pb2_grpc.UserServiceServicer):
    """Keeps the users of the call's tenant."""

    def __init__(self, directory: UserDirectory) -> None:
        self._directory = directory

    async def PutUser(self, request: messages.PutUserRequest, context: object) -> messages.PutUserResponse:
        """Writes a user."""
        user = await self._directory.put(current_tenant_id(), request.email, _ROLES[request.role], acting_subject())
        return messages.PutUserResponse(user=_user(user))

    async def ListUsers(self, request: messages.ListUsersRequest, context: object) -> messages.ListUsersResponse:
        """Lists users, oldest first."""
        users, following = await self._directory.list(current_tenant_id(), request.page_size, request.page_token)
        return messages.ListUsersResponse(users=[_user(user) for user in users], next_page_token=following)

    async def RemoveUser(self, request: messages.RemoveUserRequest, context: object) -> messages.RemoveUserResponse:
        """Removes a user."""
        await self._directory.remove(current_tenant_id(), parse_uuid(request.user_id, "user_id"), acting_subject())
        return messages.RemoveUserResponse()


def _user(user: User) -> messages.User:
    return messages.User(
        user_id=str(user.user_id), email=user.email, role=_ON_THE_WIRE[user.role], create_time=to_timestamp(user.create_time)
    )
