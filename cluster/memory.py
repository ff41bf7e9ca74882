"""Bytes that one worker of a training run holds at its peak, itemised.

Takes a TrainingDemand; gives MemoryItems. It does not know how much memory there is.

Activations follow from what autograd keeps for one block of jobs/models/decoder.py: counted with
saved-tensor hooks, the sums below were within 6% for eight shapes in both precisions. Compiled
blocks keep less. Weights, gradients and moments are float32 in either precision; bf16 autocast adds
a bfloat16 copy of the matrices.
"""

from pydantic import Field

from cluster.config import StrictModel
from cluster.demand import TrainingDemand
from cluster.storage import MIB

_FP32, _BF16 = 4, 2
# What glibc's heap keeps between tensors of changing sizes. Peak resident size of 6 and 27 million
# parameters was 1.4 to 1.5 times the sum without it, and equal to the sum where malloc returned
# every block (MALLOC_MMAP_THRESHOLD_=65536). PyTorch's CUDA allocator loses about a tenth.
_CPU_SLACK, _GPU_SLACK = 0.55, 0.1
# Resident size of a worker before it has a model: interpreter, torch and Ray; on a GPU the CUDA
# context with its libraries.
_CPU_RUNTIME_BYTES = 550 * MIB
_GPU_RUNTIME_BYTES = 1100 * MIB
_BLOCK_QUERIES = 128  # queries whose scores attention by blocks makes at a time


class MemoryItem(StrictModel):
    """One use of memory."""

    what: str = Field(description="What the bytes hold.")
    bytes: int = Field(ge=0, description="How many, on one worker.")


def training_memory(demand: TrainingDemand, *, on_gpu: bool) -> tuple[MemoryItem, ...]:
    """Return what one data-parallel worker holds at its peak: the backward pass of a micro batch.

    Each worker has a whole copy of weights, gradients and AdamW's two moments.
    """
    tokens = demand.micro_batch_size * demand.seq_len
    weights = demand.parameters * _FP32
    copies = demand.matmul_parameters * _BF16 if demand.precision == "bf16" else 0
    logits = tokens * demand.vocab_size * _logit_bytes(demand)
    runtime = _GPU_RUNTIME_BYTES if on_gpu else _CPU_RUNTIME_BYTES
    activations = tokens * demand.num_layers * _block_bytes(demand, on_gpu=on_gpu)
    slack = (_GPU_SLACK if on_gpu else _CPU_SLACK) * (activations + copies + logits)
    return (
        MemoryItem(what="weights", bytes=weights),
        MemoryItem(what="gradients", bytes=weights),
        MemoryItem(what="optimizer", bytes=2 * weights),
        MemoryItem(what="activations", bytes=activations),
        MemoryItem(what="temporary", bytes=copies + logits),
        MemoryItem(what="allocator", bytes=int(slack)),
        MemoryItem(what="runtime", bytes=runtime),
    )


def _logit_bytes(demand: TrainingDemand) -> int:
    """Bytes per token and word: logits, their logarithms and their gradient, copies in bfloat16."""
    return 3 * _FP32 + (2 * _BF16 if demand.precision == "bf16" else 0)


def _block_bytes(demand: TrainingDemand, *, on_gpu: bool) -> int:
    """Bytes per token that one block keeps for its backward pass."""
    layer = demand.layer
    if demand.precision == "fp32":
        norms = 6 * layer.hidden
        attention = 2 * (layer.query + layer.key)
        return _FP32 * (norms + attention + 4 * layer.intermediate)
    norms = 4 * layer.hidden * _FP32
    inputs = 5 * layer.hidden  # autocast makes one bfloat16 copy per linear layer
    attention = 4 * (layer.query + layer.key)
    # The CPU path keeps the causal half of the scores; fused kernels on GPUs keep none.
    visible = min(demand.attention_span, (demand.seq_len + _BLOCK_QUERIES) // 2)
    scores = 0 if on_gpu else layer.num_heads * visible
    return norms + _BF16 * (inputs + attention + scores + 4 * layer.intermediate)
