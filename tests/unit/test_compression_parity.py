"""What the parity benchmark makes of two projects' directories and logits."""

from pathlib import Path

import numpy as np
from tiny_models import decoder_config

from benchmarks.compression.interop import (
    compare,
    interop_claims,
    our_logits,
    reason_of,
    write_formats,
)
from benchmarks.compression.parity import CASES, Case, compress_ours, mask_agreement
from jobs.config import Step
from jobs.models.decoder import build, linear_names, load, save

TOKENS_NT = np.arange(44).reshape(4, 11)


def write_model(directory: Path) -> Path:
    directory.mkdir()
    save(build(decoder_config(), seed=0), directory)
    return directory


def prune(model: Path, output: Path, sparsity: float) -> Path:
    step = Step(method="magnitude", options={"sparsity": sparsity})
    assert compress_ours(Case((step,), "magnitude", {}), model, TOKENS_NT, output) > 0
    return output


def test_mask_agreement_when_masks_are_nested_is_the_share_of_equal_places(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    half, quarter = prune(model, tmp_path / "half", 0.5), prune(model, tmp_path / "quarter", 0.25)
    assert mask_agreement(half, half) == 1.0
    assert mask_agreement(half, quarter) == 0.75


def test_cases_when_resolved_change_every_linear_layer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    for name in ("wanda", "sparsegpt"):
        compress_ours(CASES[name], model, TOKENS_NT, tmp_path / name)
        pruned = load(tmp_path / name)
        for layer in linear_names(pruned):
            zeros = (pruned.get_submodule(layer).weight == 0).float().mean()
            assert 0.45 <= zeros <= 0.55


def test_compare_when_one_library_rounds_otherwise_says_by_how_much() -> None:
    dense = np.random.default_rng(0).normal(size=(2, 5, 50)).astype(np.float32)
    dense /= dense.std()
    found = compare(dense + 0.3, dense + 0.3 + 0.02, dense)
    assert abs(found.root_mean_square - 0.02) < 1e-5
    assert abs(found.of_rounding - 0.3) < 1e-5
    assert found.same_choice == 1.0
    assert not found.is_within_rounding("w4a16")
    assert found.is_within_rounding("w8a8")


def test_formats_when_written_are_read_with_the_roundings_they_name(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    dense = our_logits(model, TOKENS_NT)
    formats = write_formats(model, tmp_path, group_size=32)
    moved = {
        name: float(np.square(our_logits(path, TOKENS_NT) - dense).mean())
        for name, path in formats.items()
    }
    assert moved["bf16"] == 0
    assert 0 < moved["w8a8"] < moved["w4a16"]


def test_reason_when_a_process_failed_is_its_last_error() -> None:
    output = "Traceback:\n[rank0]: AttributeError: no `gemm`\n\nProcessed prompts: 0%\n"
    assert reason_of(output) == "[rank0]: AttributeError: no `gemm`"
    assert reason_of("it ended\n") == "it ended"


def test_interop_claims_when_libraries_differ_or_refuse_are_missed_by_name() -> None:
    near = {"root_mean_square": 0.004, "limit": 0.01}
    report = {
        "theirs_in_our_engine": {
            "awq": {**near, "engine_agrees": 1.0},
            "gptq": {**near, "engine_agrees": 0.9},
        },
        "ours_in_transformers": {"w4a16": {"root_mean_square": 0.02, "limit": 0.01}},
        "ours_in_vllm": {
            "bf16": {"not_supported_on_this_cpu": None, "refused": "Error: no"},
            "w4a16": {"not_supported_on_this_cpu": "it has no product", "refused": "Error: no"},
        },
    }
    claims = {claim.name: claim.document()["is_met"] for claim in interop_claims(report)}
    assert [name for name, is_met in claims.items() if not is_met] == [
        "theirs_in_our_engine.gptq.engine_agrees",
        "ours_in_transformers.w4a16.root_mean_square",
        "ours_in_vllm.bf16.loads",
    ]
    assert claims["theirs_in_our_engine.awq.engine_agrees"]
    assert not any(name.startswith("ours_in_vllm.w4a16") for name in claims)
