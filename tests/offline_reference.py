"""Answers without an engine: every token by a forward pass over the whole sequence before it."""

import itertools

import torch

from jobs.kernels.block_cache import BlockCache, BlockSpan
from jobs.models._fused import FusedDecoder
from serving.engines._protocol import GenerateRequest
from serving.engines.native.adapters import Adapters
from serving.engines.native.detokenizer import Detokenizer
from serving.engines.native.sampling import SamplingState, TokenizerInfo, sample
from serving.engines.native.sequence import Sequence


class Plain:
    """The next token's logits by a whole forward pass of the decoder, in PyTorch."""

    def __init__(self, model, adapters: Adapters | None = None) -> None:
        self._model = model
        self.vocab_size = model.config.vocab_size
        self._adapters = adapters

    def logits(self, tokens: list[int], adapter: str | None) -> torch.Tensor:
        """Return what follows `tokens`, logits_1V."""
        added = self._adapters.batch([adapter], [len(tokens)]) if self._adapters else None
        with torch.inference_mode():
            hidden_BTC = self._model.hidden(torch.tensor([tokens]), adapters=added)
            return self._model.head(hidden_BTC[0, -1:])


class Whole:
    """The same by the engine's own kernels, over the whole sequence in one piece."""

    def __init__(self, model, block_size: int) -> None:
        self._model = FusedDecoder(model)
        self.vocab_size = model.config.vocab_size
        num_blocks = -(-model.config.max_seq_len // block_size)
        self._cache = BlockCache(model.config, num_blocks, block_size, torch.float32)
        self._blocks = tuple(range(num_blocks))

    def logits(self, tokens: list[int], adapter: str | None) -> torch.Tensor:
        """Return what follows `tokens`, logits_1V."""
        assert adapter is None
        tokens_BT, positions_BT = torch.tensor([tokens]), torch.arange(len(tokens))[None]
        attention = self._cache.attention([BlockSpan(self._blocks, 0, len(tokens))])
        with torch.inference_mode():
            hidden_BTC = self._model.hidden(tokens_BT, positions_BT, attention)
            return self._model.head(hidden_BTC[0, -1:])


def offline(model: Plain | Whole, request: GenerateRequest, end: int) -> list[int]:
    """Return the answer by a whole forward pass for every token; `end` ends it."""
    state = SamplingState.create(request, TokenizerInfo(model.vocab_size))
    draws = Sequence(request, 1, Detokenizer(None), state, mailbox=None)
    answer = list(request.resumed_tokens)
    while len(answer) < request.max_tokens:
        logits_1V = model.logits([*request.prompt_tokens, *answer], request.adapter)
        (token_id,) = sample(logits_1V, [state.row(draws.draw(len(answer)))])
        assert token_id is not None
        if token_id == end:
            break
        state.accept(token_id)
        answer.append(token_id)
    return answer[len(request.resumed_tokens) :]


def common_beginning(one: list[int], other: list[int]) -> list[int]:
    """Return the tokens up to the first that differs."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [token for token, _ in pairs]


def margin(model: Plain, request: GenerateRequest, answer: list[int]) -> float:
    """Return by how much the best logit after `answer` exceeds the next one, penalties included."""
    resumed = request.replace(resumed_tokens=tuple(answer))
    state = SamplingState.create(resumed, TokenizerInfo(model.vocab_size))
    logits_V = model.logits([*request.prompt_tokens, *answer], None)[0]
    for edit in state.row(0.0).edits:
        edit(logits_V)
    best, second = logits_V.topk(2).values.tolist()
    return best - second
