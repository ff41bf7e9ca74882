"""An engine replica as Ray Serve runs it.

Takes a published version; gives a process that answers for it and that gateways find through the
directory. Ray Serve starts, watches and stops it; no request passes through Ray.
"""

from typing import Any

import msgspec
import ray

from serving.autoscaling import QUEUE_AGE, TOKENS_IN_FLIGHT
from serving.loop_thread import LoopThread
from serving.messages import ServedModel
from serving.ray_directory import RayDirectory
from serving.replica import EngineReplica
from serving.replica_host import ReplicaHost

DRAIN_MARGIN_S = 10.0


class EngineDeployment:
    """One replica; see `serving.app.build_engine`."""

    def __init__(
        self,
        directory: str,
        model: ServedModel,
        engine: str,
        engine_options: dict[str, Any],
        drain_s: float,
    ) -> None:
        """Load the model and begin to listen."""
        self._drain_s = drain_s
        self._replica = EngineReplica(directory, engine, engine_options)
        model = msgspec.structs.replace(
            model, task=self._replica.task, context_tokens=self._replica.context_tokens
        )
        self._thread = LoopThread("replica")
        self._host = ReplicaHost(self._replica, model, RayDirectory())
        node_id = ray.get_runtime_context().get_node_id()
        self._thread.run(self._host.start(_node_address(node_id), node_id))

    def wake(self) -> None:
        """Do nothing: that this was asked made Ray Serve start a replica where there was none."""

    def check_health(self) -> None:
        """Raise EngineError if the engine stopped; Ray Serve then starts another replica."""
        self._replica.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what `serving.autoscaling` decides by."""
        stats = self._replica.stats()
        return {
            TOKENS_IN_FLIGHT: float(stats.tokens_in_flight),
            QUEUE_AGE: stats.queue_age_s,
        }

    def __del__(self) -> None:
        """Drain and stop, as Ray Serve asks for."""
        if hasattr(self, "_host"):  # Not if the constructor failed.
            self._thread.run(self._host.stop(self._drain_s))
            self._thread.stop()


def _node_address(node_id: str) -> str:
    """Return the address that other nodes know this one by: loopback on a local cluster."""
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return str(nodes[node_id])
