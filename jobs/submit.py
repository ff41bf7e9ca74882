"""Submit a thin main through Ray's job API, as `ray job submit --working-dir .` does.

Takes the name of a job and its arguments; gives the job's exit code. The current folder travels
with the job, less what .gitignore names.
"""

import asyncio
import shlex
import sys
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.errors import ClusterError, ConfigError
from cluster.session import Session, job_client

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

JOBS = ("train", "search", "compress", "evaluate", "publish", "pipeline")


def entrypoint(job: str, arguments: Sequence[str]) -> str:
    """Return the shell command of a job; raises ConfigError if there is no such job."""
    if job not in JOBS:
        raise ConfigError(f"no job `{job}`; there are: {', '.join(JOBS)}.")
    return shlex.join(["python", "-m", f"jobs.{job}", *arguments])


def submit_job(session: Session, job: str, arguments: Sequence[str], *, wait: bool) -> int:
    """Submit a job; with `wait` copy its log to standard error and return 0 if it succeeded.

    The submission id is printed to standard output first, so that scripts can use it.
    """
    command = entrypoint(job, arguments)
    client = job_client(session)
    try:
        submission_id = client.submit_job(
            entrypoint=command,
            submission_id=f"raysmith-{job}-{uuid.uuid4().hex[:8]}",
            runtime_env={"working_dir": "."},
        )
    except RuntimeError as error:
        raise ClusterError(f"the cluster did not take the job `{command}`: {error}") from error
    sys.stdout.write(submission_id + "\n")
    sys.stdout.flush()
    if not wait:
        return 0
    asyncio.run(_follow(client, submission_id))
    status = client.get_job_status(submission_id)
    sys.stderr.write(f"{submission_id} {status.value}\n")
    return 0 if status.value == "SUCCEEDED" else 1


async def _follow(client: "JobSubmissionClient", submission_id: str) -> None:
    async for lines in client.tail_job_logs(submission_id):
        sys.stderr.write(lines)
        sys.stderr.flush()
