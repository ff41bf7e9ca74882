"""OpenVINO GenAI's continuous batching pipeline, driven in its own process.

`--weight-format` is what optimum-cli exported: int8 (per channel) or int4 (groups of 128).
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

from benchmarks.peers._wire import Arrival, Clock, Run, serve


def main(argv: list[str] | None = None) -> int:
    """Answer runs with one exported model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--cache-gb", type=int, default=2)
    return serve(lambda: _load(parser.parse_args(argv)))


def _load(arguments: argparse.Namespace) -> tuple[Run, dict[str, Any]]:
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = arguments.max_batch
    scheduler.max_num_batched_tokens = arguments.batch_tokens
    scheduler.cache_size = arguments.cache_gb
    scheduler.enable_prefix_caching = False
    scheduler.dynamic_split_fuse = True
    pipeline = genai.ContinuousBatchingPipeline(str(arguments.model), scheduler, "CPU")

    def run(arrivals: list[Arrival], clock: Clock) -> None:
        waiting, open_handles = list(enumerate(arrivals)), {}
        while waiting or open_handles:
            while waiting and waiting[0][1].at_s <= clock.now_s():
                number, arrival = waiting.pop(0)
                ids = openvino.Tensor(np.array([arrival.prompt], dtype=np.int64))
                handle = pipeline.add_request(number, ids, _greedy(arrival.max_tokens))
                open_handles[number] = (arrival, handle)
            if not open_handles:
                clock.wait_until(waiting[0][1].at_s)
                continue
            pipeline.step()
            for number, (arrival, handle) in list(open_handles.items()):
                _collect(arrival, handle, clock)
                if arrival.is_done:
                    del open_handles[number]

    return run, {"version": genai.get_version()}


def _greedy(max_tokens: int) -> Any:
    config = genai.GenerationConfig()
    config.max_new_tokens = max_tokens
    config.do_sample = False
    config.ignore_eos = True
    return config


def _collect(arrival: Arrival, handle: Any, clock: Clock) -> None:
    while handle.can_read():
        for output in handle.read().values():
            arrival.tokens.extend(output.generated_ids)
            arrival.times_s.extend([clock.now_s()] * len(output.generated_ids))


if __name__ == "__main__":
    raise SystemExit(main())
