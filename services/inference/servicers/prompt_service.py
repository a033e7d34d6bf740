"""The tenant's prompt over gRPC."""

from mesh.inference.v1 import prompt_service_pb2 as pb
from mesh.inference.v1 import prompt_service_pb2_grpc
from services.inference.conversation import Prompt, Store, refuse_long_prompt
from services.kernel.request_context import current_tenant_id
from services.kernel.timestamps import to_timestamp


class PromptService(prompt_service_pb2_grpc.PromptServiceServicer):
    """Keeps the prompt."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def PutPrompt(self, request: pb.PutPromptRequest, context: object) -> pb.PutPromptResponse:
        """Stores a new version."""
        refuse_long_prompt(request.text)
        return pb.PutPromptResponse(prompt=_prompt(await self._store.put_prompt(current_tenant_id(), request.text, only_first=False)))

    async def GetPrompt(self, request: pb.GetPromptRequest, context: object) -> pb.GetPromptResponse:
        """Returns the newest version."""
        return pb.GetPromptResponse(prompt=_prompt(await self._store.newest_prompt(current_tenant_id())))


def _prompt(prompt: Prompt) -> pb.Prompt:
    return pb.Prompt(version=prompt.version, text=prompt.text, create_time=to_timestamp(prompt.create_time))
