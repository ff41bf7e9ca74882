"""llmcompressor's one-shot methods on one dense model, in its own process.

Takes a dense Hugging Face directory, token ids [N, T] as an .npy file and a method with its
settings; writes a compressed-tensors directory and prints one JSON line, the last: the seconds of
calibration and method without loading and saving, those of the whole, and versions. Weights are
float32 while it works, as in this project's own methods, and bfloat16 on disk.
"""

import argparse
import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

# Pruning asks for names with a dot at their end; without the pattern it zeroes a tied embedding.
_PRUNED = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
_PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def main(argv: list[str] | None = None) -> int:
    """Compress one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--method", choices=sorted(_MODIFIERS), required=True)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON; see _MODIFIERS")
    parser.add_argument("--batch", type=int, default=16, help="sequences that go through at once")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if not torch.accelerator.is_available():
        # Its AWQ pins the texts' states in memory for a GPU, and torch refuses without one.
        IntermediatesCache.pin_memory = lambda *_: None
    print(json.dumps(_compress(arguments)), flush=True)
    return 0


def _compress(arguments: argparse.Namespace) -> dict[str, Any]:
    start_s = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokens_NT = torch.from_numpy(np.load(arguments.tokens).astype(np.int64))
    batches = [{"input_ids": rows_BT} for rows_BT in tokens_NT.split(arguments.batch)]
    recipe = _MODIFIERS[arguments.method](**arguments.settings)
    begin_s = time.perf_counter()
    oneshot(
        model=model,
        processor=PreTrainedTokenizerFast(tokenizer_file=str(arguments.model / "tokenizer.json")),
        recipe=recipe,
        dataset=torch.utils.data.DataLoader(batches, batch_size=None),
        num_calibration_samples=len(tokens_NT),
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    end_s = time.perf_counter()
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    return {
        "seconds": end_s - begin_s,
        "total_seconds": time.perf_counter() - start_s,
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }


def _scheme(observer: str, group_size: int) -> dict[str, QuantizationScheme]:
    weights = QuantizationArgs(
        num_bits=4, strategy="group", group_size=group_size, symmetric=True, observer=observer
    )
    return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}


def _gptq(observer: str, group_size: int, actorder: str | None, damping: float) -> Any:
    return GPTQModifier(
        config_groups=_scheme(observer, group_size),
        ignore=["lm_head"],
        block_size=128,
        dampening_frac=damping,
        actorder=actorder,
    )


def _awq(observer: str, group_size: int) -> Any:
    rounding = QuantizationModifier(config_groups=_scheme(observer, group_size), ignore=["lm_head"])
    return [AWQModifier(), rounding]


def _rtn(observer: str, group_size: int) -> Any:
    return QuantizationModifier(config_groups=_scheme(observer, group_size), ignore=["lm_head"])


def _wanda(sparsity: float) -> Any:
    return WandaPruningModifier(sparsity=sparsity, **_PRUNED)


def _sparsegpt(sparsity: float, damping: float) -> Any:
    return SparseGPTModifier(sparsity=sparsity, block_size=128, dampening_frac=damping, **_PRUNED)


_MODIFIERS = {
    "awq": _awq,
    "gptq": _gptq,
    "rtn": _rtn,
    "sparsegpt": _sparsegpt,
    "wanda": _wanda,
}

if __name__ == "__main__":
    raise SystemExit(main())
