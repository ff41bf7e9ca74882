"""One training run: data, tokenizer, optimizer, schedule and workers."""

from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.config import StrictModel
from jobs.config.model import ModelConfig

Precision = Literal["auto", "fp32", "bf16"]


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

    kind: Literal["cosine", "linear", "onecycle", "constant"] = Field(
        "cosine", description="Shape."
    )
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
    precision: Precision = Field(
        "auto",
        description="fp32, or bf16 autocast; auto: bf16 where every worker computes faster in it.",
    )
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
