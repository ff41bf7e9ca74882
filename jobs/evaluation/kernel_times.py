"""How long a request takes on a model of mixed formats, from a table by shape of layer and format.

Takes a dense model's directory, formats and a workload; measures once, with the kernels that serve,
and gives a table that predicts any mixture. It does not know which mixtures are asked for.

For every format the table has the time of a uniform model's whole request, and how that time is
shared among the products that a block is made of, measured one by one. What no product explains
(attention, norms, head) is the same in every mixture.
"""

import hashlib
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cluster.config import StrictModel
from cluster.errors import StorageError
from cluster.storage import write_json
from jobs.compression.packing import LoadedModel, load_model, save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import DecoderConfig, KvCache, Recipe, Step, Workload
from jobs.evaluation.latency import request_times
from jobs.kernels import choices
from jobs.kernels.build import cache_folder
from jobs.kernels.formats import Layout, QuantizedWeight, round_to_scale, value_range
from jobs.kernels.linear import build_linear
from jobs.models import decoder as decoder_family

# What a block multiplies by, and which of its layers kernels fuse for that.
PRODUCTS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_logger = logging.getLogger(__name__)
_COPIES_BYTES = 256 * 2**20  # Enough that weights come from where they come from in a model.
_TIMING_S = 0.15
_REPEATS = 10  # As many forwards as backwards.
_MOST_REST = 0.8  # Share of the fastest format's request that no product explains, at most.


class KernelTimes(StrictModel):
    """Milliseconds of a request: in each product of one block, by format, and in everything else.

    Formats are spelled `scheme/group_size`, products as in PRODUCTS.
    """

    workload: Workload
    num_threads: int
    product_ms: dict[str, dict[str, float]]
    rest_ms: float
    base_ms: float
    """Of the unchanged model, with its own cache of keys and values."""
    uniform_ms: dict[str, float]
    seconds: float
    """What measuring took, also where it is remembered."""


def spell(layout: Layout) -> str:
    """Return a format's name in the table."""
    return f"{layout.scheme}/{layout.group_size}"


def kernel_times(
    model: Path,
    shape: DecoderConfig,
    layouts: Sequence[Layout],
    workload: Workload,
    kv_cache: KvCache = "auto",
) -> KernelTimes:
    """Return the table of a dense model's shape on this machine, measured now or remembered.

    It is remembered for the same machine, kernels, number of threads and weights' shapes in the
    user's cache folder. Takes seconds a format; raises what loading raises.
    """
    wanted = sorted({Layout("bf16"), *layouts}, key=spell)
    path = _path(shape, wanted, workload, kv_cache)
    if (found := _read(path)) is not None:
        return found
    measured = _measure(model, shape, wanted, workload, kv_cache)
    try:
        write_json(path, measured.model_dump(mode="json"))
    except StorageError as error:
        _logger.warning("kernels will be timed again by the next search: %s", error)
    return measured


def _measure(
    model: Path,
    shape: DecoderConfig,
    layouts: Sequence[Layout],
    workload: Workload,
    kv_cache: KvCache,
) -> KernelTimes:
    began = time.perf_counter()
    alone = {layout: _products_ms(shape, layout, workload) for layout in layouts}
    base_ms, uniform = _uniform_ms(model, layouts, workload, kv_cache)
    blocks = shape.num_layers
    unexplained = [uniform[each] - blocks * sum(alone[each].values()) for each in layouts]
    rest_ms = min(max(0.0, statistics.median(unexplained)), _MOST_REST * min(uniform.values()))
    product_ms = {}
    for layout in layouts:
        # The whole is measured in place; products alone say how it is shared.
        explained = (uniform[layout] - rest_ms) / blocks
        factor = explained / sum(alone[layout].values())
        product_ms[spell(layout)] = {name: factor * ms for name, ms in alone[layout].items()}
    return KernelTimes(
        workload=workload,
        num_threads=torch.get_num_threads(),
        product_ms=product_ms,
        rest_ms=rest_ms,
        base_ms=base_ms,
        uniform_ms={spell(layout): ms for layout, ms in uniform.items()},
        seconds=time.perf_counter() - began,
    )


