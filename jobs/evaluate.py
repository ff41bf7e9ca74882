"""`python -m jobs.evaluate --config f.yaml`: measure a model beside its origin and judge it."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.config import EvaluateConfig
from jobs.entry import Job, Rows, run_job
from jobs.evaluation.compare import evaluate, plan_rows
from jobs.evaluation.encoders import compares_encoders, evaluate_encoder, plan_encoder_rows


def _plan(config: EvaluateConfig) -> Rows:
    return plan_encoder_rows(config) if compares_encoders(config) else plan_rows(config)


def _run(config: EvaluateConfig) -> Mapping[str, Any]:
    if compares_encoders(config):
        return evaluate_encoder(config).summary()
    return evaluate(config).summary()


JOB = Job(
    name="evaluate",
    help="Measure a model beside the dense one it came from, and judge it.",
    config=EvaluateConfig,
    plan=_plan,
    run=_run,
    refusal=lambda values: None if values["passed"] else "the gate refused the model",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a model; return the exit code."""
    return run_job(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
