"""Which machines there are: nodes with their cores, accelerators, memory, labels.

Takes this machine, or a connected Ray cluster; gives an Inventory. It does not know what any of it
is worth (hardware.py) or what will run there (planner.py).
"""

import csv
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from pydantic import Field

from cluster.config import StrictModel
from cluster.errors import PlacementError
from cluster.hardware import Catalogue, detect_cpu, load_catalogue

_ACCELERATOR_RESOURCE = "accelerator_type:"
_ACCELERATOR_LABEL = "ray.io/accelerator-type"
_MARKET_LABEL = "ray.io/market-type"
NODE_LABEL = "ray.io/node-id"  # Its value is a node's id.


class Node(StrictModel):
    """One machine."""

    id: str = Field(description="Ray's node id, or a name.")
    cpus: float = Field(ge=0, description="Cores offered.")
    gpus: float = Field(0.0, ge=0, description="GPUs or TPU chips offered.")
    cpu: str | None = Field(None, description="CPU in the catalogue; none: not known.")
    cpu_clock_ghz: float | None = Field(None, gt=0, description="Clock of its cores.")
    accelerator: str | None = Field(
        None, description="GPU or TPU in the catalogue, or its own name."
    )
    memory_bytes: int = Field(ge=0, description="Memory of the machine for work.")
    labels: dict[str, str] = Field({}, description="Ray's labels.")
    is_spot: bool = Field(False, description="May be taken away at any time.")


class Inventory(StrictModel):
    """The machines that work can be placed on."""

    nodes: tuple[Node, ...] = Field((), description="Living nodes.")

    @property
    def cpus(self) -> float:
        """Cores of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)


def local_inventory() -> Inventory:
    """Return this machine as one node, without Ray; GPUs as nvidia-smi lists them."""
    core = detect_cpu()
    names = _local_gpu_names()
    node = Node(
        id="local",
        cpus=_usable_cores(),
        gpus=len(names),
        cpu=core.name,
        cpu_clock_ghz=core.clock_ghz,
        accelerator=_catalogue_name(names[0], load_catalogue()) if names else None,
        memory_bytes=_usable_memory_bytes(),
    )
    return Inventory(nodes=(node,))


def cluster_inventory() -> Inventory:
    """Return the living nodes of the Ray cluster that this process is connected to."""
    import ray  # deferred: only a connected driver has it loaded, and others need not wait for it

    return parse_nodes(ray.nodes())


def parse_nodes(nodes: Sequence[Mapping[str, Any]], *, hostname: str | None = None) -> Inventory:
    """Turn `ray.nodes()` into an Inventory; the CPU is known for nodes on this host only."""
    hostname = hostname or platform.node()
    alive = sorted((node for node in nodes if node["Alive"]), key=lambda node: str(node["NodeID"]))
    return Inventory(nodes=tuple(_parse_node(node, hostname) for node in alive))


def _parse_node(node: Mapping[str, Any], hostname: str) -> Node:
    resources: Mapping[str, float] = node["Resources"]
    labels = {str(key): str(value) for key, value in (node.get("Labels") or {}).items()}
    core = detect_cpu() if node.get("NodeManagerHostname") == hostname else None
    kind = next(
        (
            name.removeprefix(_ACCELERATOR_RESOURCE)
            for name in resources
            if name.startswith(_ACCELERATOR_RESOURCE)
        ),
        labels.get(_ACCELERATOR_LABEL),
    )
    return Node(
        id=str(node["NodeID"]),
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0) + resources.get("TPU", 0.0),
        cpu=core.name if core else None,
        cpu_clock_ghz=core.clock_ghz if core else None,
        accelerator=_catalogue_name(kind, load_catalogue()) if kind else None,
        memory_bytes=int(resources.get("memory", 0)),
        labels=labels,
        is_spot=labels.get(_MARKET_LABEL) == "spot",
    )


def _catalogue_name(name: str, catalogue: Catalogue) -> str:
    entry = catalogue.match(name)
    return entry.name if entry else name


def _usable_cores() -> float:
    if hasattr(os, "sched_getaffinity"):
        return float(len(os.sched_getaffinity(0)))
    return float(os.cpu_count() or 1)


def _usable_memory_bytes() -> int:
    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return total if text == "max" else min(total, int(text))


def _local_gpu_names() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        raise PlacementError(
            "nvidia-smi did not answer within 20 s, so this machine's GPUs cannot be counted. "
            "Run it by hand; a driver that hangs needs a restart."
        ) from None
    if listed.returncode != 0:
        return []  # the tool is installed but there is no driver: this machine has no usable GPU
    return [row[0].strip() for row in csv.reader(listed.stdout.splitlines()) if row]
