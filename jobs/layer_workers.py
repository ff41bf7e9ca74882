"""Layers of a block compressed by Ray tasks, several at a time.

Takes tasks of jobs/compression/layer_work.py; gives their results in order. What layers share, the
moments of their inputs, is put into Ray's object store once. It does not know what is computed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import ray
import torch
from ray.exceptions import RayTaskError

from cluster.errors import PlacementError, RaysmithError
from jobs.compression.inputs import LayerInputs
from jobs.compression.layer_work import LayerTask, change_layer
from jobs.compression.methods._protocol import LayerResult

_CPU = torch.device("cpu")


class RayWorkers:
    """At most so many layers at a time on the connected cluster, each on a node's CPUs.

    Each is computed on as many threads as this process uses: results are then bitwise those of
    `InProcess` on the same kind of CPU. More layers fit a node if these are few (OMP_NUM_THREADS).
    """

    def __init__(self, num_workers: int) -> None:
        """Raise PlacementError if no node has so many CPUs."""
        self._num_workers, self._num_threads = num_workers, torch.get_num_threads()
        nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        require_room(num_workers, self._num_threads, nodes)
        self._change = ray.remote(_change).options(num_cpus=self._num_threads)

    def run(
        self, tasks: Sequence[LayerTask], inputs: Mapping[str, LayerInputs]
    ) -> Iterator[LayerResult]:
        """Start the tasks, then give their results; raise what the first that failed raised."""
        read = {task.reads for task in tasks if task.reads is not None}
        shared = {name: ray.put(inputs[name].to(_CPU)) for name in read}
        started: list[ray.ObjectRef] = []
        running: list[ray.ObjectRef] = []
        for task in tasks:
            if len(running) == self._num_workers:
                _, running = ray.wait(running, num_returns=1)
            moved = replace(task, weight_OI=task.weight_OI.cpu())
            reads = None if task.reads is None else shared[task.reads]
            started.append(self._change.remote(moved, reads, self._num_threads))
            running.append(started[-1])
        for task, reference in zip(tasks, started, strict=True):
            yield _result(reference, task.weight_OI.device)


def require_room(num_workers: int, num_threads: int, cpus_of_nodes: Sequence[float]) -> None:
    """Raise PlacementError if no node has the CPUs of one task, which would wait forever."""
    largest = max(cpus_of_nodes, default=0.0)
    if largest < num_threads:
        raise PlacementError(
            f"each of `workers` = {num_workers} computes on {num_threads} threads, as this process "
            f"does, and the largest node offers {largest:g} CPUs. Set OMP_NUM_THREADS to that or "
            "less."
        )


def _change(task: LayerTask, inputs: LayerInputs | None, num_threads: int) -> LayerResult:
    torch.set_num_threads(num_threads)
    return change_layer(task, inputs)


def _result(reference: ray.ObjectRef, device: torch.device) -> LayerResult:
    try:
        found: LayerResult = ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RaysmithError):
            raise error.cause from None
        raise
    quantized = None if found.quantized is None else found.quantized.to(device)
    return LayerResult(found.weight_OI.to(device), quantized)
