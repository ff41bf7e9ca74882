"""A search over compression recipes."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from cluster.config import StrictModel
from jobs.config.compression import CalibrationConfig, GateConfig, KvCache, Scheme

Granularity = Literal["part", "fused"]
Quantizer = Literal["rtn", "gptq", "awq+gptq"]
Pruning = Literal["magnitude", "wanda", "sparsegpt"]


class Workload(StrictModel):
    """The request whose time is the latency: alone on the machine, answered greedily."""

    prompt_tokens: int = Field(128, ge=1, description="Tokens of its prompt.")
    output_tokens: int = Field(32, ge=1, description="Tokens of its answer.")


class SearchLimits(StrictModel):
    """What a model must keep to beside the gate; unset: not judged."""

    max_bytes: int | None = Field(None, ge=1, description="Bytes of all weights on disk.")
    max_memory_bytes: int | None = Field(None, ge=1, description="Bytes of weights in memory.")
    max_latency_ms: float | None = Field(
        None, gt=0, description="Median time of a request of `workload`, in milliseconds."
    )
    max_cost_per_million_tokens: float | None = Field(
        None, gt=0, description="Price of a million answered tokens; needs `price_per_hour`."
    )
    price_per_hour: float | None = Field(
        None, gt=0, description="Price of the machine that answers, an hour."
    )

    def cost_per_million_tokens(self, latency_ms: float, output_tokens: int) -> float | None:
        """Return what a million answered tokens cost, one request at a time; None without price."""
        if self.price_per_hour is None:
            return None
        return self.price_per_hour * latency_ms / 3_600_000 / output_tokens * 1e6

    @model_validator(mode="after")
    def _check_price(self) -> Self:
        if self.max_cost_per_million_tokens is not None and self.price_per_hour is None:
            raise ValueError("max_cost_per_million_tokens needs price_per_hour")
        return self


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
        (0.0,), min_length=1, description="Shares that `pruning` may set to zero."
    )
    pruning: Pruning = Field("magnitude", description="How zeros are chosen.")
    quantizer: Quantizer = Field("rtn", description="How rungs with real=true quantize.")
    repair_tokens: int = Field(
        0, ge=0, description="Tokens of distillation after pruning, where real=true; 0: none."
    )
    calibration: CalibrationConfig | None = Field(
        None, description="Text for methods that see what feeds a layer, and for repair."
    )
    kv_cache: KvCache = Field(
        "auto", description="How every model but the unchanged one keeps keys and values."
    )
    granularity: Granularity = Field(
        "part",
        description="What shares a choice: attention and MLP, or each product that kernels fuse "
        "(q, k and v; o; gate and up; down).",
    )
    layers_per_group: int = Field(2, ge=1, description="Consecutive blocks that share a choice.")
    probe_sequences: int = Field(
        8, ge=1, description="Validation sequences on which each choice alone is measured once."
    )
    num_trials: int = Field(12, ge=1, description="Recipes tried on the first rung.")
    generations: int = Field(
        2, ge=1, description="Times that recipes are proposed; later ones know earlier results."
    )
    workload: Workload = Field(Workload(), description="What latency is measured on.")
    limits: SearchLimits = Field(SearchLimits(), description="Limits beside the gate's.")
    served_finalists: int = Field(
        2, ge=0, description="Models of the front that are timed again through Ray Serve."
    )
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

    @property
    def threads_per_trial(self) -> int:
        """Threads that a trial computes with."""
        return max(1, int(self.cpus_per_trial))

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

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        seeing: list[str] = [self.quantizer] if self.quantizer != "rtn" else []
        if any(self.sparsities):
            seeing += [self.pruning] if self.pruning != "magnitude" else []
            seeing += ["repair_tokens"] if self.repair_tokens else []
        if self.calibration is None and seeing:
            raise ValueError(f"{seeing[0]} has to see text: give `calibration`")
        return self
