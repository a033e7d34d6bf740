"""Turns a request into a question the plan allows, with its worst case computable. Refuses before anything is held."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mesh.tenant.v1 import tenant_service_pb2
from services.inference.call import Question, RetrievalMode
from services.inference.conversation import is_conversation_id
from services.inference.models import Model, describe, is_known
from services.inference.ports import Prices
from services.inference.prompt_assembly import USER, Turn, known_texts
from services.inference.refusals import ModelNotInPlan, PriceMissing, RequestTooLarge, UnknownModel
from services.inference.worst_case import Price, input_bound
from services.kernel.errors import InvalidRequest, NotFound
from services.kernel.ids import CallId, TenantId
from services.kernel.tenant_context import TenantContext

DEFAULT_TOP_K = 4
DEFAULT_MAX_OUTPUT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came in, its defaults not yet filled: empty and 0 mean not told."""

    call_id: CallId
    tenant: TenantContext
    tenant_id: TenantId
    messages: tuple[Turn, ...]
    model: str
    max_output_tokens: int
    feature: str
    user: str
    conversation_id: str
    retrieval: RetrievalMode
    top_k: int
    stop_sequences: tuple[str, ...]
    deadline: float
    provider_key: str = field(default="", repr=False)
    min_output_tokens: int = 0
    max_wait_seconds: float = 0.0


async def to_question(asked: Asked, config: tenant_service_pb2.TenantConfig, prices: Prices, provider_account: str = "") -> Question:
    """Returns the question; `provider_account` names the house's account, which tenants' own keys and endpoints do not use.

    Raises: InvalidRequest, NotFound, UnknownModel, ModelNotInPlan, PriceMissing, RequestTooLarge.
    """
    _refuse_malformed(asked.messages)
    if asked.conversation_id and not is_conversation_id(asked.conversation_id):
        raise NotFound("conversation")
    model, price = await _model(asked.model or config.ai.default_model, config, prices)
    context_tokens = min(config.limits.context_tokens or model.context_tokens, model.context_tokens)
    max_output_tokens = _max_output_tokens(asked.max_output_tokens, config.ai, model)
    if asked.min_output_tokens > max_output_tokens:
        raise InvalidRequest("options.min_output_tokens", f"is more than the {max_output_tokens} output tokens the answer may have")
    own_account = bool(asked.provider_key or config.ai.dedicated_endpoint)
    question = Question(
        call_id=asked.call_id,
        tenant=asked.tenant,
        tenant_id=asked.tenant_id,
        messages=asked.messages,
        model=model,
        price=price,
        max_output_tokens=max_output_tokens,
        context_tokens=context_tokens,
        weight=max(1, config.limits.weight),
        feature=asked.feature,
        user=asked.user,
        conversation_id=asked.conversation_id,
        retrieval=asked.retrieval,
        top_k=asked.top_k or DEFAULT_TOP_K,
        stop_sequences=asked.stop_sequences,
        deadline=asked.deadline,
        prompt_prefix=config.ai.system_prompt_prefix,
        endpoint=config.ai.dedicated_endpoint,
        provider_key=asked.provider_key,
        min_output_tokens=max(1, asked.min_output_tokens),
        max_wait_seconds=asked.max_wait_seconds,
        provider_account="" if own_account else provider_account,
        bills_tenant_account=own_account,
    )
    needed = input_bound(known_texts(question.messages, with_documents=question.with_documents))
    if needed > context_tokens:
        raise RequestTooLarge("messages", "max_context_tokens", context_tokens, needed)
    return question


def _refuse_malformed(messages: Sequence[Turn]) -> None:
    if not messages:
        raise InvalidRequest("messages", "needs at least the user's question")
    if messages[-1].role != USER:
        raise InvalidRequest(f"messages[{len(messages) - 1}].role", "the last message must be the user's")


async def _model(name: str, config: tenant_service_pb2.TenantConfig, prices: Prices) -> tuple[Model, Price]:
    price = await prices.price(name)
    if price is None and not is_known(name):
        raise UnknownModel(name, config.ai.allowed_models)
    if name not in config.ai.allowed_models:
        raise ModelNotInPlan(name, config.tier, config.ai.allowed_models)
    if price is None:
        raise PriceMissing(name)
    return describe(name), price


def _max_output_tokens(asked: int, ai: tenant_service_pb2.AiSettings, model: Model) -> int:
    cap = min(ai.max_output_tokens or model.max_output_tokens, model.max_output_tokens)
    if asked > cap:
        raise RequestTooLarge("options.max_output_tokens", "max_output_tokens", cap, asked)
    return asked or min(ai.default_max_output_tokens or DEFAULT_MAX_OUTPUT_TOKENS, cap)
