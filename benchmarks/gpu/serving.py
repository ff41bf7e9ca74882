"""Tokens per second on a GPU: the native engine beside transformers' continuous batching.

Takes a shape; gives rates at several batch sizes in bf16, FP8 and W4 with random weights, and their
share of what the device's memory bandwidth allows. Each format is checked before it is timed. What
fails is reported under `failures`, and the rest goes on.
"""

import argparse
import gc
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks._report import document_of
from benchmarks.gpu import models
from benchmarks.gpu.checks import check
from benchmarks.gpu.contenders import Ours, Prompts, Run, Theirs, release
from benchmarks.gpu.models import SHAPES, Place
from cluster.errors import PlacementError, RaysmithError
from cluster.hardware import load_catalogue
from cluster.storage import write_json
from jobs.compression.packing import LoadedModel
from jobs.config import DecoderConfig
from jobs.kernels.formats import Scheme

CLAIM = "GPU serving: the native engine beside transformers' continuous batching"
FORMATS: tuple[Scheme, ...] = ("bf16", "fp8", "w4a16")
PEER = "transformers bf16"
_PROMPT_TOKENS, _ANSWER_TOKENS = 128, 64
_MAX_LEN = 256


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    config: DecoderConfig
    place: Place
    batches: tuple[int, ...]
    rounds: int
    may_peer_use_flash: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the report; return the exit code."""
    arguments = _parse(argv)
    given = sys.argv[1:] if argv is None else argv
    try:
        plan = _plan(arguments)
        document = {**document_of(CLAIM, "gpu.serving", given), **measure(plan)}
        if arguments.json is not None:
            write_json(arguments.json, document)
    except RaysmithError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    return 1 if document["failures"] else 0


def measure(plan: Plan) -> dict[str, Any]:
    """Return the configuration, and every contender's rates by batch size."""
    engines: dict[str, Any] = {}
    failures: dict[str, str] = {}
    contenders: dict[str, Callable[[], dict[str, Any]]] = {
        f"raysmith {scheme}": lambda scheme=scheme: _measure_ours(plan, scheme)
        for scheme in FORMATS
    }
    contenders[PEER] = lambda: _measure_theirs(plan)
    for name, contender in contenders.items():
        try:
            engines[name] = contender()
        # The device is there for minutes: what one contender cannot do must not cost the others.
        except (RaysmithError, RuntimeError, ValueError, TypeError, ImportError) as error:
            traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {error}"
        else:
            _print(name, engines[name])
        gc.collect()
        release()
    return {
        "config": {
            "model": plan.config.model_dump(mode="json"),
            "device": str(plan.place.device),
            "dtype": str(plan.place.dtype),
            "prompt_tokens": _PROMPT_TOKENS,
            "answer_tokens": _ANSWER_TOKENS,
            "rounds": plan.rounds,
        },
        "bandwidth_bytes_per_s": _bandwidth(plan.place.device),
        "engines": engines,
        "ratios": _ratios(engines),
        "failures": failures,
    }


def _measure_ours(plan: Plan, scheme: Scheme) -> dict[str, Any]:
    loaded = models.ours(plan.config, scheme, plan.place)
    weight_bytes = models.read_bytes_per_pass(loaded)
    found: dict[str, Any] = {
        "check": check(loaded, plan.place),
        "operators": sorted(set(loaded.operators.values())),
        "weight_bytes_per_pass": weight_bytes,
        "batches": {},
    }
    for batch in plan.batches:
        found["batches"][str(batch)] = _measure_batch(
            plan, batch, weight_bytes, lambda batch=batch: _ours(loaded, plan, batch)
        )
    return found


def _ours(loaded: LoadedModel, plan: Plan, batch: int) -> Ours:
    return Ours(loaded, plan.place, batch, _MAX_LEN)


def _measure_theirs(plan: Plan) -> dict[str, Any]:
    model = models.theirs(plan.config, plan.place)
    embedding_bytes = model.get_input_embeddings().weight.nbytes
    weight_bytes = sum(p.nbytes for p in model.parameters()) - embedding_bytes
    found: dict[str, Any] = {"weight_bytes_per_pass": weight_bytes, "batches": {}}
    for batch in plan.batches:
        found["batches"][str(batch)] = _measure_batch(
            plan,
            batch,
            weight_bytes,
            lambda batch=batch: Theirs(
                model, plan.place, batch, _MAX_LEN, may_use_flash=plan.may_peer_use_flash
            ),
        )
    return found


