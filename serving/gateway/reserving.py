"""How many tokens a request may use at most, before anyone has counted its prompt.

Takes a request and its model; gives an upper bound. It does not know budgets. A token is at least
one byte of UTF-8, and what a chat template adds is bounded by a constant a message.
"""

from serving.messages import (
    ChatPrompt,
    EmbeddingRequest,
    InferenceRequest,
    Prompt,
    ServedModel,
    TokenPrompt,
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
    total = _TEMPLATE_TOKENS + _num_bytes(prompt.tools)
    for turn in prompt.turns:
        total += _MESSAGE_TOKENS + _num_bytes(turn.content) + _num_bytes(turn.tool_calls)
    return total


def _num_bytes(text: str | None) -> int:
    return len(text.encode()) if text else 0
