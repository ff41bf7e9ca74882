"""What a run reports: a line for every step, TensorBoard events, the share of peak.

Takes measurements; gives `metrics.jsonl` and event files that hold each step once, also after a
resume. It does not know how the measurements came about.
"""

import logging
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.tensorboard import SummaryWriter

from cluster import hardware
from cluster.storage import storage_errors
from jobs.config import DecoderConfig
from jobs.training.metrics_file import METRICS_FILE, as_lines, cut_back
from jobs.training.outcome import StepMetrics
from jobs.training.precision import Computed
from jobs.training.world import World

_logger = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"


def flops_per_token(config: DecoderConfig, num_parameters: int, seq_len: int) -> float:
    """Return the floating point operations to train on one token.

    Six per weight that multiplies (Kaplan et al. 2020), and attention's products over the causal
    half of the sequence. Looking up an embedding multiplies nothing; a tied one still does, as the
    head.
    """
    if not config.tie_embeddings:
        num_parameters -= config.vocab_size * config.hidden_size
    reach = min(seq_len / 2, config.sliding_window or math.inf)
    attention_width = config.num_heads * config.resolved_head_dim
    return 6.0 * num_parameters + 12.0 * config.num_layers * attention_width * reach


def peak_flops_per_s(precision: Computed, device: torch.device, world: World) -> float | None:
    """Return the dense peak of all workers together: their threads' cores, or their GPUs.

    None for a GPU that the catalogue does not know; that is logged as a warning.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        accelerator = hardware.load_catalogue().match(name)
        if accelerator is None:
            _logger.warning("%s is not in cluster/hardware.yaml: no share of peak is shown", name)
            return None
        return hardware.peak_flops(accelerator, precision, world.size)
    cores = world.size * torch.get_num_threads()
    return hardware.peak_flops(hardware.detect_cpu(), precision, cores)


class MetricsLog:
    """Writes a run's metrics; opened at the step the run goes on from."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self._path = run_dir / METRICS_FILE
        kept = cut_back(run_dir, start_step)
        self.last_loss = next((e["loss"] for e in reversed(kept) if "loss" in e), math.nan)
        with storage_errors(f"writing metrics to {run_dir}"):
            self._file = self._path.open("a", encoding="utf-8")
            self._events = SummaryWriter(
                str(run_dir / TENSORBOARD_FOLDER), purge_step=start_step + 1
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        self._events.close()

    def step(self, metrics: StepMetrics) -> None:
        """Record one step."""
        self.last_loss = metrics.loss
        self._record(metrics.step, metrics.model_dump(exclude={"step"}), "train")

    def validation(self, step: int, loss: float) -> None:
        """Record a validation loss; a step that is validated again after a resume replaces it."""
        self._record(step, {"validation_loss": loss}, "validation")

    def _record(self, step: int, values: dict[str, Any], tag: str) -> None:
        with storage_errors(f"writing {self._path}"):
            self._file.writelines(as_lines([{"step": step, **values}]))
            self._file.flush()
            for name, value in values.items():
                if value is None:
                    continue
                self._events.add_scalar(f"{tag}/{name.removeprefix('validation_')}", value, step)
