from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.demand import LayerShape, TrainingDemand
from cluster.errors import ConfigError, PlacementError
from cluster.hardware import load_catalogue
from cluster.inventory import Inventory, Node
from cluster.memory import training_memory
from cluster.planner import TrainingPlan, plan_training, training_flops
from cluster.storage import GIB
from cluster.units import format_bytes, format_hours, format_usd

CATALOGUE = load_catalogue()
DEMAND = TrainingDemand(
    name="tiny",
    parameters=5_770_496,
    matmul_parameters=5_767_168,
    layer=LayerShape(hidden=256, query=256, key=128, intermediate=768, num_heads=4),
    num_layers=6,
    vocab_size=4096,
    seq_len=256,
    attention_span=256,
    micro_batch_size=8,
    tokens_per_step=4096,
    steps=400,
    precision="bf16",
    num_workers=2,
    cpus_per_worker=1,
)
ON_ONE_GPU = DEMAND.replace(num_workers=1, gpus_per_worker=1)
EIGHT_BILLION = DEMAND.replace(
    parameters=8_030_261_248,
    matmul_parameters=7_504_658_432,
    layer={"hidden": 4096, "query": 4096, "key": 1024, "intermediate": 14336, "num_heads": 32},
    num_layers=32,
    vocab_size=128_256,
    num_workers=1,
)


def machines(*cpus: float, **values: Any) -> Inventory:
    defaults: dict[str, Any] = {"cpu": "cpu-avx512-bf16", "memory_bytes": 8 * GIB, **values}
    return Inventory(
        nodes=tuple(Node(id=f"n{i}", cpus=count, **defaults) for i, count in enumerate(cpus))
    )


def plan(demand: TrainingDemand = DEMAND, inventory: Inventory | None = None) -> TrainingPlan:
    return plan_training(demand, inventory or machines(2), CATALOGUE)


def item(plan: TrainingPlan, what: str) -> int:
    return next(entry.bytes for entry in plan.memory if entry.what == what)


def test_plan_itemises_weights_gradients_and_moments_in_float32() -> None:
    result = plan()
    assert item(result, "weights") == item(result, "gradients") == 4 * DEMAND.parameters
    assert item(result, "optimizer") == 8 * DEMAND.parameters
    assert result.memory_bytes == sum(entry.bytes for entry in result.memory)


