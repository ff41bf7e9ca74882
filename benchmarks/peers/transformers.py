"""transformers' `generate` on batches of what is waiting, in its own process."""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.peers._wire import Arrival, Clock, Run, serve


def main(argv: list[str] | None = None) -> int:
    """Answer runs with one dense model directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    return serve(lambda: _load(parser.parse_args(argv)))


def _load(arguments: argparse.Namespace) -> tuple[Run, dict[str, Any]]:
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None

    def run(arrivals: list[Arrival], clock: Clock) -> None:
        waiting = list(arrivals)
        while waiting:
            clock.wait_until(waiting[0].at_s)
            due = [a for a in waiting if a.at_s <= clock.now_s()][: arguments.max_batch]
            waiting = [a for a in waiting if a not in due]
            _generate(model, due, clock)

    return run, {"version": transformers.__version__}


class _Watch(StoppingCriteria):
    """Notes the time of every step; never stops."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        del scores, kwargs
        self.times_s.append(self._clock.now_s())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@torch.inference_mode()
def _generate(model: Any, arrivals: list[Arrival], clock: Clock) -> None:
    """Generate for all in one batch, padded on the left, as long as the longest needs."""
    width = max(len(a.prompt) for a in arrivals)
    tokens_BT = torch.zeros(len(arrivals), width, dtype=torch.long)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, arrival in enumerate(arrivals):
        tokens_BT[row, width - len(arrival.prompt) :] = torch.tensor(arrival.prompt)
        mask_BT[row, width - len(arrival.prompt) :] = 1
    watch = _Watch(clock)
    generated_BT = model.generate(
        tokens_BT,
        attention_mask=mask_BT,
        max_new_tokens=max(a.max_tokens for a in arrivals),
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([watch]),
    )
    for arrival, row in zip(arrivals, generated_BT[:, width:].tolist(), strict=True):
        arrival.tokens = row[: arrival.max_tokens]
        arrival.times_s = watch.times_s[: arrival.max_tokens]


if __name__ == "__main__":
    raise SystemExit(main())
