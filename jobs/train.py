"""Train a model: `python -m jobs.train --config f.yaml [--set a.b=c] [--dry-run] [--json]`."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.config import TrainConfig
from jobs.entry import Job, run_job
from jobs.training.launch import launch, plan_rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    job = Job("train", "Train a model.", TrainConfig, plan_rows, _run)
    return run_job(job, argv)


def _run(config: TrainConfig) -> Mapping[str, Any]:
    return launch(config).model_dump(mode="json")


if __name__ == "__main__":
    sys.exit(main())
