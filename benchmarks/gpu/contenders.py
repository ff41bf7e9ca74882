"""Who generates: this project's engine, and transformers' continuous batching, in one process.

Takes a model and prompts; gives when each token of each answer came. It does not know about floors
or reports.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.gpu.models import Place
from cluster.errors import EngineError
from jobs.compression.packing import LoadedModel
from serving.engines._protocol import GenerateRequest
from serving.engines.native.config import EngineConfig
from serving.engines.native.loading import start

_PASS_TOKENS = 8192
_PAGE_TOKENS = 256

Prompts = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Run:
    """One run of all prompts: how long it took, and when tokens came by answer."""

    seconds: float
    times_s: list[list[float]]

    @property
    def tokens_per_s(self) -> float:
        """Answer tokens per second of the whole run, prompts included."""
        return sum(map(len, self.times_s)) / self.seconds

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Answer tokens per second while all answers grew and no prompt was left; None if never."""
        begin_s = max(times[0] for times in self.times_s)
        end_s = min(times[-1] for times in self.times_s)
        if end_s <= begin_s:
            return None
        num_tokens = sum(begin_s < at <= end_s for times in self.times_s for at in times)
        return num_tokens / (end_s - begin_s)


class Ours:
    """The native engine over a model in memory."""

    def __init__(self, loaded: LoadedModel, place: Place, batch: int, max_len: int) -> None:
        dtype = str(place.dtype).removeprefix("torch.")
        config = EngineConfig.model_validate(
            {
                "max_slots": batch,
                "max_len": max_len,
                "max_batch_tokens": max(_PASS_TOKENS, batch),
                "max_shared_tokens": None,
                "enable_prefix_cache": False,
                "dtype": dtype,
                "device": place.device.type,
            }
        )
        self._engine = start(loaded, config)

    def describe(self) -> str:
        """Return how decode passes start."""
        return self._engine.info().decoding

    def run(self, prompts: Prompts, max_tokens: int) -> Run:
        """Answer all prompts at once, greedily, with exactly `max_tokens` tokens each."""

        async def answer(prompt: tuple[int, ...]) -> list[float]:
            request = GenerateRequest(
                prompt_tokens=prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True
            )
            times_s: list[float] = []
            async for chunk in self._engine.generate(request):
                times_s.extend([time.perf_counter()] * len(chunk.token_ids))
            return times_s

        async def answer_all() -> list[list[float]]:
            return await asyncio.gather(*map(answer, prompts))

        start_s = time.perf_counter()
        times_s = asyncio.run(answer_all())
        return _checked(Run(time.perf_counter() - start_s, times_s), max_tokens)

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()


class Theirs:
    """`generate_batch` of a transformers model, its manager kept from run to run."""

    def __init__(
        self, model: Any, place: Place, batch: int, max_len: int, *, may_use_flash: bool = True
    ) -> None:
        """Take a model; without `may_use_flash` it keeps to PyTorch's attention.

        Flash attention is a package of its own, or is fetched from the hub, which may not be there.
        """
        self._model = model
        options: dict[str, Any] = {} if may_use_flash else {"auto_switch_to_flash": False}
        # On a GPU it finds the best sizes itself; on a CPU it would ask for most of the memory.
        if place.device.type == "cpu":
            pages = batch * -(-max_len // _PAGE_TOKENS) + 1
            options |= {"num_blocks": pages, "max_batch_tokens": _PASS_TOKENS}
        self._config = ContinuousBatchingConfig(**options)

    def describe(self) -> str:
        """Return which attention it chose."""
        return f"attention: {self._model.config._attn_implementation}"

    def run(self, prompts: Prompts, max_tokens: int) -> Run:
        """Answer all prompts at once, greedily, with exactly `max_tokens` tokens each."""
        options = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1)
        start_s = time.perf_counter()
        found = self._model.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=options,
            continuous_batching_config=self._config,
            record_timestamps=True,
            persistent_manager=True,
        )
        seconds = time.perf_counter() - start_s
        errors = [result.error for result in found.values() if result.error is not None]
        if errors or len(found) != len(prompts):
            raise EngineError(f"transformers answered {len(found)} prompts; {errors[:1]}")
        times_s = [list(result.timestamps or []) for result in found.values()]
        return _checked(Run(seconds, times_s), max_tokens)

    def close(self) -> None:
        """Give the manager's memory back."""
        self._model.destroy_cached_continuous_batching_manager()


def _checked(run: Run, max_tokens: int) -> Run:
    lengths = {len(times) for times in run.times_s}
    if lengths != {max_tokens}:
        raise EngineError(f"answers have {sorted(lengths)} tokens, and {max_tokens} were asked for")
    return run


def release() -> None:
    """Give memory that no model holds any more back to the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
