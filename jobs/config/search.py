"""A search over compression recipes."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from cluster.config import StrictModel
from jobs.config.compression import GateConfig, Scheme


class Rung(StrictModel):
    """One level of fidelity of a search."""

    eval_sequences: int = Field(ge=1, description="Validation sequences a trial is scored on.")
    keep_ratio: float = Field(0.5, gt=0, le=1, description="Share of trials that go on.")
    real: bool = Field(False, description="Pack and run real kernels, else fake quantization.")


class SearchConfig(StrictModel):
    """A search over compression recipes."""

    name: str = Field(description="Name of the search; its folder is output_dir/name.")
    output_dir: str = Field("runs", description="Where searches are kept.")
    model: str = Field(description="Directory of the dense model.")
    data: str = Field(description="Folder of packed shards, as a training run wrote it.")
    seq_len: int = Field(256, ge=2, description="Tokens of one evaluated sequence.")
    schemes: tuple[Scheme, ...] = Field(
        ("bf16", "w8a8", "w4a16"), min_length=1, description="Formats a layer group may take."
    )
    sparsities: tuple[float, ...] = Field(
        (0.0,), min_length=1, description="Shares that magnitude pruning may set to zero."
    )
    layers_per_group: int = Field(2, ge=1, description="Consecutive blocks that share a choice.")
    num_trials: int = Field(12, ge=1, description="Recipes tried on the first rung.")
    rungs: tuple[Rung, ...] = Field(
        (
            Rung(eval_sequences=16, keep_ratio=0.5),
            Rung(eval_sequences=64, keep_ratio=1.0, real=True),
        ),
        min_length=1,
        description="Levels of fidelity, cheapest first; the last one is real.",
    )
    gate: GateConfig = Field(GateConfig(), description="Limits; the winner must pass them.")
    max_concurrent_trials: int = Field(2, ge=1, description="Trials at a time.")
    cpus_per_trial: float = Field(1.0, gt=0, description="CPUs reserved for each trial.")
    seed: int = Field(0, description="Seed of the proposals.")

    @field_validator("sparsities")
    @classmethod
    def _check_sparsities(cls, sparsities: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= sparsity < 1 for sparsity in sparsities):
            raise ValueError("each must be at least 0 and below 1")
        return sparsities

    @model_validator(mode="after")
    def _check_rungs(self) -> Self:
        if not self.rungs[-1].real:
            raise ValueError(
                "the last of `rungs` must have real=true, so that the winner is measured"
            )
        return self
