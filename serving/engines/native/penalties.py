"""Edits of one sequence's logits: penalties for repeating, and a bias on chosen tokens.

Takes a sequence's tokens as they are accepted; gives edits of a row of logits. It does not know
about models, draws or other sequences.

V vocabulary, M distinct tokens of one sequence
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.errors import RequestError

MAX_BIAS = 100.0
_MAX_LOGIT = torch.finfo(torch.float32).max


class LogitEdit(Protocol):
    """Changes one row of logits before a token is chosen from it."""

    def __call__(self, logits_V: Tensor) -> None:
        """Edit float32 logits_V in place."""
        ...


class Bias:
    """Adds a number to the logits of some tokens."""

    def __init__(self, bias: Mapping[int, float], vocab_size: int) -> None:
        """Raise RequestError for a token that does not exist or a bias out of bounds."""
        for token_id, value in bias.items():
            if not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"`logit_bias` names token id {token_id}, which is not in the vocabulary of "
                    f"{vocab_size} tokens."
                )
            if not -MAX_BIAS <= value <= MAX_BIAS:
                raise RequestError(
                    f"`logit_bias` of token id {token_id} is {value}; "
                    f"it must be from {-MAX_BIAS:g} to {MAX_BIAS:g}."
                )
        self._ids_M = torch.tensor(list(bias), dtype=torch.int64)
        self._values_M = torch.tensor(list(bias.values()), dtype=torch.float32)

    def __call__(self, logits_V: Tensor) -> None:
        """Edit float32 logits_V in place."""
        ids_M = self._ids_M.to(logits_V.device)
        logits_V.index_add_(0, ids_M, self._values_M.to(logits_V.device))


@dataclass(frozen=True)
class Rates:
    """How much repeating costs.

    Presence and frequency are the OpenAI API's: taken off the logit of a generated token once, and
    once for each time it was generated. Repetition is that of CTRL (Keskar et al. 2019): positive
    logits of tokens in prompt or answer are divided by it, negative ones multiplied.
    """

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0

    @property
    def is_neutral(self) -> bool:
        """Whether nothing is changed."""
        return self == Rates()


class Penalties:
    """The tokens of one sequence and how often each was generated; the last ones can be undone."""

    def __init__(self, rates: Rates, prompt_tokens: Sequence[int]) -> None:
        self._rates = rates
        # Without a repetition penalty the prompt has no part in this.
        prompt_ids = [] if rates.repetition == 1.0 else list(dict.fromkeys(prompt_tokens))
        self._num_prompt_ids = len(prompt_ids)
        self._place = {token_id: place for place, token_id in enumerate(prompt_ids)}
        self._ids = np.array(prompt_ids, dtype=np.int64)
        self._counts = np.zeros(len(prompt_ids), dtype=np.int32)
        self._generated: list[int] = []

    def accept(self, token_id: int) -> None:
        """Count a generated token."""
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._counts):
            self._grow()
        self._ids[place] = token_id
        self._counts[place] += 1
        self._generated.append(token_id)

    def rollback(self, num_tokens: int) -> None:
        """Undo the last tokens; the ids stay known, with a count of 0."""
        for _ in range(num_tokens):
            self._counts[self._place[self._generated.pop()]] -= 1

    def edit(self) -> LogitEdit:
        """Return the edit for the next token; later tokens do not change it."""
        num_ids, num_prompt_ids, rates = len(self._place), self._num_prompt_ids, self._rates
        ids_M = torch.from_numpy(self._ids[:num_ids].copy())
        counts_M = torch.from_numpy(self._counts[:num_ids].copy())

        def penalise(logits_V: Tensor) -> None:
            places_M = ids_M.to(logits_V.device)
            logits_V[places_M] = _penalised(
                logits_V[places_M], counts_M.to(logits_V.device), num_prompt_ids, rates
            )

        return penalise

    def _grow(self) -> None:
        size = max(64, 2 * len(self._counts))
        self._ids = np.resize(self._ids, size)
        counts = np.zeros(size, dtype=np.int32)
        counts[: len(self._counts)] = self._counts
        self._counts = counts


def _penalised(logits_M: Tensor, counts_M: Tensor, num_prompt_ids: int, rates: Rates) -> Tensor:
    """Return logits_M of a sequence's tokens, those of its prompt first, with what they cost."""
    is_generated_M = counts_M > 0
    if rates.repetition != 1.0:
        is_seen_M = is_generated_M.clone()
        is_seen_M[:num_prompt_ids] = True
        factor = rates.repetition
        repeated_M = torch.where(logits_M > 0, logits_M / factor, logits_M * factor)
        repeated_M.clamp_(-_MAX_LOGIT, _MAX_LOGIT)  # What is finite stays so.
        logits_M = torch.where(is_seen_M, repeated_M, logits_M)
    return logits_M - rates.frequency * counts_M - rates.presence * is_generated_M
