"""The same methods through llmcompressor and through this project: `parity_llmcompressor`.

Takes a trained model and its data; gives perplexity and seconds of both for each method, how far
Wanda's masks agree, and whether directories go from one project to the other (see interop.py).
Both sides read the same tokens in the same order, work in float32 with as many threads, store
bfloat16, and are judged by this project's evaluation.
"""

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.compression.interop import measure_interop
from benchmarks.compression.subject import SEQ_LEN, Subject
from benchmarks.serving.models import BENCH, interpreter, run_in
from cluster.storage import digest_file
from jobs.compression.layers import linear_names, weight_of
from jobs.compression.packing import copy_companions, load_model, save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.compression.text import CalibrationText
from jobs.config import Recipe, Step
from jobs.data.tokens import open_split
from jobs.evaluation.quality import perplexity_increase, sequence_losses
from jobs.models import decoder

PEER = "llmcompressor"
_GROUP_SIZE = 128
_DAMPING = 0.01
_SPARSITY = 0.5
TOLERANCE = 0.005  # "within 0.5% of theirs or better"
LEAST_AGREEMENT = 0.99


@dataclass(frozen=True)
class Case:
    """One method with equal settings: our steps, and the peer's method and settings."""

    steps: tuple[Step, ...]
    method: str
    settings: Mapping[str, Any]
    is_pruning: bool = False


def _rounding(observer: str) -> dict[str, Any]:
    return {"scheme": "w4a16", "group_size": _GROUP_SIZE, "observer": observer}


def _their_rounding(observer: str) -> dict[str, Any]:
    return {"group_size": _GROUP_SIZE, "observer": observer}


CASES: Mapping[str, Case] = {
    "gptq": Case(
        (
            Step(
                method="gptq", options={**_rounding("mse"), "act_order": True, "damping": _DAMPING}
            ),
        ),
        "gptq",
        {**_their_rounding("memoryless_mse"), "actorder": "static", "damping": _DAMPING},
    ),
    "awq": Case(
        (Step(method="awq"), Step(method="rtn", options=_rounding("mse"))),
        "awq",
        _their_rounding("memoryless_mse"),
    ),
    "wanda": Case(
        (Step(method="wanda", options={"sparsity": _SPARSITY}),),
        "wanda",
        {"sparsity": _SPARSITY},
        is_pruning=True,
    ),
    "sparsegpt": Case(
        (Step(method="sparsegpt", options={"sparsity": _SPARSITY, "damping": _DAMPING}),),
        "sparsegpt",
        {"sparsity": _SPARSITY, "damping": _DAMPING},
        is_pruning=True,
    ),
}


@dataclass(frozen=True)
class Texts:
    """Token ids: what methods see, and what both results are judged on."""

    calibration_NT: NDArray[np.int64]  # noqa: N815
    held_out_NT: NDArray[np.int64]  # noqa: N815  # one more a row, the last target


@dataclass
class _Side:
    """One project's results for one case."""

    directory: Path
    seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def measure_parity(
    subject: Subject,
    rounds: int = 1,
    *,
    num_sequences: int = 128,
    eval_sequences: int | None = None,
) -> dict[str, Any]:
    """Return the report's `parity_llmcompressor`; the projects take turns in each round.

    `num_sequences` of SEQ_LEN tokens calibrate; `eval_sequences` of the test split judge, unset:
    all of it. Raises ConfigError without the peer's environment (`make bench-peers`).
    """
    interpreter(PEER)
    texts = read_texts(subject.data, num_sequences, eval_sequences)
    with tempfile.TemporaryDirectory(dir=BENCH) as temporary:
        folder = Path(temporary)
        np.save(folder / "tokens.npy", texts.calibration_NT)
        base = _losses(subject.model, texts)
        found: dict[str, Any] = {
            "model_sha256": digest_file(subject.model / "model.safetensors"),
            "calibration_tokens": texts.calibration_NT.size,
            "held_out_tokens": texts.held_out_NT[:, 1:].size,
            "threads": torch.get_num_threads(),
            "dense_perplexity": float(np.exp(base.mean())),
        }
        for name, case in CASES.items():
            ours, theirs = _alternate(name, case, subject.model, folder, texts, rounds)
            found[name] = _compare(case, ours, theirs, texts)
            _say(name, found[name])
            found["versions"] = theirs.facts["versions"]
        found["interop"] = measure_interop(
            subject.model,
            {name: (folder / f"{name}-ours", folder / f"{name}-theirs") for name in CASES},
            texts.held_out_NT[:4, :-1],
        )
    return found


