"""The Ray Serve application: published models, a replica group each, behind one gateway.

Takes arguments as `serve deploy` reads them; gives an application. This is the composition root:
the only file of `serving` that knows Ray, the registry, the replicas and the gateway at once.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import ASGIApp

from cluster.config import StrictModel
from cluster.errors import ConfigError
from cluster.storage import resolve_output
from jobs.registry import Entry, Registry
from serving.gateway.app import GatewayLimits, create_app
from serving.gateway.auth import KeyRing
from serving.messages import Event, InferenceRequest, Refused, ServedModel
from serving.replica import EngineReplica

_logger = logging.getLogger(__name__)
_READY_TIMEOUT_S = 10.0
# The gateway's bound on accepted work decides; Serve's own limits must never queue before it does.
_SERVE_MARGIN = 1000


class ServeArgs(StrictModel):
    """What is offered, and on how much hardware."""

    registry: str = Field(description="Folder of the registry.")
    models: tuple[str, ...] = Field(
        min_length=1, description="name, name@version or name@production, as it is now."
    )
    api_keys_file: str = Field(description="File of API keys; `raysmith keys new` makes one.")
    num_replicas: int = Field(default=1, ge=1, description="Replicas of each model's engine.")
    cpus_per_replica: float = Field(default=1.0, gt=0, description="CPUs reserved for each.")
    gpus_per_replica: float = Field(default=0.0, ge=0, description="GPUs reserved for each.")
    engine: str = Field(default="native", description="Plug-in in serving/engines.")
    engine_options: dict[str, Any] = Field(default={}, description="The engine's own options.")
    max_accepted_choices: int = Field(
        default=128, ge=1, description="Sequences accepted at a time; past it 429."
    )
    max_body_bytes: int = Field(default=4 * 2**20, ge=1, description="Largest request, in bytes.")

    @model_validator(mode="after")
    def _check_models(self) -> "ServeArgs":
        names = [reference.partition("@")[0] for reference in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`models` has two versions of `{twice[0]}`; a name is served once")
        return self


def build(args: ServeArgs) -> serve.Application:
    """Return the application. Raises ModelNotFoundError or ConfigError before anything starts.

    A reference means the version that it names now; promoting another one changes nothing until
    the application is deployed again.
    """
    registry = Registry(resolve_output(args.registry))
    keys_path = resolve_output(args.api_keys_file)
    KeyRing(keys_path)
    entries = [registry.resolve(reference, verify=False) for reference in args.models]
    replicas = {entry.name: _replica(args, entry) for entry in entries}
    models = [_served(entry) for entry in entries]
    limits = GatewayLimits(args.max_accepted_choices, args.max_body_bytes)
    gateway = serve.deployment(Gateway).options(
        name="gateway",
        num_replicas=1,  # The bound on accepted work is one process's count.
        max_ongoing_requests=args.max_accepted_choices + _SERVE_MARGIN,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={"num_cpus": 0},
    )
    application: serve.Application = gateway.bind(models, str(keys_path), limits, replicas)
    return application


class Replica(EngineReplica):
    """An `EngineReplica` that Ray Serve runs: it stops its engine when Serve lets go of it."""

    def __del__(self) -> None:
        if hasattr(self, "_engine"):  # Not if the constructor failed.
            self.close()


@serve.ingress()
class Gateway:
    """The REST API in a process of its own, without a model."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        keys_path: str,
        limits: GatewayLimits,
        replicas: Mapping[str, DeploymentHandle],
    ) -> None:
        self._backend = ServeBackend(models, replicas)
        self._keys = KeyRing(Path(keys_path))
        self._limits = limits

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return what answers HTTP; Ray Serve calls it once, after the constructor."""
        return create_app(self._backend, self._keys, self._limits)


class ServeBackend:
    """A gateway's `Backend` over deployment handles."""

    def __init__(
        self, models: Sequence[ServedModel], replicas: Mapping[str, DeploymentHandle]
    ) -> None:
        self._models = tuple(models)
        self._streaming = {
            name: handle.options(stream=True, method_name="generate")
            for name, handle in replicas.items()
        }
        self._replicas = dict(replicas)

    def models(self) -> Sequence[ServedModel]:
        """Return what is offered."""
        return self._models

    def generate(self, model: ServedModel, request: InferenceRequest) -> "HandleEvents":
        """Start a request on one of the model's replicas."""
        return HandleEvents(self._streaming[model.name].remote(request))

    async def problem(self) -> Refused | None:
        """Return why a model cannot answer now, or None if a replica of each can."""
        for name, handle in self._replicas.items():
            try:
                await asyncio.wait_for(handle.info.remote(), _READY_TIMEOUT_S)
            except (TimeoutError, RayError, RayServeException) as error:
                _logger.warning("%s is not ready: %s", name, error)
                message = f"model `{name}` is not ready. Try again in a moment."
                return Refused(HTTPStatus.SERVICE_UNAVAILABLE, message, retry_after_s=1)
        return None


class HandleEvents:
    """Events of one request to a replica; closing them cancels it there."""

    def __init__(self, response: DeploymentResponseGenerator) -> None:
        self._response = response
        self._is_done = False

    def __aiter__(self) -> AsyncIterator[list[Event]]:
        return self

    async def __anext__(self) -> list[Event]:
        """Return the next batch; a replica that failed becomes a Refused."""
        if self._is_done:
            raise StopAsyncIteration
        try:
            batch: list[Event] = await anext(self._response)
        except StopAsyncIteration:
            self._is_done = True
            raise
        except BackPressureError:
            return self._end("the model's replicas are busy. Try again in a moment.")
        except (RayError, RayServeException):
            _logger.exception("a replica failed")
            return self._end("the model's replica failed. Try again in a moment.")
        return batch

    async def aclose(self) -> None:
        """Cancel the request unless it has ended."""
        if not self._is_done:
            self._is_done = True
            self._response.cancel()

    def _end(self, message: str) -> list[Event]:
        self._is_done = True
        return [Refused(HTTPStatus.SERVICE_UNAVAILABLE, message, retry_after_s=1)]


def _replica(args: ServeArgs, entry: Entry) -> serve.Application:
    deployment = serve.deployment(Replica).options(
        name=f"engine-{entry.name}",
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.max_accepted_choices + _SERVE_MARGIN,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=2.0,
        ray_actor_options={
            "num_cpus": args.cpus_per_replica,
            "num_gpus": args.gpus_per_replica,
        },
    )
    application: serve.Application = deployment.bind(
        str(entry.path), args.engine, args.engine_options
    )
    return application


def _served(entry: Entry) -> ServedModel:
    try:
        published_s = int(datetime.fromisoformat(entry.published_at).timestamp())
    except ValueError:
        raise ConfigError(
            f"{entry.reference}: its manifest has published_at=`{entry.published_at}`, which is no "
            "time. Publish the model again."
        ) from None
    return ServedModel(entry.name, entry.version, published_s)
