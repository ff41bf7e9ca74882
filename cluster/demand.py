"""What a job asks of machines, as values; jobs/plan.py makes them from a configuration.

It knows neither machines nor how bytes, hours and dollars follow from a demand (planner.py).
"""

from typing import Literal

from pydantic import Field

from cluster.config import StrictModel


class LayerShape(StrictModel):
    """Widths of one block of a decoder, in elements."""

    hidden: int = Field(ge=1, description="Residual stream.")
    query: int = Field(ge=1, description="Query heads times their size.")
    key: int = Field(ge=1, description="Key heads times their size; values have the same.")
    intermediate: int = Field(ge=1, description="Gated MLP.")
    num_heads: int = Field(ge=1, description="Query heads.")


class TrainingDemand(StrictModel):
    """What a training run asks for."""

    name: str = Field(description="Name of the run.")
    parameters: int = Field(ge=1, description="Weights, shared ones counted once.")
    matmul_parameters: int = Field(ge=1, description="Weights that every token is multiplied by.")
    layer: LayerShape = Field(description="One block.")
    num_layers: int = Field(ge=1, description="Blocks.")
    vocab_size: int = Field(ge=1, description="Columns of the logits.")
    seq_len: int = Field(ge=1, description="Tokens of a sequence.")
    attention_span: int = Field(ge=1, description="Tokens a token can see at most.")
    micro_batch_size: int = Field(ge=1, description="Sequences per forward pass on one worker.")
    tokens_per_step: int = Field(ge=1, description="Tokens of an optimizer step, all workers.")
    steps: int = Field(ge=1, description="Optimizer steps.")
    eval_tokens: int = Field(0, ge=0, description="Tokens of all validation passes, one worker.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        description="Of matrix products; auto: as fits the devices."
    )
    num_workers: int = Field(ge=1, description="Data-parallel workers.")
    cpus_per_worker: float = Field(gt=0, description="Cores of a worker.")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of a worker.")
    compiled: bool = Field(False, description="Blocks are compiled.")
