"""What a call is made of beside the question: the tenant's prompt, the conversation's turns, the documents. Reads them, and bounds them."""

from dataclasses import replace

import structlog

from services.inference.call import Found, Memory, Question, RetrievalMode
from services.inference.ports import Documents, Recollection
from services.inference.prompt_assembly import AssembledPrompt, assemble, known_texts, least_bound, with_prefix
from services.inference.prompt_sizes import PromptSizes
from services.inference.refusals import RequestTooLarge
from services.inference.worst_case import CHUNK_BUDGET_BYTES, HISTORY_BUDGET_BYTES, hold_input_tokens, input_bound, text_bytes
from services.kernel.errors import MeshError, Unavailable

log = structlog.get_logger(__name__)


class Gathering:
    """Reads from inference's own store and from the tenant's documents."""

    def __init__(self, documents: Documents, memory: Recollection) -> None:
        self._documents = documents
        self._memory = memory
        self._prompt_sizes = PromptSizes()

    def input_bound(self, question: Question) -> int:
        """Returns the input tokens to hold before anything is read: a strict bound of what is known, and budgets for the rest."""
        history = HISTORY_BUDGET_BYTES if question.conversation_id else 0
        documents = CHUNK_BUDGET_BYTES * question.top_k if question.with_documents else 0
        return self._bound(question, history, documents)

    def least_bound(self, question: Question) -> int:
        """Returns the bound of the part that is there whatever is found and remembered."""
        return self._bound(question, 0, 0)

    def _bound(self, question: Question, history_bytes: int, documents_bytes: int) -> int:
        return hold_input_tokens(
            input_bound(known_texts(question.messages, with_documents=question.with_documents)),
            # Of the two parts of the prompt only the stored one has to be guessed.
            prompt_budget=self._prompt_sizes.expected(question.tenant_id) + text_bytes(with_prefix(question.prompt_prefix, "")),
            history_budget=history_bytes,
            documents_budget=documents_bytes,
            cap=question.context_tokens,
        )

    async def recall(self, question: Question) -> Memory:
        """Reads the prompt and the history, fresh. Raises: NotFound, and RequestTooLarge when they leave the question no room."""
        memory = await self._memory.recall(question.tenant_id, question.conversation_id, HISTORY_BUDGET_BYTES)
        self._prompt_sizes.seen(question.tenant_id, text_bytes(memory.prompt))
        memory = replace(memory, prompt=with_prefix(question.prompt_prefix, memory.prompt))
        needed = least_needed(question, memory)
        if needed > question.context_tokens:
            raise RequestTooLarge("messages", "max_context_tokens", question.context_tokens, needed)
        return memory

    async def search(self, question: Question) -> Found:
        """Searches the documents. Raises: MeshError, unless the answer may do without them."""
        try:
            return await self._documents.search(question.tenant, question.messages[-1].text, question.top_k)
        except MeshError as error:
            if question.retrieval is RetrievalMode.BEST_EFFORT:
                log.warning("retrieval_degraded", error=str(error))
                return Found(degraded=True)
            if isinstance(error, Unavailable) or error.code.name == "UNAVAILABLE":
                raise
            raise Unavailable("retrieval") from error


def least_needed(question: Question, memory: Memory) -> int:
    """Returns the bound of the question with the prompt, without history and documents."""
    return least_bound(memory.prompt, question.messages, with_documents=question.with_documents)


def put_together(question: Question, memory: Memory, found: Found, input_tokens: int) -> AssembledPrompt:
    """Returns the request within so many input tokens."""
    return assemble(
        memory.prompt, memory.history, found.chunks, question.messages, with_documents=question.with_documents, hold=input_tokens
    )
