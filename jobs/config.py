"""Every job's configuration, as values. No I/O, no torch, no Ray.

The relations between fields are checked here; whether the work fits a machine is the planner's.
"""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cluster.config import StrictModel

Precision = Literal["fp32", "bf16"]
Shape = Literal["llama", "qwen2", "qwen3", "mistral"]
Scheme = Literal["bf16", "w8a8", "fp8", "w4a16", "w4a8"]


class RopeScaling(StrictModel):
    """Scaling of rotary position embeddings beyond the trained context."""

    kind: Literal["linear", "llama3"] = Field(description="How frequencies are scaled.")
    factor: float = Field(gt=0, description="Ratio of new to original context length.")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: below this, scale fully.")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: above this, do not scale.")
    original_max_seq_len: int = Field(8192, gt=0, description="llama3: trained context in tokens.")

    @model_validator(mode="after")
    def _check_frequencies(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}"
            )
        return self


class DecoderConfig(StrictModel):
    """Shape of a decoder-only transformer (Llama, Qwen2, Qwen3, Mistral)."""

    shape: Shape = Field("llama", description="Which family's Hugging Face layout is written.")
    vocab_size: int = Field(4096, ge=8, description="Rows of the embedding.")
    hidden_size: int = Field(256, ge=8, description="Width of the residual stream.")
    intermediate_size: int = Field(768, ge=8, description="Width of the gated MLP.")
    num_layers: int = Field(6, ge=1, description="Number of blocks.")
    num_heads: int = Field(4, ge=1, description="Query heads.")
    num_kv_heads: int = Field(2, ge=1, description="Key and value heads.")
    head_dim: int | None = Field(None, ge=2, description="Size of a head; hidden/heads if unset.")
    max_seq_len: int = Field(512, ge=1, description="Largest position, in tokens.")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary frequencies.")
    rope_scaling: RopeScaling | None = Field(None, description="Scaling of rotary positions.")
    norm_eps: float = Field(1e-5, gt=0, description="Epsilon of RMSNorm.")
    tie_embeddings: bool = Field(True, description="Output head shares the embedding.")
    sliding_window: int | None = Field(None, ge=1, description="Attend only this many tokens back.")
    initializer_range: float = Field(0.02, gt=0, description="Std of the initial weights.")
    bos_token_id: int | None = Field(None, ge=0, description="Token that begins a text.")
    eos_token_id: int | None = Field(None, ge=0, description="Token that ends a text.")

    @property
    def resolved_head_dim(self) -> int:
        """Size of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def has_qkv_bias(self) -> bool:
        """Whether q, k and v projections carry a bias (Qwen2)."""
        return self.shape == "qwen2"

    @property
    def has_qk_norm(self) -> bool:
        """Whether q and k are normalised per head (Qwen3)."""
        return self.shape == "qwen3"

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; "
                "set head_dim"
            )
        if self.resolved_head_dim % 2:
            raise ValueError(f"head_dim={self.resolved_head_dim} must be even for rotary positions")
        return self


class ModelConfig(StrictModel):
    """Which model is trained: a fresh one of a shape, or weights from a directory."""

    family: str = Field("decoder", description="Plug-in in jobs/models.")
    init_from: str | None = Field(None, description="Hugging Face directory to start from.")
    decoder: DecoderConfig = Field(DecoderConfig(), description="Shape of a fresh decoder.")


class DataConfig(StrictModel):
    """Which text is read and how it is split, by document, into train, validation and test."""

    source: str = Field("stdlib", description="Plug-in in jobs/data: stdlib, text, jsonl, parquet.")
    paths: tuple[str, ...] = Field((), description="Files, globs or fsspec URLs; none for stdlib.")
    text_field: str = Field("text", description="Column or key that holds the text.")
    max_documents: int | None = Field(None, ge=1, description="Read at most this many documents.")
    validation_fraction: float = Field(0.05, gt=0, lt=0.5, description="Share of documents.")
    test_fraction: float = Field(0.05, gt=0, lt=0.5, description="Share of documents.")
    split_seed: int = Field(0, description="Seed of the split by document name.")
    num_processes: int = Field(2, ge=1, description="Processes that tokenize.")


class TokenizerConfig(StrictModel):
    """A tokenizer to load, or the size of a byte-level BPE to train on the train split."""

    path: str | None = Field(None, description="Directory with tokenizer.json; unset: train one.")
    vocab_size: int = Field(4096, ge=300, description="Size of a trained tokenizer.")
    train_bytes: int = Field(8_000_000, ge=1, description="Text used to train it, in bytes.")


class OptimizerConfig(StrictModel):
    """AdamW (Loshchilov and Hutter 2019) with gradient clipping."""

    lr: float = Field(3e-3, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled decay on matrices.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    grad_clip: float | None = Field(1.0, gt=0, description="Largest global gradient norm.")


class ScheduleConfig(StrictModel):
    """Learning rate over the run."""

    kind: Literal["cosine", "onecycle", "constant"] = Field("cosine", description="Shape.")
    warmup_steps: int = Field(20, ge=0, description="Linear warm-up (onecycle: its rising part).")
    final_lr_ratio: float = Field(0.1, ge=0, le=1, description="Last learning rate over the peak.")


class ScalingConfig(StrictModel):
    """Workers of a distributed run."""

    num_workers: int = Field(1, ge=1, description="Data-parallel workers.")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs reserved for each worker.")
    gpus_per_worker: float = Field(
        0.0, ge=0, le=1, description="GPUs reserved for each worker; a worker uses one."
    )
    max_failures: int = Field(3, ge=0, description="Restarts before the run fails.")


class TrainConfig(StrictModel):
    """One training run."""

    name: str = Field(description="Name of the run; its folder is output_dir/name.")
    output_dir: str = Field("runs", description="Where runs are kept.")
    model: ModelConfig = Field(ModelConfig(), description="What is trained.")
    data: DataConfig = Field(DataConfig(), description="What it is trained on.")
    tokenizer: TokenizerConfig = Field(TokenizerConfig(), description="How text becomes tokens.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="How weights move.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="How fast they move.")
    scaling: ScalingConfig = Field(ScalingConfig(), description="On how many workers.")
    seq_len: int = Field(256, ge=2, description="Tokens of one training sequence.")
    global_batch_size: int = Field(
        16, ge=1, description="Sequences per optimizer step, all workers."
    )
    micro_batch_size: int = Field(8, ge=1, description="Sequences per forward pass on one worker.")
    max_steps: int = Field(100, ge=1, description="Optimizer steps.")
    precision: Precision = Field("bf16", description="fp32, or bf16 autocast.")
    compile: bool = Field(False, description="Use torch.compile on each block.")
    seed: int = Field(0, description="Seed of weights and data order.")
    log_every_steps: int = Field(10, ge=1, description="Steps between progress lines.")
    eval_every_steps: int = Field(100, ge=1, description="Steps between validation passes.")
    eval_sequences: int = Field(64, ge=1, description="Validation sequences per pass.")
    checkpoint_every_steps: int = Field(100, ge=1, description="Steps between checkpoints.")
    checkpoints_kept: int = Field(2, ge=1, description="Newest checkpoints that are kept.")

    @property
    def accumulation_steps(self) -> int:
        """Forward passes per optimizer step on one worker."""
        return self.global_batch_size // (self.micro_batch_size * self.scaling.num_workers)

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        per_pass = self.micro_batch_size * self.scaling.num_workers
        if self.global_batch_size % per_pass:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of "
                f"micro_batch_size x num_workers = {self.micro_batch_size} x "
                f"{self.scaling.num_workers} = {per_pass}"
            )
        if self.model.init_from is None and self.seq_len > self.model.decoder.max_seq_len:
            raise ValueError(
                f"seq_len={self.seq_len} exceeds model.decoder.max_seq_len="
                f"{self.model.decoder.max_seq_len}"
            )
        return self


class Step(StrictModel):
    """One step of a compression recipe."""

    method: str = Field(description="Plug-in in jobs/compression/methods: rtn, magnitude.")
    targets: tuple[str, ...] = Field(
        ("*",), min_length=1, description="Glob patterns over names of linear layers."
    )
    options: dict[str, Any] = Field({}, description="The method's own options.")


class Recipe(StrictModel):
    """Ordered steps that turn a dense model into a compressed one; later steps win."""

    steps: tuple[Step, ...] = Field((), description="Applied in this order; none: bf16 copy.")


class CompressConfig(StrictModel):
    """Apply one recipe to one model."""

    model: str = Field(description="Directory, or name@version in the registry.")
    registry: str = Field("runs/registry", description="Folder of the registry.")
    output: str = Field(description="Directory to write; must not exist.")
    recipe: Recipe = Field(Recipe(), description="What is done to it.")


class GateConfig(StrictModel):
    """What a compressed model must show before it is published."""

    max_perplexity_increase: float = Field(
        0.02, gt=0, description="Limit for the upper 95% bound, as a ratio (0.02 is 2%)."
    )
    max_size_ratio: float = Field(0.45, gt=0, description="Largest bytes over the bf16 model's.")
    max_latency_ratio: float | None = Field(
        None, gt=0, description="Largest decode latency over the bf16 model's; unset: not judged."
    )
    max_cosine_distance: float = Field(
        1e-3, gt=0, description="Encoders: largest distance of a vector from the base model's."
    )
    eval_sequences: int = Field(128, ge=8, description="Held-out sequences.")
    bootstrap_samples: int = Field(2000, ge=100, description="Resamples for the bound.")
    seed: int = Field(0, description="Seed of the bootstrap.")


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


class PipelineConfig(StrictModel):
    """Train, search, publish and deploy, in this order."""

    train: TrainConfig = Field(description="The training run.")
    search: SearchConfig = Field(description="The search over its model.")
    publish: PublishConfig = Field(description="Where the winner goes.")
    deploy: DeployConfig = Field(description="How it is offered.")
