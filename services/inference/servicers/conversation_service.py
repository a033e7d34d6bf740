"""The tenant's conversations over gRPC."""

from mesh.inference.v1 import conversation_service_pb2 as pb
from mesh.inference.v1 import conversation_service_pb2_grpc
from mesh.inference.v1.inference_service_pb2 import ROLE_ASSISTANT, ROLE_USER
from services.inference.conversation import KeptTurn, Store, new_conversation_id, page_start, page_token, refuse_unstorable_user
from services.inference.prompt_assembly import USER
from services.kernel.paging import cut_page, page_size
from services.kernel.request_context import current_tenant_id
from services.kernel.timestamps import to_timestamp


class ConversationService(conversation_service_pb2_grpc.ConversationServiceServicer):
    """Keeps conversations."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def CreateConversation(
        self,
        request: pb.CreateConversationRequest,
        context: object,
    ) -> pb.CreateConversationResponse:
        """Begins a conversation."""
        refuse_unstorable_user(request.user)
        made = await self._store.add_conversation(current_tenant_id(), new_conversation_id(), request.user)
        conversation = pb.Conversation(conversation_id=made.conversation_id, user=made.user, create_time=to_timestamp(made.create_time))
        return pb.CreateConversationResponse(conversation=conversation)

    async def ListTurns(self, request: pb.ListTurnsRequest, context: object) -> pb.ListTurnsResponse:
        """Lists turns, oldest first."""
        size = page_size(request.page_size)
        found = await self._store.turns(current_tenant_id(), request.conversation_id, page_start(request.page_token), size + 1)
        page, following = cut_page(found, size, page_token)
        return pb.ListTurnsResponse(turns=[_turn(turn) for turn in page], next_page_token=following)

    async def DeleteConversation(
        self,
        request: pb.DeleteConversationRequest,
        context: object,
    ) -> pb.DeleteConversationResponse:
        """Removes a conversation with its turns."""
        await self._store.delete_conversation(current_tenant_id(), request.conversation_id)
        return pb.DeleteConversationResponse()


def _turn(turn: KeptTurn) -> pb.Turn:
    role = ROLE_USER if turn.role == USER else ROLE_ASSISTANT
    create_time = to_timestamp(turn.create_time)
    return pb.Turn(sequence=turn.sequence, role=role, text=turn.text, call_id=str(turn.call_id), create_time=create_time)
