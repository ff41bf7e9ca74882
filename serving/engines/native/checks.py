"""Whether a request fits a model.

Takes a request and what an engine runs; gives the most tokens its answer may have, or an error that
names what does not fit. Pure, and the same for every engine.
"""

from cluster.errors import ContextLengthError, RequestError
from serving.engines._protocol import EngineInfo, GenerateRequest
from serving.engines.native.answers import Vocabulary


def check_request(request: GenerateRequest, info: EngineInfo, vocabulary: Vocabulary) -> int:
    """Return `max_tokens`, up to the context's end where it is unset.

    Raises ContextLengthError for a request longer than the context, and RequestError for a token,
    stop string or adapter that the engine has not.
    """
    num_prompt, max_len = len(request.prompt_tokens), info.max_len
    max_tokens = max_len - num_prompt if request.max_tokens is None else request.max_tokens
    if num_prompt + max(max_tokens, 1) > max_len:
        raise ContextLengthError(
            f"this model's context is {max_len} tokens; the prompt has {num_prompt}, and "
            f"{max(max_tokens, 1)} were asked for. Shorten the prompt or lower `max_tokens`."
        )
    # Only now: this takes long for a prompt of millions of tokens, and holds the event loop.
    for token_ids in (request.prompt_tokens, request.resumed_tokens):
        check_tokens(token_ids, info.vocab_size)
    if request.stop and vocabulary.decoder is None:
        raise RequestError("`stop` needs a tokenizer, and this engine has none.")
    if request.adapter is not None and request.adapter not in info.adapters:
        names = ", ".join(info.adapters) or "none"
        raise RequestError(f"there is no adapter `{request.adapter}`; there are: {names}.")
    return max_tokens


def check_tokens(token_ids: tuple[int, ...], vocab_size: int) -> None:
    """Raise RequestError for a token id that is not in the vocabulary."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise RequestError(f"token id {wrong} is not in the vocabulary of {vocab_size} tokens.")
