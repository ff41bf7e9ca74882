"""The searches that are benchmarked: the subject's layers one by one, in five formats."""

from pathlib import Path
from typing import Any

from benchmarks.compression.subject import SEQ_LEN, Subject
from jobs.config import GateConfig, Rung, SearchConfig

SCHEMES = ("bf16", "w8a8", "w4a16", "w4a8", "w3a16")


def search_config(subject: Subject, output_dir: Path, **changes: Any) -> SearchConfig:
    """Return the search over a subject, its seed the subject's.

    Up to 1% more perplexity is of interest: int3 everywhere, rounded to the nearest, costs about
    that. All 18 recipes are measured with real kernels: on a model this small, writing and running
    one takes little longer than rounding weights in memory.
    """
    values: dict[str, Any] = {
        "name": f"seed-{subject.seed}",
        "output_dir": str(output_dir),
        "model": str(subject.model),
        "data": str(subject.data),
        "seq_len": SEQ_LEN,
        "schemes": SCHEMES,
        "granularity": "fused",
        "layers_per_group": 1,
        "probe_sequences": 2,
        "num_trials": 18,
        "generations": 3,
        "rungs": (Rung(eval_sequences=48, keep_ratio=1.0, real=True),),
        "gate": GateConfig(max_perplexity_increase=0.01, max_size_ratio=0.7, require_faster=False),
        "seed": subject.seed,
    }
    return SearchConfig.model_validate({**values, **changes})
