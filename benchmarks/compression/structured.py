"""A third of the parameters cut away and the rest repaired, beside the same shape from scratch.

Takes subjects and their trials; gives perplexities after equal numbers of tokens, a tenth of those
that the model was trained on at most, the cut model's decode latency over the dense one's, and
what W8A8 costs on top. The fresh model's learning rate is the best of a few, by validation loss.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.compression.contenders import DENSE, W8A8, recipe_of
from benchmarks.compression.estimates import at_least, at_most, estimate, increase
from benchmarks.compression.quality import Found
from benchmarks.compression.remembered import remembered
from benchmarks.compression.subject import Subject, train, training
from benchmarks.compression.trial import Trial
from cluster.storage import digest_bytes, digest_file, read_manifest, staged_directory
from jobs.compression.packing import copy_companions, load_model, save_compressed
from jobs.compression.recipe import apply_recipe, final_shape
from jobs.config import DecoderConfig, OptimizerConfig, Recipe
from jobs.evaluation.latency import compare_latency
from jobs.models import decoder
from jobs.plan import count_parameters

TOKENS_RATIO = 0.1  # of the training's, as many as the claim allows
CUTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("depth", {"num_blocks": 3}),
    ("width", {"intermediate_size": 896}),
)
REPAIR_LR = 1e-3
SCRATCH_LRS = (1e-3, 2e-3, 4e-3)
_LATENCY_LIMIT, _W8A8_LIMIT = 0.8, 0.02
_REMOVED = 1 / 3


@dataclass(frozen=True)
class Plan:
    """What a model is cut and repaired by, and how a fresh one of a shape is made.

    `scratch(shape, lr)` returns a model trained on as many tokens as the repair reads. What is
    repaired is kept in `folder`.
    """

    recipe: Recipe
    scratch: Callable[[DecoderConfig, float], Path]
    folder: Path


def plan_of(subject: Subject) -> Plan:
    """Return the plan for a subject: both ways to repair a shape read a share of its tokens."""
    config = subject.config
    steps = int(TOKENS_RATIO * config.max_steps)
    tokens = steps * config.global_batch_size * config.seq_len
    repair = {
        "num_tokens": tokens,
        "batch_size": config.global_batch_size,
        "seq_len": config.seq_len,
        "lr": REPAIR_LR,
        "seed": subject.seed,
    }

    def scratch(shape: DecoderConfig, lr: float) -> Path:
        fresh = training(subject.seed, shape, steps).replace(
            name=f"scratch-{subject.seed}-{shape.num_layers}x{shape.intermediate_size}-{steps}-{lr:g}",
            optimizer=OptimizerConfig(lr=lr),
        )
        return train(fresh, subject.data, subject.data.parent / fresh.name)

    return Plan(recipe_of(*CUTS, ("distill", repair)), scratch, subject.data.parent / "repaired")


def measure(trials: Sequence[Trial], plans: Sequence[Plan], rounds: int) -> Found:
    """Return all figures."""
    shape = final_shape(trials[0].shape, plans[0].recipe)
    assert isinstance(shape, DecoderConfig), "a decoder stays one"
    removed = 1 - count_parameters(shape) / count_parameters(trials[0].shape)
    # One model chooses the learning rate for all.
    lr = min(SCRATCH_LRS, key=lambda lr: _validation_loss(plans[0].scratch(shape, lr)))
    repaired = [repair(trial, plan) for trial, plan in zip(trials, plans, strict=True)]
    models = []
    for trial, plan, path in zip(trials, plans, repaired, strict=True):
        scratch = plan.scratch(shape, lr)
        models.append(
            {
                DENSE: trial.losses(DENSE),
                "repaired": _losses(trial, "repaired", path),
                "scratch": _losses(trial, "scratch", scratch),
                "w8a8": _losses(trial, "repaired-w8a8", _w8a8(path)),
            }
        )
    better = estimate(models, increase("repaired", "scratch"))
    w8a8 = estimate(models, increase("w8a8", "repaired"))
    ratio = statistics.median(_latency_ratios(trials[0].model, repaired[0], rounds))
    perplexities = {
        name: estimate(models, lambda means, name=name: np.exp(means[name])).model_dump(mode="json")
        for name in models[0]
    }
    section = {
        "shape": shape.model_dump(mode="json"),
        "recipe": plans[0].recipe.model_dump(mode="json"),
        "scratch_lr": lr,
        "parameters_removed": removed,
        "perplexity_dense": perplexities[DENSE],
        "perplexity_repaired": perplexities["repaired"],
        "perplexity_scratch": perplexities["scratch"],
        "repaired_versus_scratch": better.model_dump(mode="json"),
        "better": better.upper < 0,
        "latency_ratio": ratio,
        "w8a8_increase": w8a8.model_dump(mode="json"),
        "w8a8_increase_upper": w8a8.upper,
    }
    claims = [
        at_least("structured.parameters_removed", removed, _REMOVED),
        at_most("structured.repaired_versus_scratch.upper", better.upper, 0.0),
        at_most("structured.latency_ratio", ratio, _LATENCY_LIMIT),
        at_most("structured.w8a8_increase_upper", w8a8.upper, _W8A8_LIMIT),
    ]
    return {"structured": section}, claims


def repair(trial: Trial, plan: Plan) -> Path:
    """Return the directory of a model that was cut and repaired, now or before by the same code."""
    texts = [trial.text.tokens_NT.numpy(), *trial.text.split.shards]
    known = remembered(plan.folder, trial.model, texts, packages=["training"])
    path = known.path(plan.recipe.model_dump(mode="json"))
    if not path.is_dir():
        with staged_directory(path, {"kind": "model"}) as staged:
            save_compressed(trial.compress(plan.recipe), staged)
            copy_companions(trial.model, staged)
    return path


def _w8a8(path: Path) -> Path:
    target = path.with_name(f"{path.name}-{digest_bytes(W8A8.model_dump_json().encode())[:12]}")
    if not target.is_dir():
        with staged_directory(target, {"kind": "model"}) as staged:
            save_compressed(apply_recipe(decoder.load(path), W8A8), staged)
    return target


def _losses(trial: Trial, name: str, model: Path) -> NDArray[np.float64]:
    what = {"model_sha256": digest_file(model / "model.safetensors")}
    return trial.measure(name, lambda: load_model(model).model, what)


def _validation_loss(model: Path) -> float:
    return float(read_manifest(model)["metrics"]["validation_loss"])


def _latency_ratios(dense: Path, cut: Path, rounds: int) -> list[float]:
    """Return the cut model's decode latency over the dense one's, in turns, both in bfloat16."""
    models = [load_model(path).model for path in (dense, cut)]
    ratios = []
    for _ in range(rounds):
        base, smaller = compare_latency(models, context=128, tokens=32)
        ratios.append(smaller.p50_ms / base.p50_ms)
    return ratios
