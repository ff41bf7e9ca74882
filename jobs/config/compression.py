"""How a model is compressed, and what it must show."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from cluster.config import StrictModel

Scheme = Literal["bf16", "w8a8", "fp8", "w8a16", "w4a16", "w4a8", "w3a16"]
KvCache = Literal["auto", "int8"]


class Step(StrictModel):
    """One step of a compression recipe."""

    method: str = Field(description="Plug-in in jobs/compression/methods: rtn, gptq, ...")
    targets: tuple[str, ...] = Field(
        ("*",), min_length=1, description="Glob patterns over names of linear layers."
    )
    options: dict[str, Any] = Field({}, description="The method's own options.")


class Recipe(StrictModel):
    """Ordered steps that turn a dense model into a compressed one; later steps win."""

    steps: tuple[Step, ...] = Field((), description="Applied in this order; none: bf16 copy.")
    kv_cache: KvCache = Field(
        "auto",
        description="Keys and values of former tokens; int8: with a scale for each token and head. "
        "auto: of the type of activations.",
    )


class CalibrationConfig(StrictModel):
    """Text that methods see which look at what feeds a layer, or train on; the training split."""

    data: str = Field(description="Folder of packed shards, as a training run wrote it.")
    num_sequences: int = Field(128, ge=1, description="Sequences that go through the model.")
    seq_len: int = Field(256, ge=2, description="Tokens of one of them.")
    seed: int = Field(0, description="Seed of which ones.")
    sequential: bool = Field(
        True,
        description="Whether a block sees the text as compressed blocks before it pass it on; "
        "false: as the unchanged model does, so that all recipes share what is computed of it.",
    )
    cache: str | None = Field(
        None,
        description="Folder that keeps what is computed of an unchanged model, for `sequential: "
        "false`; unset: a search's own, else nothing is kept.",
    )

    @model_validator(mode="after")
    def _check_cache_is_used(self) -> Self:
        if self.sequential and self.cache is not None:
            raise ValueError(
                f"cache={self.cache} is for what recipes share: set `sequential: false` or leave "
                "it out"
            )
        return self


class CompressConfig(StrictModel):
    """Apply one recipe to one model."""

    model: str = Field(description="Directory, or name@version in the registry.")
    registry: str = Field("runs/registry", description="Folder of the registry.")
    output: str = Field(description="Directory to write; must not exist.")
    recipe: Recipe = Field(Recipe(), description="What is done to it.")
    calibration: CalibrationConfig | None = Field(
        None, description="Text for all methods but rtn and magnitude, which need none."
    )
    workers: int = Field(
        1,
        ge=1,
        description="Layers of a block compressed at a time; more than 1: by Ray tasks on the "
        "running cluster, each of OMP_NUM_THREADS CPUs.",
    )


class GateConfig(StrictModel):
    """What a compressed model must show before it is published."""

    max_perplexity_increase: float = Field(
        0.02, gt=0, description="Limit for the upper 95% bound, as a ratio (0.02 is 2%)."
    )
    max_size_ratio: float = Field(0.45, gt=0, description="Largest bytes over the bf16 model's.")
    max_latency_ratio: float | None = Field(
        None,
        gt=0,
        description="Largest decode latency over the bf16 model's; unset: by `require_faster`.",
    )
    require_faster: bool = Field(
        True,
        description="Refuse what decodes slower than the bf16 model beyond the noise of timing: "
        "where the lower 95% bound of the paired ratios is above 1.02. Switch it off for a format "
        "that only saves bytes on this machine.",
    )
    min_agreement: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Least share of greedy choices equal to the base's, for the lower 95% bound; "
        "unset: measured, not judged.",
    )
    agreement_prompts: int = Field(
        32, ge=8, description="Prompts for that, the beginnings of held-out sequences."
    )
    agreement_tokens: int = Field(
        32, ge=1, description="Choices compared a prompt; at most half of `seq_len`."
    )
    max_cosine_distance: float = Field(
        1e-3, gt=0, description="Encoders: largest distance of a vector from the base model's."
    )
    eval_sequences: int = Field(128, ge=8, description="Held-out sequences.")
    bootstrap_samples: int = Field(2000, ge=100, description="Resamples for the bound.")
    seed: int = Field(0, description="Seed of the sequences and the bootstrap.")


class EvaluateConfig(StrictModel):
    """Measure one model beside the dense one it came from, and judge it."""

    model: str = Field(description="Directory, or name@version in the registry.")
    base: str = Field(description="Directory of the dense model it came from.")
    data: str = Field(
        description="Folder of packed shards, as a training run wrote it; for an encoder a text "
        "file, an input a line."
    )
    registry: str = Field("runs/registry", description="Folder of the registry.")
    split: Literal["validation", "test"] = Field("test", description="Which held-out split.")
    seq_len: int = Field(256, ge=2, description="Tokens of one evaluated sequence.")
    gate: GateConfig = Field(GateConfig(), description="Limits it is judged by.")
    record: bool = Field(
        False, description="Write the verdict into the directory's manifest, for publishing."
    )
