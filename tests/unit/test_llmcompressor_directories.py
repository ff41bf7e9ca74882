"""Directories as llmcompressor 0.14 writes them: W4A16 in every field, and pruned dense ones.

The documents below are those of directories that it wrote; benchmarks/compression/parity.py reads
real ones.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import decoder_config

from cluster.errors import ModelFormatError
from jobs.compression.packing import load_model, save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import Recipe, Step
from jobs.models.decoder import Decoder, build

TOKENS = torch.arange(22).view(2, 11)


def weights(**changes: object) -> dict[str, Any]:
    written: dict[str, Any] = {
        "actorder": "static",
        "block_structure": None,
        "dynamic": False,
        "group_size": 32,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": "group",
        "symmetric": True,
        "type": "int",
        "zp_dtype": None,
    }
    return written | changes


def document(weights: dict[str, Any], **changes: object) -> dict[str, Any]:
    group = {
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    written: dict[str, Any] = {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }
    return written | changes


def write(directory: Path, quantization_config: dict[str, Any], *steps: Step) -> Decoder:
    """Write weights in the layout that both projects share, under a document of theirs."""
    model = build(decoder_config(), seed=0).to(torch.bfloat16).float()
    compressed = apply_recipe(model, Recipe(steps=steps))
    save_compressed(compressed, directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = quantization_config
    (directory / "config.json").write_text(json.dumps(config))
    return compressed.model


INT4 = Step(method="rtn", options={"scheme": "w4a16", "group_size": 32})


@pytest.mark.parametrize("actorder", [None, "static", "weight"])
@torch.no_grad()
def test_directory_when_w4a16_as_written_computes_what_its_weights_say(
    actorder: str | None, tmp_path: Path
) -> None:
    model = write(tmp_path, document(weights(actorder=actorder)), INT4)
    loaded = load_model(tmp_path, verify=False)
    assert loaded.schemes["model.layers.0.mlp.gate_proj"] == "w4a16"
    assert loaded.schemes["lm_head"] == "bf16"
    expected = model(TOKENS)
    assert (loaded.model(TOKENS) - expected).abs().max() <= 0.01 * expected.abs().max()


@torch.no_grad()
def test_directory_when_only_pruned_keeps_its_zeros(tmp_path: Path) -> None:
    sparse = {"format": "dense", "global_sparsity": 0.5, "sparsity_structure": "unstructured"}
    pruned = {"quant_method": "compressed-tensors", "sparsity_config": sparse}
    step = Step(method="magnitude", options={"sparsity": 0.5})
    model = write(tmp_path, pruned, step)
    loaded = load_model(tmp_path, verify=False)
    assert set(loaded.schemes.values()) == {"bf16"}
    assert torch.allclose(loaded.model(TOKENS), model(TOKENS), atol=1e-2)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (document(weights(symmetric=False)), "symmetric=False are not supported"),
        (document(weights(actorder="group")), "actorder='group' are not supported"),
        (document(weights(num_bits=5)), "5-bit int weights by group"),
        (document(weights(), transform_config={"config_groups": {"u": {}}}), "transform_config"),
        (
            document(weights(), sparsity_config={"format": "sparse-24-bitmask"}),
            "format `sparse-24-bitmask`.*Save the model with zeros",
        ),
    ],
)
def test_directory_when_of_a_format_without_kernels_is_refused_by_name(
    changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write(tmp_path, changed, INT4)
    with pytest.raises(ModelFormatError, match=words):
        load_model(tmp_path, verify=False)
