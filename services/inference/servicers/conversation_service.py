"""The tenant's conversations over gRPC."""

from mesh.inference.v1 import conversation_service_pb2 as pb
from mesh.inference.v1 import conversation_service_pb2_grpc
from mesh.inference.v1.inference_service_pb2 import ROLE_ASSISTANT, ROLE_USER
from services.inference.conversation import DEFAULT_PAGE_SIZE, KeptTurn, Store, new_conversation_id, page_start, refuse_unstorable_user
from services.inference.prompt_assembly import USER
from services.inference.servicers.tenant import current_tenant_id


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
        response = pb.CreateConversationResponse(conversation=pb.Conversation(conversation_id=made.conversation_id, user=made.user))
        response.conversation.create_time.FromDatetime(made.create_time)
        return response

    async def ListTurns(self, request: pb.ListTurnsRequest, context: object) -> pb.ListTurnsResponse:
        """Lists turns, oldest first."""
        size = request.page_size or DEFAULT_PAGE_SIZE
        # One more than asked for tells whether there is a next page.
        found = await self._store.turns(current_tenant_id(), request.conversation_id, page_start(request.page_token), size + 1)
        page = found[:size]
        following = str(page[-1].sequence) if len(found) > size else ""
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
    message = pb.Turn(sequence=turn.sequence, role=role, text=turn.text, call_id=str(turn.call_id))
    message.create_time.FromDatetime(turn.create_time)
    return message