def read_texts(data: Path, num_sequences: int, eval_sequences: int | None) -> Texts:
    """Return the token ids of a prepared folder."""
    train, test = open_split(data, "train"), open_split(data, "test")
    rows = train.sample(num_sequences, SEQ_LEN, seed=0)
    num_held_out = test.num_sequences(SEQ_LEN)
    if eval_sequences is not None:
        num_held_out = min(num_held_out, eval_sequences)
    return Texts(rows[:, :-1].copy(), test.sequences(range(num_held_out), SEQ_LEN))


def compress_ours(case: Case, model: Path, tokens_NT: NDArray[np.int64], output: Path) -> float:
    """Write our directory of a case; return the seconds without loading and saving."""
    dense = decoder.load(model)
    begin_s = time.perf_counter()
    compressed = apply_recipe(
        dense, Recipe(steps=case.steps), CalibrationText.of(torch.from_numpy(tokens_NT))
    )
    seconds = time.perf_counter() - begin_s
    output.mkdir()
    save_compressed(compressed, output)
    copy_companions(model, output)
    return seconds


def compress_theirs(case: Case, model: Path, tokens: Path, output: Path) -> dict[str, Any]:
    """Have the peer write its directory of a case; return its seconds and versions."""
    command = ["python", "-m", f"benchmarks.peers.{PEER}", str(model), str(tokens), str(output)]
    command += ["--method", case.method, "--settings", json.dumps(case.settings)]
    command += ["--threads", str(torch.get_num_threads())]
    found: dict[str, Any] = json.loads(run_in(PEER, command).splitlines()[-1])
    return found


def mask_agreement(one: Path, other: Path) -> float:
    """Return the share of weights of linear layers that are zero in both models or in neither."""
    first, second = decoder.load(one), decoder.load(other)
    equal = total = 0
    for name in linear_names(first):
        is_equal_OI = (weight_of(first, name) == 0) == (weight_of(second, name) == 0)
        equal += int(is_equal_OI.sum())
        total += is_equal_OI.numel()
    return equal / total


def _alternate(
    name: str, case: Case, model: Path, folder: Path, texts: Texts, rounds: int
) -> tuple[_Side, _Side]:
    ours, theirs = _Side(folder / f"{name}-ours"), _Side(folder / f"{name}-theirs")
    for turn in range(rounds):
        # Every round writes anew; the last one's directories stay under the plain names.
        suffix = "" if turn == rounds - 1 else f"-{turn}"
        outputs = [Path(f"{side.directory}{suffix}") for side in (ours, theirs)]
        ours.seconds.append(compress_ours(case, model, texts.calibration_NT, outputs[0]))
        theirs.facts = compress_theirs(case, model, folder / "tokens.npy", outputs[1])
        theirs.seconds.append(theirs.facts["seconds"])
    return ours, theirs


def _compare(case: Case, ours: _Side, theirs: _Side, texts: Texts) -> dict[str, Any]:
    our_losses, their_losses = (_losses(side.directory, texts) for side in (ours, theirs))
    increase = perplexity_increase(their_losses, our_losses, samples=2000, seed=0)
    seconds = median(ours.seconds), median(theirs.seconds)
    found: dict[str, Any] = {
        "perplexity": {
            "ours": float(np.exp(our_losses.mean())),
            "theirs": float(np.exp(their_losses.mean())),
            "ours_over_theirs": 1 + increase.point,
            "lower": 1 + increase.lower,
            "upper": 1 + increase.upper,
        },
        "seconds": {
            "ours": ours.seconds,
            "theirs": theirs.seconds,
            "ours_over_theirs": seconds[0] / seconds[1],
        },
        "is_as_good": increase.point <= TOLERANCE,
        "is_as_fast": seconds[0] <= seconds[1],
        "settings": dict(case.settings),
        "steps": [step.model_dump(mode="json") for step in case.steps],
    }
    if case.is_pruning:
        agreement = mask_agreement(ours.directory, theirs.directory)
        found["mask_agreement"] = agreement
        found["has_same_mask"] = agreement >= LEAST_AGREEMENT
    return found


def _say(name: str, found: Mapping[str, Any]) -> None:
    perplexity, seconds = found["perplexity"], found["seconds"]
    print(
        f"{name:10} perplexity {perplexity['ours']:.3f} / {perplexity['theirs']:.3f}, "
        f"seconds {median(seconds['ours']):.1f} / {median(seconds['theirs']):.1f} (ours / theirs)",
        file=sys.stderr,
        flush=True,
    )


def _losses(directory: Path, texts: Texts) -> NDArray[np.float64]:
    return sequence_losses(load_model(directory, verify=False).model, texts.held_out_NT, 1)
