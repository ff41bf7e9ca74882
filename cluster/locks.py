"""A lock between processes that the system frees when its holder ends, however it ends.

Takes a file; gives a block that one process at a time is in. It does not know what is protected.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import RaysmithError
from cluster.storage import storage_errors


@contextmanager
def exclusive(
    path: Path,
    what: str,
    error: type[RaysmithError],
    *,
    timeout_s: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[None]:
    """Hold a lock file. Raises `error` if another process does for `timeout_s`: `what` runs there.

    Locks of files on network storage hold only where the storage supports them (flock).
    """
    with storage_errors(f"locking {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        deadline = clock() + timeout_s
        while not _try_lock(file.fileno()):
            if clock() >= deadline:
                file.seek(0)
                raise error(
                    f"another process ({file.read().strip() or 'unknown'}) runs {what} in "
                    f"{path.parent}. Wait for it, end it, or choose another `name`."
                )
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
