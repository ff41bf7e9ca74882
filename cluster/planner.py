"""Decide before anything is started: does a training run fit, how long does it take, at what cost.

Takes a TrainingDemand, an Inventory and the Catalogue, as values; gives a TrainingPlan or raises
PlacementError with the numbers. It does not start, measure or ask anything.

Every quantity that is not exact carries a band: low and high are what runs of this kind reach, not
a confidence interval.
"""

import math
from collections.abc import Mapping, Sequence

from pydantic import Field

from cluster.config import StrictModel
from cluster.demand import TrainingDemand
from cluster.errors import PlacementError
from cluster.hardware import Accelerator, Catalogue, peak_flops, training_precision
from cluster.inventory import Inventory, Node
from cluster.memory import MemoryItem, training_memory
from cluster.units import Band, format_band, format_bytes, format_hours, format_usd

# Share of the peak that forward, backward and optimizer step together reach: lowest, typical and
# highest of dense decoders. CPU: one core with AVX-512 BF16, torch 2.13, eager, 8 sequences a pass;
# 0.44 (bf16) and 0.38 (fp32) at 6 million parameters, 0.72 and 0.46 at 27 million; less where
# workers share caches. GPU: torchtitan publishes 33% to 39% for Llama-3.1-8B
# on 8 H100; the rest of the GPU and TPU bands are estimates around it.
_SHARE_OF_PEAK: Mapping[str, tuple[float, float, float]] = {
    "cpu": (0.20, 0.40, 0.70),
    "gpu": (0.15, 0.38, 0.55),
    "tpu": (0.20, 0.45, 0.60),
}
# Process start, imports, data check and, with compile, compilation of one block.
_START_S: tuple[float, float, float] = (5.0, 12.0, 40.0)
_COMPILE_S: tuple[float, float, float] = (5.0, 25.0, 90.0)
# The rest of a node's memory is the system's and Ray's.
_USABLE_SHARE = 0.9
_UNKNOWN_CPU = "cpu-avx2"


class TrainingPlan(StrictModel):
    """Where a run goes, what it needs there, how long it takes and what that costs."""

    demand: TrainingDemand = Field(description="What was asked for.")
    placement: dict[str, int] = Field(description="Workers by node id.")
    device: str = Field(description="What a worker computes on, in the catalogue.")
    devices_per_worker: float = Field(description="Cores or GPUs of a worker.")
    memory: tuple[MemoryItem, ...] = Field(description="Bytes of one worker, by what they hold.")
    capacity_bytes: int = Field(description="Memory that one worker has.")
    flops: float = Field(description="Operations of the whole run.")
    peak_flops_per_s: float = Field(description="Of all workers together, at this precision.")
    hours: Band = Field(description="Duration.")
    usd: Band | None = Field(description="Cost at list prices; none where no price is known.")
    is_spot: bool = Field(description="Whether all nodes may be taken away at any time.")
    warnings: tuple[str, ...] = Field((), description="What was assumed or is tight.")

    @property
    def memory_bytes(self) -> int:
        """Bytes that one worker needs at its peak."""
        return sum(item.bytes for item in self.memory)

    def table(self) -> list[tuple[str, str]]:
        """Return rows of what and how much, for printing."""
        demand = self.demand
        places = f"{demand.num_workers} on {len(self.placement)} node(s)"
        total, capacity = format_bytes(self.memory_bytes), format_bytes(self.capacity_bytes)
        rows = [
            ("model", f"{demand.parameters:,} parameters"),
            ("steps", f"{demand.steps:,} of {demand.tokens_per_step:,} tokens"),
            ("workers", f"{places}, {self.devices_per_worker:g} x {self.device} each"),
            ("precision", demand.precision),
        ]
        rows += [(f"memory: {item.what}", format_bytes(item.bytes)) for item in self.memory]
        rows += [
            ("memory: per worker", f"{total} of {capacity}"),
            ("operations", f"{self.flops:.3g}, at most {self.peak_flops_per_s:.3g} per second"),
            ("duration", format_band(self.hours, format_hours)),
            ("cost", format_band(self.usd, format_usd) if self.usd else "no list price known"),
        ]
        return rows + [("warning", warning) for warning in self.warnings]


