"""How a model is published and offered."""

from typing import Any, Self

from pydantic import Field, model_validator

from cluster.config import StrictModel

# Share of prompts that a version answers as its model does offline, before it takes over a name.
MIN_PARITY = 0.9


class PublishConfig(StrictModel):
    """Where and under which name a model is published."""

    registry: str = Field("runs/registry", description="Folder of the registry.")
    name: str = Field(description="Name of the model.")
    model: str | None = Field(
        None, description="Directory to publish; unset: the pipeline gives its winner."
    )
    version: str | None = Field(
        None, coerce_numbers_to_str=True, description="Version; unset: the next number."
    )
    promote: bool = Field(True, description="Point name@production to it.")


class ReplicaScaling(StrictModel):
    """Bounds of a version's replicas, and when their number changes."""

    min_replicas: int = Field(1, ge=0, description="Fewest; 0: none while nobody asks.")
    max_replicas: int = Field(1, ge=1, description="Most.")
    target_tokens: int = Field(
        8192, ge=1, description="Tokens in flight that one replica shall have at most."
    )
    max_queue_age_s: float = Field(
        1.0, gt=0, description="A sequence that waits longer asks for one more replica."
    )
    upscale_delay_s: float = Field(
        2.0, ge=0, description="How long more have to be needed; from 0 at once."
    )
    downscale_delay_s: float = Field(60.0, ge=0, description="How long fewer have to be enough.")
    to_zero_delay_s: float = Field(
        300.0, ge=0, description="How long nothing has to be asked before the last stops."
    )

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"`min_replicas` = {self.min_replicas} exceeds `max_replicas` = {self.max_replicas}"
            )
        return self


class DeployConfig(StrictModel):
    """The Ray Serve applications that offer a published model."""

    application: str = Field(
        "gateway", description="Name of the gateway's Serve application; a running one is kept."
    )
    model: str = Field(description="name@version or name@production.")
    num_replicas: int = Field(1, ge=1, description="Replicas of the engine, unless they scale.")
    scaling: ReplicaScaling | None = Field(
        None, description="How their number follows the load; unset: it does not."
    )
    cpus_per_replica: float = Field(1.0, gt=0, description="CPUs reserved for each replica.")
    gpus_per_replica: float = Field(0.0, ge=0, description="GPUs reserved for each replica.")
    engine: str = Field("native", description="Plug-in in serving/engines.")
    engine_options: dict[str, Any] = Field({}, description="The engine's own options.")
    port: int | None = Field(
        None, ge=0, le=65535, description="Port of the gateway; unset: the cluster's serve port."
    )
    ledger: str | None = Field(
        None,
        description="Ledger of teams and keys: a path or a postgresql:// URL without a password; "
        "unset: RAYSMITH_LEDGER, else the one of this user.",
    )
    ready_timeout_s: float = Field(120.0, gt=0, description="How long to wait for readiness.")
    min_parity: float = Field(
        MIN_PARITY,
        ge=0,
        le=1,
        description="Share of prompts that a version answers as its model does offline before it "
        "takes over from another one, if our decoder reads it; the model is read once more for "
        "that. 0: it is not asked.",
    )