def _uniform_ms(
    model: Path, layouts: Sequence[Layout], workload: Workload, kv_cache: KvCache
) -> tuple[float, dict[Layout, float]]:
    """Return the median time of a request of the dense model, and of uniform ones beside it.

    Uniform ones have the cache of `kv_cache`. Times are scaled to the dense model's median over all
    turns, so that a slow spell, which meets both, does not count.
    """
    dense, ratios, dense_ms = load_model(model, verify=False), {}, []
    for layout in layouts:
        other = dense if layout.scheme == "bf16" else _uniform(model, layout)
        base, found = request_times(
            [dense.model, other.model],
            prompt_tokens=workload.prompt_tokens,
            output_tokens=workload.output_tokens,
            repeats=_REPEATS,
            kv_caches=["auto", kv_cache],
        )
        ratios[layout] = statistics.median(f / b for f, b in zip(found, base, strict=True))
        dense_ms += base
    if kv_cache == "auto":
        ratios[Layout("bf16")] = 1.0
    base_ms = statistics.median(dense_ms)
    return base_ms, {layout: ratio * base_ms for layout, ratio in ratios.items()}


def _uniform(model: Path, layout: Layout) -> LoadedModel:
    """Return the model with all layers of its blocks rounded to one format."""
    options: dict[str, object] = {"scheme": layout.scheme, "observer": "minmax"}
    if layout.group_size is not None:
        options["group_size"] = layout.group_size
    recipe = Recipe(steps=(Step(method="rtn", options=options),))
    with tempfile.TemporaryDirectory(prefix="raysmith-times-") as folder:
        packed = Path(folder) / "model"
        save_compressed(apply_recipe(decoder_family.load(model), recipe), packed)
        return load_model(packed, verify=False)


def _products_ms(shape: DecoderConfig, layout: Layout, workload: Workload) -> dict[str, float]:
    """Return what each product of one block takes of a request, measured by itself."""
    head, hidden = shape.resolved_head_dim, shape.hidden_size
    widths = shape.mlp_sizes
    # Of blocks of different width the mean, in whole groups.
    width = widths[0] if len(set(widths)) == 1 else -(-sum(widths) // (128 * len(widths))) * 128
    sizes = {
        "qkv": ((shape.num_heads + 2 * shape.num_kv_heads) * head, hidden),
        "o": (hidden, shape.num_heads * head),
        "gate_up": (2 * width, hidden),
        "down": (hidden, width),
    }
    return {
        name: _product_ms(layout, out_features, in_features, workload)
        for name, (out_features, in_features) in sizes.items()
    }


def _product_ms(layout: Layout, out_features: int, in_features: int, workload: Workload) -> float:
    num_copies = max(2, min(32, _COPIES_BYTES // layout.stored_bytes(out_features, in_features)))
    weight = _random_weight(layout, out_features, in_features)
    copies = [build_linear(weight, None, dtype=torch.float32) for _ in range(num_copies)]
    total_ms = 0.0
    with torch.inference_mode():
        for rows, times in ((workload.prompt_tokens, 1), (1, workload.output_tokens - 1)):
            x_NI = torch.randn(rows, in_features)
            total_ms += times * _median_ms([lambda c=c, x=x_NI: c(x) for c in copies])  # type: ignore[misc]
    return total_ms


def _median_ms(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Return the median time of one of these calls, made in turn for a while."""
    times_s: list[float] = []
    for call in calls:
        call()
    deadline_s = time.perf_counter() + _TIMING_S
    while time.perf_counter() < deadline_s or len(times_s) < 2 * len(calls):
        for call in calls:
            began = time.perf_counter()
            call()
            times_s.append(time.perf_counter() - began)
    return statistics.median(times_s) * 1e3


def _random_weight(layout: Layout, rows: int, columns: int) -> Tensor | QuantizedWeight:
    weight_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    if layout.scheme == "bf16":
        return weight_OI.to(torch.bfloat16)
    weight_OGS = weight_OI.unflatten(1, (layout.num_groups(columns), -1))
    scale_OG = weight_OGS.abs().amax(dim=-1) / value_range(layout.scheme)[1]
    return round_to_scale(weight_OI, scale_OG, layout)


def _path(
    shape: DecoderConfig, layouts: Sequence[Layout], workload: Workload, kv_cache: KvCache
) -> Path:
    document = [
        *choices.environment(torch.device("cpu")),
        torch.get_num_threads(),
        shape.model_dump(mode="json"),
        [spell(layout) for layout in layouts],
        workload.model_dump(mode="json"),
        kv_cache,
        hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    ]
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "latency" / f"{digest}.json"


def _read(path: Path) -> KernelTimes | None:
    """Return a table that was remembered; a damaged one is measured again."""
    try:
        return KernelTimes.model_validate_json(path.read_text())
    except (OSError, ValueError):
        return None