def _measure_batch(
    plan: Plan, batch: int, weight_bytes: int, make: Callable[[], Ours | Theirs]
) -> dict[str, Any]:
    """Return rates of one batch size: a run that is not timed, then the rounds."""
    prompts = _prompts(plan, batch)
    contender = make()
    try:
        contender.run(prompts, _ANSWER_TOKENS)
        runs = [contender.run(prompts, _ANSWER_TOKENS) for _ in range(plan.rounds)]
        how = contender.describe()
    finally:
        contender.close()
        del contender
        gc.collect()
        release()
    return {"how": how, **_rates(plan, batch, weight_bytes, runs)}


def _rates(plan: Plan, batch: int, weight_bytes: int, runs: Sequence[Run]) -> dict[str, Any]:
    whole = [run.tokens_per_s for run in runs]
    decoding = [run.decode_tokens_per_s for run in runs]
    known = [rate for rate in decoding if rate is not None]
    floor = _floor_tokens_per_s(plan, batch, weight_bytes)
    decode_rate = statistics.median(known) if known else None
    return {
        "tokens_per_s": statistics.median(whole),
        "rates": whole,
        "decode_tokens_per_s": decode_rate,
        "decode_rates": decoding,
        "bandwidth_floor_tokens_per_s": floor,
        "share_of_floor": decode_rate / floor if decode_rate and floor else None,
    }


def _floor_tokens_per_s(plan: Plan, batch: int, weight_bytes: int) -> float | None:
    """Return the most tokens per second of decoding that reading weights and cache once allows.

    Keys and values are counted at the mean length of the run.
    """
    bandwidth = _bandwidth(plan.place.device)
    if bandwidth is None:
        return None
    config = plan.config
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.resolved_head_dim
    token_bytes *= plan.place.dtype.itemsize
    mean_length = _PROMPT_TOKENS + _ANSWER_TOKENS / 2
    return batch * bandwidth / (weight_bytes + batch * mean_length * token_bytes)


def _bandwidth(device: torch.device) -> float | None:
    """Return the catalogue's memory bandwidth of a GPU; None for others and unknown ones."""
    if device.type != "cuda":
        return None
    entry = load_catalogue().match(torch.cuda.get_device_name(device))
    return None if entry is None else entry.bandwidth_bytes_per_s


def _ratios(engines: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return each format's tokens per second over those of transformers, by batch size."""
    if PEER not in engines:
        return {}
    peer = engines[PEER]["batches"]
    return {
        name: {
            batch: found["tokens_per_s"] / peer[batch]["tokens_per_s"]
            for batch, found in engine["batches"].items()
        }
        for name, engine in engines.items()
        if name != PEER
    }


def _prompts(plan: Plan, batch: int) -> Prompts:
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, _PROMPT_TOKENS)
    rows = torch.randint(3, plan.config.vocab_size, shape, generator=generator).tolist()
    return [tuple(row) for row in rows]


def _print(name: str, engine: dict[str, Any]) -> None:
    for batch, found in engine["batches"].items():
        share = found["share_of_floor"]
        print(
            f"{name:18s} batch {batch:>4s}: {found['tokens_per_s']:9.1f} tokens/s, decoding "
            f"{found['decode_tokens_per_s'] or float('nan'):9.1f}, "
            f"{'of no known floor' if share is None else f'{share:.0%} of the floor'}; "
            f"{found['how']}",
            flush=True,
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report to this file")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--peer-attention",
        choices=("auto", "sdpa"),
        default="auto",
        help="auto: flash attention where transformers finds it; sdpa: PyTorch's",
    )
    return parser.parse_args(argv)


def _plan(arguments: argparse.Namespace) -> Plan:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise PlacementError(
            "this benchmark needs a CUDA device, and torch finds none here. Run it where there is "
            "one; `--device cpu --shape tiny` runs the same code on a CPU, which says nothing "
            "about GPUs."
        )
    is_cuda = arguments.device == "cuda"
    place = Place(torch.device(arguments.device), torch.bfloat16 if is_cuda else torch.float32)
    batches = cast("list[int]", arguments.batches)
    return Plan(
        SHAPES[arguments.shape],
        place,
        tuple(batches),
        arguments.rounds,
        may_peer_use_flash=arguments.peer_attention == "auto",
    )


if __name__ == "__main__":
    raise SystemExit(main())
