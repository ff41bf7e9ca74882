"""Submit a thin main through Ray's job API, as `ray job submit --working-dir .` does.

Takes the name of a job and its arguments; gives the job's exit code. The current folder travels
with the job, less what .gitignore names.
"""

import asyncio
import re
import shlex
import sys
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.errors import ClusterError, ConfigError
from cluster.session import Session, job_client
from jobs.entry import INTERRUPTED

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_RAYS_OWN = re.compile(r"\d{4}-\d\d-\d\d |\x1b\[\d+m\(|Running entrypoint |\s*$")
JOBS = ("train", "search", "compress", "evaluate", "publish", "pipeline")
_MODULES = {**{job: f"jobs.{job}" for job in JOBS}, "promote": "serving.promote"}


def entrypoint(job: str, arguments: Sequence[str]) -> str:
    """Return the shell command of a job; raises ConfigError if there is no such job."""
    if job not in _MODULES:
        raise ConfigError(f"no job `{job}`; there are: {', '.join(_MODULES)}.")
    return shlex.join(["python", "-m", _MODULES[job], *arguments])


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
    try:
        asyncio.run(_follow(client, submission_id))
    except KeyboardInterrupt:
        sys.stderr.write(
            f"{submission_id} goes on. Follow it with `ray job logs --follow {submission_id}`, end "
            f'it with `ray job stop {submission_id}` (after `eval "$(raysmith env)"`).\n'
        )
        return INTERRUPTED
    status = client.get_job_status(submission_id)
    sys.stderr.write(f"{submission_id} {status.value}\n")
    return 0 if status.value == "SUCCEEDED" else 1


def is_rays_own(line: str) -> bool:
    """Return whether a line of a job's log is Ray speaking of itself, or empty."""
    return _RAYS_OWN.match(line) is not None


async def _follow(client: "JobSubmissionClient", submission_id: str) -> None:
    shown = ""
    async for lines in client.tail_job_logs(submission_id):
        shown += lines
        _show(lines)
    # Following ends with the job, and may miss the last lines, which say why.
    whole = client.get_job_logs(submission_id)
    if whole.startswith(shown):
        _show(whole[len(shown) :])


def _show(lines: str) -> None:
    kept = (line for line in lines.splitlines(keepends=True) if not is_rays_own(line))
    sys.stderr.writelines(kept)
    sys.stderr.flush()
