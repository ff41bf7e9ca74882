"""How many tokens a request may use at most, before anyone has counted its prompt.

Takes a request and its model; gives an upper bound. It does not know budgets. A token is at least
one byte of UTF-8, and what a chat template adds is bounded by a constant a message. JSON counts as
a template writes it, which is not as it was sent: `1e15` becomes 1000000000000000.0.
"""

import json

from cluster.errors import RequestError
from serving.called_tools import template_calls
from serving.messages import (
    ChatPrompt,
    EmbeddingRequest,
    InferenceRequest,
    Prompt,
    ServedModel,
    TokenPrompt,
    Turn,
)

_TEMPLATE_TOKENS = 128
_MESSAGE_TOKENS = 16


def most_generation_tokens(
    model: ServedModel, request: InferenceRequest, answer_tokens: int
) -> int:
    """Return the most tokens that prompts and answers together can have.

    `answer_tokens` is taken for an answer that neither the request nor the model's context bounds.
    """
    answer = _within(model, request.sampling.max_tokens or model.context_tokens or answer_tokens)
    prompts = sum(_within(model, _most_prompt_tokens(prompt)) for prompt in request.prompts)
    return prompts + request.total_choices * answer


def most_embedding_tokens(model: ServedModel, request: EmbeddingRequest) -> int:
    """Return the most tokens that the inputs can have."""
    return sum(_within(model, _most_prompt_tokens(prompt)) for prompt in request.inputs)


def _within(model: ServedModel, num_tokens: int) -> int:
    return min(num_tokens, model.context_tokens or num_tokens)


def _most_prompt_tokens(prompt: Prompt) -> int:
    if isinstance(prompt, TokenPrompt):
        return len(prompt.token_ids)
    if not isinstance(prompt, ChatPrompt):
        return _num_bytes(prompt.text) + _MESSAGE_TOKENS
    turns = sum(_MESSAGE_TOKENS + _num_turn_bytes(turn) for turn in prompt.turns)
    return _TEMPLATE_TOKENS + _num_bytes(prompt.tools) + turns


def _num_turn_bytes(turn: Turn) -> int:
    texts = (turn.content, turn.name, turn.tool_call_id, _written_calls(turn))
    return sum(map(_num_bytes, texts))


def _written_calls(turn: Turn) -> str | None:
    if turn.tool_calls is None:
        return None
    try:
        return json.dumps(template_calls(turn.tool_calls), ensure_ascii=False)
    except (RequestError, RecursionError):
        return turn.tool_calls  # Nested too deeply to be written: the replica refuses it.


def _num_bytes(text: str | None) -> int:
    # Arguments of a call may bring half of a surrogate pair; the replica refuses that.
    return len(text.encode(errors="surrogatepass")) if text else 0
