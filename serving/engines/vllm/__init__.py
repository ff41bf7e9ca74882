"""vLLM behind our protocol: for GPUs, and for CPUs where its CPU build is installed."""

from serving.engines.vllm.config import VllmConfig
from serving.engines.vllm.loading import create

__all__ = ["VllmConfig", "create"]
