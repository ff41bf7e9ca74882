"""The native engine alone, in one process: what the gateway's overhead is measured against."""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from benchmarks.peers._wire import Arrival, Clock, Run, serve


def main(argv: list[str] | None = None) -> int:
    """Answer runs with one published model directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--options", default="{}", help="engine options, as JSON")
    return serve(lambda: _load(parser.parse_args(argv)))


def _load(arguments: argparse.Namespace) -> tuple[Run, dict[str, Any]]:
    from serving.engines._protocol import GenerateRequest
    from serving.engines.native import create

    engine = create(arguments.model, json.loads(arguments.options))

    async def answer(arrival: Arrival, clock: Clock) -> None:
        await asyncio.sleep(max(0.0, arrival.at_s - clock.now_s()))
        request = GenerateRequest(
            prompt_tokens=tuple(arrival.prompt),
            max_tokens=arrival.max_tokens,
            temperature=0.0,
            ignore_eos=True,
        )
        async for chunk in engine.generate(request):
            arrival.tokens.extend(chunk.token_ids)
            arrival.times_s.extend([clock.now_s()] * len(chunk.token_ids))

    async def answer_all(arrivals: list[Arrival], clock: Clock) -> None:
        await asyncio.gather(*(answer(arrival, clock) for arrival in arrivals))

    def run(arrivals: list[Arrival], clock: Clock) -> None:
        asyncio.run(answer_all(arrivals, clock))

    info = engine.info()
    operators = sorted(set(info.operators.values()))
    return run, {"operators": operators, "weight_bytes": info.weight_bytes}


if __name__ == "__main__":
    raise SystemExit(main())
