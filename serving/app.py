"""The Ray Serve applications: one for each published version, and the gateway before them.

Takes arguments as `serve deploy` reads them; gives applications. This is the composition root: the
only file of `serving` that knows Ray Serve, the registry, engines and the gateway at once.
"""

import time
from pathlib import Path
from typing import Any

from pydantic import Field
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster.config import StrictModel
from cluster.errors import ConfigError
from cluster.ledger import Ledger
from cluster.storage import resolve_output
from jobs.applications import published_s
from jobs.config import ReplicaScaling
from jobs.registry import Registry
from serving.engine_deployment import DRAIN_MARGIN_S, EngineDeployment
from serving.gateway.limits import GatewayLimits
from serving.gateway_deployment import ENGINE_DEPLOYMENT, GatewayDeployment, GatewayOptions
from serving.messages import ServedModel

GATEWAY_DEPLOYMENT = "gateway"
_HEALTH_CHECK_PERIOD_S = 2.0
_LOOK_BACK_S = 15.0  # Longer than replicas take between two reports.


class EngineArgs(StrictModel):
    """One published version, and how much hardware answers for it."""

    registry: str = Field(description="Folder of the registry.")
    model: str = Field(description="name, name@version or name@production, as it is now.")
    directory: str | None = Field(
        default=None,
        description="A model directory to answer as `model`, which the registry need not know.",
    )
    num_replicas: int = Field(default=1, ge=1, description="Replicas, unless they scale.")
    scaling: ReplicaScaling | None = Field(
        default=None, description="How their number follows the load; unset: it does not."
    )
    cpus_per_replica: float = Field(default=1.0, gt=0, description="CPUs reserved for each.")
    gpus_per_replica: float = Field(default=0.0, ge=0, description="GPUs reserved for each.")
    node_labels: dict[str, str] = Field(
        default={}, description="Ray's labels that a node must have to run one; {}: any node."
    )
    engine: str = Field(default="native", description="Plug-in in serving/engines.")
    engine_options: dict[str, Any] = Field(default={}, description="The engine's own options.")
    drain_s: float = Field(
        default=60.0,
        ge=0,
        description="How long a replica that is stopped finishes what it has; what is left then "
        "continues on another one.",
    )


class ServeArgs(StrictModel):
    """The gateway: where it listens, whom it lets in, how much it accepts."""

    ledger: str | None = Field(
        default=None,
        description="Ledger of teams and keys: a path or URL; unset: RAYSMITH_LEDGER, else the one "
        "of whoever runs the cluster.",
    )
    host: str = Field(default="127.0.0.1", description="Address that the gateway listens on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Its port.")
    max_accepted_choices: int = Field(
        default=128, ge=1, description="Sequences accepted at a time; past it 429."
    )
    max_body_bytes: int = Field(default=4 * 2**20, ge=1, description="Largest request, in bytes.")
    log_prompts: bool = Field(default=False, description="Whether the request log has prompts.")
    drain_s: float = Field(
        default=60.0, ge=0, description="How long a gateway that is replaced ends its answers."
    )
    cold_start_s: float = Field(
        default=120.0, ge=0, description="How long a request waits for a model that sleeps."
    )


def build(args: ServeArgs) -> serve.Application:
    """Return the gateway; its `user_config` is a `serving.routing.RoutingTable`.

    Raises ConfigError or LedgerError before anything starts.
    """
    Ledger.open(args.ledger).close()
    gateway = serve.deployment(GatewayDeployment).options(
        name=GATEWAY_DEPLOYMENT,
        num_replicas=1,  # The bound on accepted work is one process's count.
        user_config={"routes": []},
        max_surge_percent=100,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=args.drain_s + DRAIN_MARGIN_S,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        ray_actor_options={"num_cpus": 0},
    )
    application: serve.Application = gateway.bind(
        args.ledger,
        GatewayLimits(
            args.max_accepted_choices, args.max_body_bytes, is_logging_prompts=args.log_prompts
        ),
        GatewayOptions(args.host, args.port, args.drain_s, args.cold_start_s),
    )
    return application


def build_engine(args: EngineArgs) -> serve.Application:
    """Return the replicas of one version.

    Raises ModelNotFoundError or ConfigError before anything starts. A reference means the version
    that it names now; promoting another one changes nothing until this is deployed again.
    """
    path, served = _served(args)
    engine = serve.deployment(EngineDeployment).options(
        name=ENGINE_DEPLOYMENT,
        **_replicas(args),
        max_surge_percent=100,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=args.drain_s + DRAIN_MARGIN_S,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        ray_actor_options={
            "num_cpus": args.cpus_per_replica,
            "num_gpus": args.gpus_per_replica,
            **({"label_selector": args.node_labels} if args.node_labels else {}),
        },
    )
    application: serve.Application = engine.bind(
        str(path),
        served,
        args.engine,
        args.engine_options,
        args.drain_s,
    )
    return application


def _served(args: EngineArgs) -> tuple[Path, ServedModel]:
    if args.directory is not None:
        name, _, version = args.model.partition("@")
        path = resolve_output(args.directory)
        if not path.is_dir():
            raise ConfigError(
                f"`directory` = {args.directory}: there is no directory {path}. Give that of a "
                "model, or leave it out to serve a version of the registry."
            )
        return path, ServedModel(name, version or "0", int(time.time()))
    entry = Registry(resolve_output(args.registry)).resolve(args.model, verify=False)
    return entry.path, ServedModel(entry.name, entry.version, published_s(entry))


def _replicas(args: EngineArgs) -> dict[str, Any]:
    if args.scaling is None:
        return {"num_replicas": args.num_replicas}
    policy = AutoscalingPolicy(
        policy_function="serving.autoscaling:Policy", policy_kwargs=args.scaling.model_dump()
    )
    config = AutoscalingConfig(
        min_replicas=args.scaling.min_replicas,
        max_replicas=args.scaling.max_replicas,
        initial_replicas=max(1, args.scaling.min_replicas),
        look_back_period_s=_LOOK_BACK_S,
        upscale_delay_s=0,  # The policy itself waits.
        downscale_delay_s=0,
        policy=policy,
    )
    return {"autoscaling_config": config}
