"""Tokens per second of the native engine beside transformers' `generate`, on one model.

Takes a random Llama; gives rates for one request, equal requests together, and requests of mixed
lengths. All contenders hold the same weights and take turns in one process; prompts are part of the
time. Greedy tokens of the two float32 contenders are compared too.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks._report import alternate, describe_case, rate_of, run_benchmark
from cluster.storage import write_manifest
from jobs.compression.packing import load_model, save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import DecoderConfig, Recipe, Step
from jobs.models import decoder
from serving.engines._protocol import GenerateRequest
from serving.engines.native.config import EngineConfig
from serving.engines.native.engine import NativeEngine
from serving.engines.native.loading import start

CLAIM = "Generation: the native engine beside transformers' generate"
BASELINE = "transformers float32"
_COMPRESSED_SCHEMES = ("w8a8", "w4a16")


@dataclass(frozen=True)
class Request:
    """A prompt and how many tokens follow it."""

    prompt: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True)
class Case:
    """Requests that arrive together."""

    name: str
    num_requests: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]

    def requests(self, vocab_size: int) -> list[Request]:
        """Return seeded requests; lengths are uniform within their bounds."""
        generator = torch.Generator().manual_seed(0)

        def draw(low: int, high: int, count: int = 1) -> list[int]:
            return torch.randint(low, high, (count,), generator=generator).tolist()

        requests = []
        for _ in range(self.num_requests):
            length = draw(self.prompt_tokens[0], self.prompt_tokens[1] + 1)[0]
            num_tokens = draw(self.new_tokens[0], self.new_tokens[1] + 1)[0]
            requests.append(Request(tuple(draw(0, vocab_size, length)), num_tokens))
        return requests


QUICK_MODEL = DecoderConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    max_seq_len=1024,
)
FULL_MODEL = QUICK_MODEL.replace(
    vocab_size=32_000,
    hidden_size=1024,
    intermediate_size=2816,
    num_layers=16,
    num_heads=16,
    tie_embeddings=False,
)
QUICK_CASES = (
    Case("one request", 1, (64, 64), (32, 32)),
    Case("8 equal requests", 8, (64, 64), (32, 32)),
    Case("16 mixed requests", 16, (8, 128), (4, 64)),
)
FULL_CASES = (
    Case("one request", 1, (128, 128), (64, 64)),
    Case("8 equal requests", 8, (128, 128), (64, 64)),
    Case("32 mixed requests", 32, (16, 512), (8, 128)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    transformers_logging.disable_progress_bar()
    return run_benchmark(CLAIM, "serving", measure, argv)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration and every case of the benchmark."""
    config, cases = (QUICK_MODEL, QUICK_CASES) if arguments.quick else (FULL_MODEL, FULL_CASES)
    rounds = 3 if arguments.quick else 7
    with tempfile.TemporaryDirectory(prefix="raysmith-bench-") as folder:
        dense = Path(folder) / "dense"
        decoder.save(decoder.build(config, seed=0), dense, dtype=torch.float32)
        references = {
            BASELINE: _load_reference(dense, torch.float32),
            "transformers bfloat16": _load_reference(dense, torch.bfloat16),
        }
        engines = _start_engines(dense, max(case.num_requests for case in cases))
        try:
            measured = [
                _measure_case(case, case.requests(config.vocab_size), references, engines, rounds)
                for case in cases
            ]
        finally:
            for engine in engines.values():
                engine.close()
    return {"config": {"model": config.model_dump(), "rounds": rounds}, "cases": measured}


def _measure_case(
    case: Case,
    requests: list[Request],
    references: dict[str, Any],
    engines: dict[str, NativeEngine],
    rounds: int,
) -> dict[str, Any]:
    num_tokens = sum(request.num_tokens for request in requests)
    contenders: dict[str, Callable[[], list[list[int]]]] = {
        **{n: partial(_generate_reference, model, requests) for n, model in references.items()},
        **{n: partial(_run_native, engine, requests) for n, engine in engines.items()},
    }
    expected, found = contenders[BASELINE](), contenders["native float32"]()
    timed = {name: partial(_rate, generate) for name, generate in contenders.items()}
    rates = alternate(timed, rounds)
    described = describe_case(case.name, asdict(case), rates, BASELINE)
    described["generated_tokens"] = num_tokens
    described["equal_greedy_tokens_ratio"] = _agreement(expected, found)
    return described


def _start_engines(dense: Path, max_slots: int) -> dict[str, NativeEngine]:
    options = EngineConfig(max_slots=max_slots, dtype="float32", device="cpu")
    engines = {"native float32": start(decoder.load(dense), options)}
    for scheme in _COMPRESSED_SCHEMES:
        step = Step(method="rtn", options={"scheme": scheme})
        directory = dense.with_name(scheme)
        save_compressed(apply_recipe(decoder.load(dense), Recipe(steps=(step,))), directory)
        write_manifest(directory, {"kind": "model"})
        engines[f"native {scheme}"] = start(load_model(directory), options)
    return engines


def _rate(generate: Callable[[], list[list[int]]]) -> float:
    return rate_of(lambda: sum(len(tokens) for tokens in generate()))


def _run_native(engine: NativeEngine, requests: list[Request]) -> list[list[int]]:
    return asyncio.run(_generate_native(engine, requests))


async def _generate_native(engine: NativeEngine, requests: list[Request]) -> list[list[int]]:
    async def one(request: Request) -> list[int]:
        asked = GenerateRequest(
            prompt_tokens=request.prompt,
            max_tokens=request.num_tokens,
            temperature=0.0,
            ignore_eos=True,
        )
        return [token async for chunk in engine.generate(asked) for token in chunk.token_ids]

    return await asyncio.gather(*(one(request) for request in requests))


def _load_reference(directory: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    model.generation_config.pad_token_id = 0
    return model


@torch.inference_mode()
def _generate_reference(model: Any, requests: list[Request]) -> list[list[int]]:
    """Generate for all requests in one batch, padded on the left, as long as the longest needs.

    Tokens beyond what a request asked for are not counted.
    """
    width = max(len(request.prompt) for request in requests)
    tokens_BT = torch.zeros(len(requests), width, dtype=torch.long)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, request in enumerate(requests):
        tokens_BT[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
        mask_BT[row, width - len(request.prompt) :] = 1
    generated_BT = model.generate(
        tokens_BT,
        attention_mask=mask_BT,
        max_new_tokens=max(request.num_tokens for request in requests),
        do_sample=False,
    )
    rows = generated_BT[:, width:].tolist()
    return [row[: request.num_tokens] for row, request in zip(rows, requests, strict=True)]


def _agreement(expected: list[list[int]], found: list[list[int]]) -> float:
    """Return the share of tokens that are equal."""
    pairs = [
        (wanted, given)
        for row, other in zip(expected, found, strict=True)
        for wanted, given in zip(row, other, strict=True)
    ]
    return sum(wanted == given for wanted, given in pairs) / len(pairs)


if __name__ == "__main__":
    raise SystemExit(main())