def plan_training(
    demand: TrainingDemand, inventory: Inventory, catalogue: Catalogue
) -> TrainingPlan:
    """Return the plan of a run on these machines.

    Raises PlacementError if the workers do not find their cores or GPUs, if one worker's memory
    does not fit, or if the device cannot compute in this precision; always with the numbers.
    """
    placement = _place(demand, inventory)
    nodes = {node.id: node for node in inventory.nodes if node.id in placement}
    warnings: list[str] = []
    devices = {name: _device(demand, node, catalogue, warnings) for name, node in nodes.items()}
    precision = (
        training_precision(devices.values()) if demand.precision == "auto" else demand.precision
    )
    demand = demand.replace(precision=precision)
    slowest = min(devices.values(), key=lambda device: peak_flops(device, precision))
    per_worker = demand.gpus_per_worker or demand.cpus_per_worker
    capacity_bytes = min(
        _capacity_bytes(demand, node, placement[name], devices[name])
        for name, node in nodes.items()
    )
    memory = training_memory(demand, on_gpu=slowest.kind != "cpu")
    _check_memory(demand, memory, capacity_bytes)
    flops = training_flops(demand)
    peak = peak_flops(slowest, precision, per_worker * demand.num_workers)
    hours = _hours(demand, flops, peak, slowest.kind)
    is_spot = all(node.is_spot for node in nodes.values())
    usd_per_h = _usd_per_h(placement, nodes, devices, per_worker, warnings)
    if sum(item.bytes for item in memory) > 0.85 * capacity_bytes:
        warnings.append("memory is within 15% of the limit; lower micro_batch_size if it fails")
    return TrainingPlan(
        demand=demand,
        placement=placement,
        device=slowest.name,
        devices_per_worker=per_worker,
        memory=memory,
        capacity_bytes=capacity_bytes,
        flops=flops,
        peak_flops_per_s=peak,
        hours=hours,
        usd=hours.scaled(usd_per_h) if usd_per_h is not None else None,
        is_spot=is_spot,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def training_flops(demand: TrainingDemand) -> float:
    """Return the operations of a run: 6 per weight and token, attention, and validation.

    Attention adds 12 per layer, query element and visible token (Chowdhery et al. 2022, PaLM,
    appendix B), halved because it is causal. Validation is forward only, a third.
    """
    visible = min(demand.attention_span, demand.seq_len / 2)
    attention = 12 * demand.num_layers * demand.layer.query * visible
    per_token = 6 * demand.matmul_parameters + attention
    return per_token * (demand.steps * demand.tokens_per_step + demand.eval_tokens / 3)


def _place(demand: TrainingDemand, inventory: Inventory) -> dict[str, int]:
    """Give each worker its cores and GPUs, filling the largest nodes first."""
    room = {node.id: _room(demand, node) for node in inventory.nodes}
    if sum(room.values()) < demand.num_workers:
        raise PlacementError(_no_room(demand, inventory, sum(room.values())))
    placement: dict[str, int] = {}
    left = demand.num_workers
    for name in sorted(room, key=lambda name: -room[name]):
        if taken := min(room[name], left):
            placement[name] = taken
            left -= taken
    return placement


def _room(demand: TrainingDemand, node: Node) -> int:
    by_cpu = math.floor(node.cpus / demand.cpus_per_worker + 1e-9)
    if not demand.gpus_per_worker:
        return by_cpu
    return min(by_cpu, math.floor(node.gpus / demand.gpus_per_worker + 1e-9))


def _no_room(demand: TrainingDemand, inventory: Inventory, room: int) -> str:
    gpus = f" and {demand.gpus_per_worker:g} GPUs" if demand.gpus_per_worker else ""
    found = ", ".join(f"{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in inventory.nodes)
    return (
        f"`{demand.name}` asks for {demand.num_workers} workers of {demand.cpus_per_worker:g} "
        f"CPUs{gpus} each; the cluster has {len(inventory.nodes)} node(s) ({found or 'none'}), "
        f"room for {room}. Lower `scaling.num_workers` or what each worker takes, or add nodes."
    )


def _device(
    demand: TrainingDemand, node: Node, catalogue: Catalogue, warnings: list[str]
) -> Accelerator:
    if demand.gpus_per_worker:
        if node.accelerator is None:
            raise PlacementError(
                f"node {node.id} offers GPUs of a kind it does not name, so that memory and time "
                "cannot be planned. Start it with the label ray.io/accelerator-type."
            )
        return catalogue.find(node.accelerator)
    if node.cpu is None:
        warnings.append(f"the CPU of node {node.id} is not known; {_UNKNOWN_CPU} is assumed")
    core = catalogue.find(node.cpu or _UNKNOWN_CPU)
    return core.at_clock(node.cpu_clock_ghz) if node.cpu_clock_ghz else core


def _capacity_bytes(
    demand: TrainingDemand, node: Node, num_workers: int, device: Accelerator
) -> int:
    if demand.gpus_per_worker:
        assert device.memory_bytes is not None, f"{device.name} has no memory in the catalogue"
        # A worker computes on one device, or shares one with others.
        return int(device.memory_bytes * _USABLE_SHARE * min(1.0, demand.gpus_per_worker))
    return int(node.memory_bytes * _USABLE_SHARE / num_workers)


def _check_memory(
    demand: TrainingDemand, memory: Sequence[MemoryItem], capacity_bytes: int
) -> None:
    needed = sum(item.bytes for item in memory)
    if needed <= capacity_bytes:
        return
    parts = ", ".join(f"{item.what} {format_bytes(item.bytes)}" for item in memory)
    raise PlacementError(
        f"`{demand.name}` ({demand.parameters:,} parameters) needs {format_bytes(needed)} on each "
        f"worker ({parts}); there are {format_bytes(capacity_bytes)}. Lower `micro_batch_size` "
        "or `seq_len`, choose a smaller model, place fewer workers on a node, or add memory."
    )


def _hours(demand: TrainingDemand, flops: float, peak: float, kind: str) -> Band:
    worst, usual, best = _SHARE_OF_PEAK[kind]
    compiling = _COMPILE_S if demand.compiled else (0.0, 0.0, 0.0)
    fixed_s = [start + extra for start, extra in zip(_START_S, compiling, strict=True)]
    shares = (best, usual, worst)
    low, typical, high = (
        (flops / (peak * share) + fixed) / 3600
        for share, fixed in zip(shares, fixed_s, strict=True)
    )
    return Band(low=low, typical=typical, high=high)


def _usd_per_h(
    placement: Mapping[str, int],
    nodes: Mapping[str, Node],
    devices: Mapping[str, Accelerator],
    per_worker: float,
    warnings: list[str],
) -> float | None:
    """Return what all devices of the placement cost per hour; None where one has no price."""
    total = 0.0
    for name, num_workers in placement.items():
        price = devices[name].price_usd_per_h
        is_spot = nodes[name].is_spot
        if is_spot and price.spot is None and price.on_demand is not None:
            warnings.append(f"no spot price of {devices[name].name} is known; on demand is assumed")
        usd = price.spot if is_spot and price.spot is not None else price.on_demand
        if usd is None:
            return None
        total += usd * per_worker * num_workers
    return total
