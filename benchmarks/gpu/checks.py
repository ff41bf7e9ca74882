"""What must hold before anything is timed: finite results, and replays equal to plain passes.

Takes a model; gives how far its two ways of decoding are apart. It does not time anything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.models import Place
from cluster.errors import EngineError
from jobs.compression.packing import LoadedModel
from jobs.kernels.block_cache import BlockCache
from serving.engines.native.graphs import CudaRecorder, DecodeGraphs, GraphLimits, Recorder
from serving.engines.native.runner import Chunked, read

# Root mean square of differences over that of values. A graph starts the same kernels; the other
# way of attention rounds differently, which rounding of activations to FP8 amplifies.
SAME, ROUNDED = 0.01, 0.15
_BLOCK_SIZE = 16
_NUM_SEQUENCES, _NUM_BLOCKS = 5, 4
_PROMPT_TOKENS, _STEPS = 20, 16


class Again:
    """A recorder that records nothing: what it gives calls the function."""

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return the function."""
        return function


@dataclass
class _Held:
    blocks: list[int]


@torch.inference_mode()
def check(loaded: LoadedModel, place: Place) -> dict[str, Any]:
    """Decode a few tokens in three ways; raise EngineError where they disagree.

    Replayed, with the same operators one by one, and with the attention of passes that hold prompts
    too, which is equal to rounding.
    """
    is_cuda = place.device.type == "cuda"
    replayed_TC, failure = _decode(
        loaded, place, CudaRecorder(place.device) if is_cuda else Again()
    )
    again_TC, _ = _decode(loaded, place, Again())
    plain_TC, _ = _decode(loaded, place, None)
    logits_TV = loaded.model.head(replayed_TC)
    if failure is not None:
        raise EngineError(f"a decode pass cannot be recorded: {failure}")
    if not bool(torch.isfinite(logits_TV).all()):
        raise EngineError("the model computes values that are not finite.")
    differences = {
        "to_same_operators": (_difference(replayed_TC, again_TC), SAME),
        "to_plain_pass": (_difference(replayed_TC, plain_TC), ROUNDED),
    }
    for what, (found, limit) in differences.items():
        if not found <= limit:
            raise EngineError(f"a decode pass differs by {found:.3f} {what}; {limit} is allowed.")
    return {
        "recorded_by": "CUDA graphs" if is_cuda else "nothing",
        "is_equal_to_the_bit": torch.equal(replayed_TC, again_TC),
        **{f"difference_{what}": found for what, (found, _) in differences.items()},
    }


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _decode(
    loaded: LoadedModel, place: Place, recorder: Recorder | None
) -> tuple[Tensor, str | None]:
    """Return h_TC of all decoded tokens, and why a pass could not be recorded."""
    num_blocks = _NUM_SEQUENCES * _NUM_BLOCKS
    cache = BlockCache(
        loaded.config, num_blocks, _BLOCK_SIZE, place.dtype, place.device, use_kernels=False
    )
    model = loaded.model
    limits = GraphLimits(_NUM_SEQUENCES, _NUM_BLOCKS)
    graphs = None
    if recorder is not None:
        graphs = DecodeGraphs(model, cache, limits, place.device, recorder)
    sequences: list[Any] = [
        _Held(list(range(first, first + _NUM_BLOCKS)))
        for first in range(0, num_blocks, _NUM_BLOCKS)
    ]
    generator = torch.Generator().manual_seed(0)
    shape = (_NUM_SEQUENCES, _PROMPT_TOKENS + _STEPS)
    tokens = torch.randint(0, loaded.config.vocab_size, shape, generator=generator).tolist()
    rows = list(zip(sequences, tokens, strict=True))
    read(model, cache, [Chunked(s, 0, row[:_PROMPT_TOKENS]) for s, row in rows], place.device)
    found = []
    for at in range(_PROMPT_TOKENS, _PROMPT_TOKENS + _STEPS):
        parts = [Chunked(s, at, row[at : at + 1]) for s, row in rows]
        hidden_TC = None if graphs is None else graphs.run(parts)
        if hidden_TC is None:
            hidden_TC = read(model, cache, parts, place.device)
        found.append(hidden_TC.clone())
    return torch.cat(found), None if graphs is None else graphs.failure
