"""Requests in vLLM's own words.

Takes a request; gives vLLM's sampling parameters, or refuses by name what they cannot express. It
does not know about engines or streams.
"""

import json
from collections.abc import Collection
from hashlib import blake2b
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from cluster.errors import RequestError
from serving.engines._protocol import GenerateRequest, Grammar, GrammarKind
from serving.engines.native.grammar import MAX_GRAMMAR_CHARACTERS
from serving.engines.native.penalties import Bias


def sampling_params(
    request: GenerateRequest, max_tokens: int, stop_ids: Collection[int], vocab_size: int
) -> SamplingParams:
    """Return the parameters of what follows the prompt and its resumed tokens.

    Raises RequestError for a bias, grammar or resumption that cannot be carried out.
    """
    if request.logit_bias:
        Bias(request.logit_bias, vocab_size)
    _check_resumption(request)
    return SamplingParams(
        max_tokens=max_tokens - len(request.resumed_tokens),
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k or 0,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias or None,
        structured_outputs=_structure(request.grammar),
        seed=_seed(request),
        stop_token_ids=None if request.ignore_eos else sorted(stop_ids),
        ignore_eos=request.ignore_eos,
        logprobs=request.num_logprobs,
        detokenize=False,  # Text and stop strings are our detokenizer's, as in every engine.
        output_kind=RequestOutputKind.DELTA,
    )


def _check_resumption(request: GenerateRequest) -> None:
    """Refuse what vLLM would apply to the tokens after a resumption alone."""
    if not request.resumed_tokens:
        return
    counts = request.presence_penalty or request.frequency_penalty
    for is_used, name in ((counts, "penalties that count"), (request.grammar, "structured output")):
        if is_used:
            raise RequestError(
                f"the vllm engine cannot go on with {name} after tokens of another replica. Send "
                "the request again."
            )


def _seed(request: GenerateRequest) -> int | None:
    """Return vLLM's seed: of any sign, and another one where an answer is gone on with.

    vLLM's draws depend on how many were made before, so a sampled answer goes on with fresh ones.
    """
    if request.seed is None:
        return None
    text = f"{request.seed}:{len(request.resumed_tokens)}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _structure(grammar: Grammar | None) -> StructuredOutputsParams | None:
    if grammar is None:
        return None
    if len(grammar.text) > MAX_GRAMMAR_CHARACTERS:
        raise RequestError(
            f"the {grammar.kind} has {len(grammar.text)} characters; at most "
            f"{MAX_GRAMMAR_CHARACTERS} are taken. Make it smaller."
        )
    try:
        return StructuredOutputsParams(**_options(grammar))
    except ValueError as error:
        raise RequestError(f"the {grammar.kind} cannot be followed: {error}") from error


def _options(grammar: Grammar) -> dict[str, Any]:
    if grammar.kind is GrammarKind.JSON_OBJECT:
        return {"json_object": True}
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        return {"json": grammar.text}
    if grammar.kind is GrammarKind.REGEX:
        return {"regex": grammar.text}
    return {"choice": json.loads(grammar.text)}
