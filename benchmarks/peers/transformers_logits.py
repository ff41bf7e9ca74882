"""Logits of transformers on model directories, dense or compressed-tensors, in its own process.

Takes token ids [N, T] as an .npy file and pairs of a directory and an .npy file to write; each file
gets float32 logits [N, T, V]. Weights and activations are float32.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main(argv: list[str] | None = None) -> int:
    """Write the logits of some models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("pairs", type=Path, nargs="+", help="directory, file, directory, file...")
    arguments = parser.parse_args(argv)
    tokens_NT = torch.from_numpy(np.load(arguments.tokens).astype(np.int64))
    for directory, output in zip(arguments.pairs[::2], arguments.pairs[1::2], strict=True):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.inference_mode():
            np.save(output, model(tokens_NT).logits.numpy())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
