"""`python -m jobs.evaluate --config f.yaml`: measure a model beside its origin and judge it."""

import sys
from collections.abc import Sequence

from jobs.config import EvaluateConfig
from jobs.entry import Job, run_job
from jobs.evaluation.compare import evaluate, plan_rows

JOB = Job(
    name="evaluate",
    help="Measure a model beside the dense one it came from, and judge it.",
    config=EvaluateConfig,
    plan=plan_rows,
    run=lambda config: evaluate(config).summary(),
    refusal=lambda values: None if values["passed"] else "the gate refused the model",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a model; return the exit code."""
    return run_job(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
