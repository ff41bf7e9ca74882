"""Measure one encoder beside the dense one it came from, with the kernels that serve it, and judge.

Takes an EvaluateConfig whose `data` is a text file, an input a line; gives an EncoderEvaluation
and, if asked, writes the verdict into the model's manifest. It does not know who publishes it.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cluster.errors import ConfigError, DataError
from cluster.storage import resolve_output, verify_directory
from jobs.compression.encoders import LoadedEncoder, load_encoder
from jobs.compression.recipe import predicted_bytes
from jobs.config import EvaluateConfig, GateConfig, Recipe
from jobs.data.tokenizer import check_fits, load_tokenizer
from jobs.evaluation.gate import Judged, Verdict
from jobs.evaluation.health import weight_faults
from jobs.evaluation.recording import record_verdict
from jobs.models import _hf
from jobs.models.encoder import is_encoder, read_config

_BATCH = 32


class EncoderEvaluation(Judged):
    """An encoder and the verdict on its distances."""


def compares_encoders(config: EvaluateConfig) -> bool:
    """Return whether the base model of an evaluation is an encoder."""
    base = resolve_output(config.base)
    return base.is_dir() and is_encoder(_hf.read_config(base))


def evaluate_encoder(config: EvaluateConfig) -> EncoderEvaluation:
    """Embed the same inputs with both models and judge the distances; digests are checked first.

    A refusal is a result, not an error. Raises DataError for a file without enough inputs,
    ModelFormatError or IntegrityError for what cannot be measured.
    """
    model, base = resolve_output(config.model), resolve_output(config.base)
    manifest = verify_directory(model)
    # The base is the reference: in float32, whatever serves it.
    loaded, base_loaded = load_encoder(model, verify=False), load_encoder(base, verify=False)
    inputs = _inputs(config, base, loaded)
    distance_N = 1 - (_vectors(loaded, inputs) * _vectors(base_loaded, inputs)).sum(dim=-1)
    size_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    base_bytes = predicted_bytes(read_config(base), Recipe())
    verdict = judge_distances(
        distance_N, (size_bytes, base_bytes), config.gate, weight_faults(model, base)
    )
    if config.record:
        record_verdict(model, manifest, verdict)
    return EncoderEvaluation(model=model, base=base, verdict=verdict)


def judge_distances(
    distance_N: Tensor,
    sizes_bytes: tuple[int, int],
    limits: GateConfig,
    faults: Sequence[str] = (),
) -> Verdict:
    """Judge cosine distances, one an input, and the bytes of model and base.

    The farthest input decides. What is not finite, has `faults` or is not smaller than its origin
    is refused.
    """
    size_bytes, base_bytes = sizes_bytes
    farthest, ratio = float(distance_N.max()), size_bytes / base_bytes
    reasons = list(faults)
    if not farthest <= limits.max_cosine_distance:
        reasons.append(
            f"the farthest vector is {farthest:.2g} from the base model's, the limit "
            f"{limits.max_cosine_distance:.2g}"
        )
    if ratio >= min(1.0, limits.max_size_ratio):
        reasons.append(
            f"the size is {ratio:.1%} of the bf16 model's ({size_bytes:,} bytes against "
            f"{base_bytes:,}), the limit {limits.max_size_ratio:.1%}"
        )
    return Verdict(
        passed=not reasons,
        reasons=tuple(reasons),
        numbers={
            "cosine_distance_max": farthest if distance_N.isfinite().all() else None,
            "cosine_distance_mean": float(distance_N.nan_to_num().mean()),
            "max_cosine_distance": limits.max_cosine_distance,
            "num_sequences": len(distance_N),
            "size_bytes": size_bytes,
            "base_size_bytes": base_bytes,
            "size_ratio": ratio,
            "max_size_ratio": limits.max_size_ratio,
        },
        limits=limits,
    )


def plan_encoder_rows(config: EvaluateConfig) -> list[tuple[str, str]]:
    """Return what would be measured, without loading weights."""
    return [
        ("model", str(resolve_output(config.model))),
        ("base", str(resolve_output(config.base))),
        ("data", str(resolve_output(config.data))),
        ("inputs", f"the first {config.gate.eval_sequences}"),
        ("writes the verdict", "into the manifest" if config.record else "no"),
    ]


def _inputs(config: EvaluateConfig, base: Path, loaded: LoadedEncoder) -> list[list[int]]:
    path = resolve_output(config.data)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"`data` = {config.data} cannot be read as text: {error}") from None
    wanted = config.gate.eval_sequences
    if len(lines) < wanted:
        raise ConfigError(
            f"`gate.eval_sequences` = {wanted}, and {path} has {len(lines)} lines that are not "
            "empty. Lower it or give more inputs."
        )
    tokenizer = load_tokenizer(base)
    check_fits(tokenizer, loaded.config.vocab_size)
    return [tokenizer.encode(line)[: loaded.config.max_seq_len] for line in lines[:wanted]]


def _vectors(loaded: LoadedEncoder, inputs: list[list[int]]) -> Tensor:
    with torch.inference_mode():
        parts = [loaded.model(inputs[i : i + _BATCH]) for i in range(0, len(inputs), _BATCH)]
    return torch.cat(parts)
