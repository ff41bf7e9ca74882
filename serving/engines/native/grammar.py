"""Structured output: which tokens may come next, so that an answer follows a grammar.

Takes grammars as requests carry them and a tokenizer; gives masks over the vocabulary. The grammars
themselves are llguidance's. It does not know about sampling, sequences or models.

V vocabulary
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cluster.errors import RequestError
from serving.engines._protocol import Grammar, GrammarKind

MAX_GRAMMAR_CHARACTERS = 256 * 1024
_MAX_COMPILED = 64
# A step that takes longer than a pass of the model would hold up everyone else's tokens: a grammar
# that needs more is refused when it is compiled, or ends its own sequence. The library's own limits
# allow seconds.
_LIMITS = LLParserLimits(initial_lexer_fuel=100_000, step_lexer_fuel=50_000, step_max_items=20_000)
_ANY_OBJECT = '{"type": "object"}'


class GrammarCompiler:
    """Makes matchers for the grammars of one tokenizer; those used last are kept compiled.

    Several threads may call it. Compiling takes up to seconds for a large schema: do it neither on
    an engine's thread nor on an event loop.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, stop_ids: Collection[int]
    ) -> None:
        """Prepare nothing yet: the first grammar pays for reading the vocabulary."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = sorted(stop_ids)
        self._lock = threading.Lock()  # Guards what follows; compiling goes on without it.
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar) -> "GrammarMatcher":
        """Return a matcher at the grammar's beginning.

        Raises RequestError for a grammar that is malformed, unsupported, impossible or too large.
        """
        with self._lock:
            compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
            # A copy shares what the lexer has learnt, and nothing else.
            return GrammarMatcher(compiled.deep_copy(), self._vocab_size)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        source = _source(grammar)
        matcher = LLMatcher(self._read_vocabulary(), source, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # The first step may be the longest, and find no answer.
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        return matcher

    def _read_vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                # A model's configuration may name end tokens that its tokenizer does not have.
                known_ids = set(self._tokenizer.get_vocab().values())
                stop_ids = [token_id for token_id in self._stop_ids if token_id in known_ids]
                self._vocabulary = from_tokenizer(
                    self._tokenizer, n_vocab=self._vocab_size, eos_token=stop_ids or None
                )
            return self._vocabulary


class GrammarMatcher:
    """Where one answer stands in its grammar; the last tokens can be undone."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def is_complete(self) -> bool:
        """Whether nothing but an end token can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def failure(self) -> str | None:
        """Why the matcher cannot go on, in words for who wrote the grammar; None if it can."""
        if not self._matcher.is_error():
            return None
        reason = self._matcher.get_error().splitlines()[0]
        return f"the grammar of this request became too complex to follow: {reason}"

    def can_accept(self, token_id: int) -> bool:
        """Return whether `token_id` may come next."""
        return self._matcher.validate_tokens([token_id]) == 1

    def accept(self, token_id: int) -> None:
        """Go on by one token; one that may not come next is a failure."""
        self._matcher.consume_token(token_id)

    def rollback(self, num_tokens: int) -> None:
        """Undo the last tokens."""
        if num_tokens:
            self._matcher.rollback(num_tokens)

    def edit(self) -> "_Mask":
        """Return the edit that leaves only tokens that may come next; later ones do not change it.

        End tokens are among them only where the grammar may end. After a failure it is none at all.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed_V = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        if self._matcher.is_error():
            allowed_V = np.zeros_like(allowed_V)
        return _Mask(torch.from_numpy(allowed_V == 0))


class _Mask:
    def __init__(self, is_forbidden_V: Tensor) -> None:
        self._is_forbidden_V = is_forbidden_V

    def __call__(self, logits_V: Tensor) -> None:
        logits_V.masked_fill_(self._is_forbidden_V.to(logits_V.device), -torch.inf)


def _source(grammar: Grammar) -> str:
    """Return llguidance's own form of a grammar."""
    if len(grammar.text) > MAX_GRAMMAR_CHARACTERS:
        raise RequestError(
            f"the {grammar.kind} has {len(grammar.text)} characters; at most "
            f"{MAX_GRAMMAR_CHARACTERS} are taken. Make it smaller."
        )
    source: str
    if grammar.kind is GrammarKind.REGEX:
        source = LLMatcher.grammar_from_regex(grammar.text)
    elif grammar.kind is GrammarKind.CHOICE:
        source = LLMatcher.grammar_from_lark(_choices(grammar))
    else:
        schema = grammar.text if grammar.kind is GrammarKind.JSON_SCHEMA else _ANY_OBJECT
        try:
            source = LLMatcher.grammar_from_json_schema(schema)
        except ValueError as error:
            raise _refused(grammar, str(error)) from error
    return source


def _choices(grammar: Grammar) -> str:
    try:
        choices = json.loads(grammar.text)
    except ValueError as error:
        raise _refused(grammar, f"not a JSON list of strings: {error}") from error
    is_list = isinstance(choices, list) and choices
    if not is_list or not all(isinstance(choice, str) and choice for choice in choices):
        raise _refused(grammar, "a JSON list of strings that are not empty is needed")
    # One terminal, not one rule a choice: the lexer takes thousands, the parser would not.
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice) for choice in choices)


def _refused(grammar: Grammar, reason: str) -> RequestError:
    # llguidance names a grammar that nothing can begin by what its parser says then.
    is_empty = not reason.strip() or reason.startswith("NoExtension")
    why = "no answer can follow it" if is_empty else reason.strip().splitlines()[0]
    return RequestError(f"the {grammar.kind} cannot be followed: {why}")
