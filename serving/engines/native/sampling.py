"""The next token of every sequence of a pass, from its logits.

Takes logits and the parameters of each row; gives token ids and log probabilities. It does not know
about sequences or text. One number in [0, 1) decides the draw of a row, so a seeded sequence gets
the same tokens whatever runs beside it: no step mixes rows.

The order of the steps is vLLM's: bias, penalties, grammar, temperature, min-p, top-k, top-p.

N rows, V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.errors import RequestError
from serving.engines._protocol import GenerateRequest
from serving.engines.native.drawing import SamplingRow, draw_tokens, find_best
from serving.engines.native.grammar import GrammarCompiler, GrammarMatcher
from serving.engines.native.penalties import Bias, LogitEdit, Penalties, Rates

__all__ = ["Likely", "SamplingRow", "SamplingState", "TokenizerInfo", "likelihood", "sample"]


@dataclass(frozen=True)
class TokenizerInfo:
    """What sampling needs of a tokenizer; without `grammars` requests for one are refused."""

    vocab_size: int
    grammars: GrammarCompiler | None = None


class SamplingState:
    """Everything that sampling one sequence depends on, as its tokens are accepted."""

    def __init__(
        self,
        row: SamplingRow,
        bias: Bias | None,
        penalties: Penalties | None,
        matcher: GrammarMatcher | None,
    ) -> None:
        self._base = row
        self._bias = bias
        self._penalties = penalties
        self._matcher = matcher

    @classmethod
    def create(cls, request: GenerateRequest, tokenizer: TokenizerInfo) -> "SamplingState":
        """Return the state after the request's resumed tokens.

        Compiles a grammar, which may take seconds: with one, call it in a thread of its own.
        Raises RequestError for a grammar or bias that cannot be applied.
        """
        if request.grammar is not None and tokenizer.grammars is None:
            raise RequestError("structured output needs a tokenizer, and this engine has none.")
        rates = Rates(
            request.presence_penalty, request.frequency_penalty, request.repetition_penalty
        )
        matcher = None
        if request.grammar is not None and tokenizer.grammars is not None:
            matcher = tokenizer.grammars.matcher(request.grammar)
        state = cls(
            SamplingRow(request.temperature, request.top_p, request.top_k, min_p=request.min_p),
            Bias(request.logit_bias, tokenizer.vocab_size) if request.logit_bias else None,
            None if rates.is_neutral else Penalties(rates, request.prompt_tokens),
            matcher,
        )
        for token_id in request.resumed_tokens:
            state.accept(token_id)
        if state.failure is not None:
            raise RequestError("the tokens to go on after do not follow the request's grammar.")
        return state

    @property
    def is_plain(self) -> bool:
        """Whether rows do not depend on the tokens accepted before."""
        return self._penalties is None and self._matcher is None

    @property
    def is_complete(self) -> bool:
        """Whether a grammar has come to its end: the sequence stops, whatever its options say."""
        return self._matcher is not None and self._matcher.is_complete

    @property
    def failure(self) -> str | None:
        """Why no token can be chosen any more (a grammar grew too complex), or None."""
        return None if self._matcher is None else self._matcher.failure

    def row(self, draw: float) -> SamplingRow:
        """Return how the next token is sampled; `draw` is uniform in [0, 1)."""
        edits: list[LogitEdit] = []
        if self._bias is not None:
            edits.append(self._bias)
        if self._penalties is not None:
            edits.append(self._penalties.edit())
        if self._matcher is not None:
            edits.append(self._matcher.edit())
        if self._base.is_greedy and not edits:
            return self._base
        return replace(self._base, draw=draw, edits=tuple(edits))

    def rows(self, draws: Sequence[float], draft: Sequence[int]) -> list[SamplingRow]:
        """Return how the next tokens are sampled, each as if the drafted ones before it were taken.

        There is one more draw than drafted tokens. All rows can be sampled in one call; those after
        the first sampled token that differs from the draft have no meaning. The state stays as is.
        """
        assert len(draws) == len(draft) + 1, "every drafted token and the one after them is sampled"
        if self.is_plain:
            return [self.row(draw) for draw in draws]
        rows = [self.row(draws[0])]
        num_accepted = 0
        for token_id, draw in zip(draft, draws[1:], strict=True):
            if self._matcher is not None and not self._matcher.can_accept(token_id):
                break
            self.accept(token_id)
            num_accepted += 1
            rows.append(self.row(draw))
        self.rollback(num_accepted)
        return rows + [self._base] * (len(draws) - len(rows))

    def accept(self, token_id: int) -> None:
        """Go on by one token."""
        if self._penalties is not None:
            self._penalties.accept(token_id)
        if self._matcher is not None:
            self._matcher.accept(token_id)

    def rollback(self, num_tokens: int) -> None:
        """Undo the last accepted tokens."""
        if self._penalties is not None:
            self._penalties.rollback(num_tokens)
        if self._matcher is not None:
            self._matcher.rollback(num_tokens)


@dataclass(frozen=True)
class Likely:
    """Log probability of a chosen token and the likeliest tokens at its place, best first."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


def sample(logits_NV: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    """Return a token id a row; `logits_NV` stay as they are.

    None where the logits are not finite (a broken model) or a row's edits leave no token.
    """
    assert logits_NV.shape[0] == len(rows), "one row of logits for each row of parameters"
    best_N, ids_N = find_best(logits_NV)
    is_valid = best_N.isfinite().tolist()
    edited = [n for n, row in enumerate(rows) if row.edits and is_valid[n]]
    if edited:
        logits_NV = logits_NV.to(torch.float32, copy=True)
        for n in edited:
            for edit in rows[n].edits:
                edit(logits_NV[n])
        best_N, ids_N = find_best(logits_NV)
        is_valid = [*map(bool.__and__, is_valid, best_N.isfinite().tolist())]
    tokens: list[int] = ids_N.tolist()
    drawn = [n for n, row in enumerate(rows) if is_valid[n] and not row.is_greedy]
    if drawn:
        drawn_logits_NV = logits_NV if len(drawn) == len(rows) else logits_NV[drawn]
        sampled = draw_tokens(drawn_logits_NV, best_N[drawn], [rows[n] for n in drawn])
        for n, token in zip(drawn, sampled, strict=True):
            tokens[n] = token
    return [token if valid else None for token, valid in zip(tokens, is_valid, strict=True)]


def likelihood(logits_V: Tensor, token_id: int, num_top: int) -> Likely:
    """Return natural log probabilities of the model itself.

    That is before bias, penalties, grammar, temperature and truncation, as vLLM reports them.
    """
    logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)
    top = logprobs_V.topk(min(num_top, logprobs_V.numel()))
    return Likely(
        float(logprobs_V[token_id]), tuple(top.indices.tolist()), tuple(top.values.tolist())
    )
