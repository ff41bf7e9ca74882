"""Speculation by n-grams on code with repeated text, at batch 1: `speculative`.

The model is a trained one, since random weights repeat themselves and would flatter the guess. The
prompts are modules of the standard library that the model's training held out.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serving.contender import Process
from benchmarks.serving.models import BENCH
from benchmarks.serving.workload import Request
from jobs.config import DataConfig
from jobs.data.corpus import read_documents, split_of
from jobs.data.tokenizer import load_tokenizer

_NUM_PROMPTS = 12
_PROMPT_TOKENS = 192
_ANSWER_TOKENS = 128


def measure(
    python: Path, model: Path, options: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the speed-up of greedy answers, and whether every one is the same."""
    requests = [Request(0.0, prompt, _ANSWER_TOKENS) for prompt in _prompts(model)]
    guessing = {**options, "speculation": {"kind": "ngram"}}
    with ExitStack() as stack:
        plain = stack.enter_context(_engine(python, model, options, "plain"))
        ngram = stack.enter_context(_engine(python, model, guessing, "ngram"))
        ratios, equal = [], 0
        for request in [requests[0], *requests]:  # The first one warms both up.
            rates = [engine.run([request]).tokens_per_s for engine in (plain, ngram)]
            ratios.append(rates[1] / rates[0])
            equal += plain.last_tokens == ngram.last_tokens
    say(f"n-gram speculation: {median(ratios[1:]):.2f} times as fast")
    return {
        "ratio": median(ratios[1:]),
        "ratios": ratios[1:],
        "answers": len(ratios),
        "equal_answers": equal,
    }


def _engine(python: Path, model: Path, options: dict[str, Any], name: str) -> Process:
    log = BENCH / "logs" / f"speculative-{name}.log"
    return Process(python, "native", [str(model), "--options", json.dumps(options)], log)


def _prompts(model: Path) -> list[tuple[int, ...]]:
    """Return beginnings of held-out modules whose first half is repeated after them."""
    tokenizer, config = load_tokenizer(model), DataConfig(source="stdlib")
    prompts = []
    for document in read_documents(config):
        if split_of(document.name, config) == "train":
            continue
        tokens = tokenizer.encode(document.text)[:_PROMPT_TOKENS]
        if len(tokens) == _PROMPT_TOKENS:
            prompts.append((*tokens, *tokens[1 : _PROMPT_TOKENS // 2]))
        if len(prompts) == _NUM_PROMPTS:
            break
    return prompts