@pytest.mark.parametrize(
    ("precision", "size", "layers", "tokens", "measured_mib"),
    [("bf16", 256, 6, 256, 680), ("fp32", 256, 6, 256, 687), ("bf16", 512, 8, 512, 2767),
     ("fp32", 512, 8, 512, 2758)],
)  # fmt: skip
def test_memory_is_within_a_quarter_of_measured_runs(
    precision: str, size: int, layers: int, tokens: int, measured_mib: int
) -> None:
    """Measured: growth of peak resident size over imports, 8 sequences, 4096 words, torch 2.13."""
    block = size * (3 * size + 9 * size)
    heads = 4096 * size
    demand = DEMAND.replace(
        precision=precision,
        parameters=heads + layers * block,
        matmul_parameters=heads + layers * block,
        layer={"hidden": size, "query": size, "key": size // 2, "intermediate": 3 * size,
               "num_heads": size // 64},
        num_layers=layers,
        seq_len=tokens,
        attention_span=tokens,
    )  # fmt: skip
    items = training_memory(demand, on_gpu=False)
    planned_mib = sum(entry.bytes for entry in items if entry.what != "runtime") / 2**20
    assert planned_mib == pytest.approx(measured_mib, rel=0.25)


def test_plan_when_model_is_too_large_is_refused_with_the_numbers() -> None:
    with pytest.raises(PlacementError) as caught:
        plan(EIGHT_BILLION)
    for part in ("8,030,261,248 parameters", "weights 29.9 GiB", "optimizer 59.8 GiB", "7.2 GiB"):
        assert part in caught.value.message


def test_plan_when_more_workers_than_cores_is_refused_with_the_numbers() -> None:
    with pytest.raises(PlacementError, match=r"asks for 3 workers of 1 CPUs.*\(2 CPUs.*room for 2"):
        plan(DEMAND.replace(num_workers=3))


def test_plan_when_cluster_is_empty_is_refused() -> None:
    with pytest.raises(PlacementError, match=r"0 node\(s\) \(none\), room for 0"):
        plan_training(DEMAND, Inventory(), CATALOGUE)


def test_plan_when_a_worker_needs_more_cores_than_any_node_is_refused() -> None:
    with pytest.raises(PlacementError, match="room for 0"):
        plan(DEMAND.replace(cpus_per_worker=3), machines(2, 2, 2))


def test_plan_fills_the_largest_node_first() -> None:
    assert plan(DEMAND.replace(num_workers=5), machines(2, 4)).placement == {"n1": 4, "n0": 1}


def test_plan_shares_a_nodes_memory_among_its_workers() -> None:
    alone, both = plan(DEMAND.replace(num_workers=1)), plan()
    assert both.capacity_bytes == pytest.approx(alone.capacity_bytes / 2, abs=1)


def test_plan_on_gpus_counts_device_memory_and_price() -> None:
    inventory = machines(32, gpus=8, accelerator="H100", memory_bytes=1000 * GIB)
    result = plan(DEMAND.replace(num_workers=8, gpus_per_worker=1), inventory)
    assert (result.device, result.capacity_bytes) == ("H100", 72_000_000_000)
    assert result.peak_flops_per_s == pytest.approx(8 * 989e12)
    assert result.usd is not None
    assert result.usd.typical == pytest.approx(result.hours.typical * 8 * 3.49)


def test_plan_when_workers_share_a_gpu_gives_each_its_share() -> None:
    inventory = machines(8, gpus=1, accelerator="H100")
    shared = plan(DEMAND.replace(gpus_per_worker=0.5), inventory)
    whole = plan(ON_ONE_GPU, inventory)
    assert shared.capacity_bytes == whole.capacity_bytes // 2


def test_plan_when_no_spot_price_is_known_says_what_is_assumed() -> None:
    result = plan(ON_ONE_GPU, machines(8, gpus=1, accelerator="A100-40G", is_spot=True))
    assert any("no spot price of A100-40G" in warning for warning in result.warnings)


def test_plan_on_spot_nodes_uses_the_spot_price() -> None:
    inventory = machines(8, gpus=1, accelerator="H100", is_spot=True)
    result = plan(ON_ONE_GPU, inventory)
    assert result.is_spot
    assert result.usd is not None
    assert result.usd.typical == pytest.approx(result.hours.typical * 0.8015)


def test_plan_when_device_lacks_the_precision_is_refused() -> None:
    inventory = machines(8, gpus=1, accelerator="T4")
    with pytest.raises(PlacementError, match="T4 does not compute in bf16"):
        plan(ON_ONE_GPU, inventory)


@pytest.mark.parametrize(
    ("accelerator", "precision"), [("T4", "fp32"), ("A100", "bf16"), ("H100", "bf16")]
)
def test_plan_when_precision_is_auto_takes_what_the_device_is_faster_in(
    accelerator: str, precision: str
) -> None:
    demand = ON_ONE_GPU.replace(precision="auto")
    result = plan(demand, machines(8, gpus=1, accelerator=accelerator))
    assert result.demand.precision == precision


def test_plan_when_gpu_is_not_in_the_catalogue_names_it() -> None:
    with pytest.raises(ConfigError, match="no accelerator `V100`"):
        plan(
            ON_ONE_GPU,
            machines(8, gpus=1, accelerator="V100"),
        )


def test_plan_when_gpu_kind_is_not_told_is_refused() -> None:
    with pytest.raises(PlacementError, match="does not name"):
        plan(ON_ONE_GPU, machines(8, gpus=1))


def test_plan_when_cpu_is_unknown_assumes_one_and_warns() -> None:
    result = plan(inventory=machines(2, cpu=None))
    assert result.device == "cpu-avx2"
    assert any("cpu-avx2 is assumed" in warning for warning in result.warnings)


def test_plan_with_unlike_nodes_counts_the_slowest() -> None:
    fast = Node(id="fast", cpus=1, cpu="cpu-amx", memory_bytes=8 * GIB)
    slow = Node(id="slow", cpus=1, cpu="cpu-avx2", memory_bytes=8 * GIB)
    assert plan(inventory=Inventory(nodes=(fast, slow))).device == "cpu-avx2"


def test_plan_duration_has_an_ordered_band_and_shrinks_with_workers() -> None:
    one, two = plan(DEMAND.replace(num_workers=1)).hours, plan().hours
    assert one.low < one.typical < one.high
    assert two.typical < one.typical


def test_plan_when_compiled_takes_longer_to_start() -> None:
    assert plan(DEMAND.replace(compiled=True)).hours.low > plan().hours.low


def test_plan_when_memory_is_tight_warns() -> None:
    needed = plan().memory_bytes
    tight = plan(inventory=machines(2, memory_bytes=int(2 * needed / 0.9 * 1.05)))
    assert any("within 15%" in warning for warning in tight.warnings)


def test_table_shows_every_item_and_the_cost() -> None:
    rows = dict(plan().table())
    assert {"memory: weights", "memory: activations", "memory: per worker"} <= rows.keys()
    assert rows["workers"] == "2 on 1 node(s), 1 x cpu-avx512-bf16 each"
    assert rows["cost"].startswith("$")


def test_flops_are_six_per_weight_and_token_plus_attention() -> None:
    tokens = DEMAND.steps * DEMAND.tokens_per_step
    attention = 12 * 6 * 256 * 128
    expected = (6 * DEMAND.matmul_parameters + attention) * tokens
    assert training_flops(DEMAND) == pytest.approx(expected)


def test_flops_when_window_is_narrow_count_less_attention() -> None:
    assert training_flops(DEMAND.replace(attention_span=32)) < training_flops(DEMAND)


@given(st.integers(1, 64), st.integers(1, 4096), st.sampled_from(["fp32", "bf16"]))
def test_memory_never_shrinks_with_the_batch(batch: int, seq_len: int, precision: str) -> None:
    small = DEMAND.replace(micro_batch_size=batch, seq_len=seq_len, precision=precision)
    large = small.replace(micro_batch_size=batch + 1)
    for on_gpu in (False, True):
        totals = [
            sum(entry.bytes for entry in training_memory(demand, on_gpu=on_gpu))
            for demand in (small, large)
        ]
        assert 0 < totals[0] < totals[1]


@given(st.lists(st.floats(0, 64), max_size=5), st.integers(1, 40), st.floats(0.5, 8))
def test_placement_gives_each_worker_its_cores_or_refuses(
    cpus: list[float], num_workers: int, each: float
) -> None:
    demand = DEMAND.replace(num_workers=num_workers, cpus_per_worker=each)
    inventory = machines(*cpus, memory_bytes=10_000 * GIB)
    try:
        placement = plan(demand, inventory).placement
    except PlacementError:
        assert sum(int(count / each + 1e-9) for count in cpus) < num_workers
        return
    assert sum(placement.values()) == num_workers
    offered = {node.id: node.cpus for node in inventory.nodes}
    assert all(offered[name] >= count * each - 1e-6 for name, count in placement.items())


def test_units_are_readable() -> None:
    assert [format_bytes(n) for n in (12, 2048, 3 * 2**20, 2**31)] == [
        "12 B", "2.0 KiB", "3.0 MiB", "2.0 GiB"
    ]  # fmt: skip
    assert [format_hours(h) for h in (0.001, 0.5, 3, 72)] == [
        "4 s",
        "30.0 min",
        "3.0 h",
        "3.0 days",
    ]
    assert [format_usd(usd) for usd in (0.00123, 1234.5)] == ["$0.0012", "$1,234.50"]
