"""`python -m jobs.search --config f.yaml`: search the smallest model that passes the gate."""

import sys
from collections.abc import Sequence

from jobs.config import SearchConfig
from jobs.entry import Job, run_job
from jobs.search.launch import run_search
from jobs.search.plan import plan_rows

JOB = Job(
    name="search",
    help="Search the smallest compressed model that passes the gate.",
    config=SearchConfig,
    plan=plan_rows,
    run=lambda config: run_search(config).summary(),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a search; return the exit code."""
    return run_job(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
