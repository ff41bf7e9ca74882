"""Checkpoints of a run: whole or absent, checked before they are read.

Takes named tensors and a step; gives `step-00000100/` folders through torch.distributed.checkpoint,
so that another number of workers can read them. Every worker calls `save` and `restore`; the first
one publishes: temporary name, digests, fsync, rename, manifest last. It does not know what the
tensors mean.

The metadata of torch.distributed.checkpoint is pickled, so nothing is read before its digest
matches. On accelerators tensors are copied to memory first and written while training goes on; on
CPUs the writer would only compete with training for the same cores.
"""

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from cluster.errors import IntegrityError, ModelFormatError, StorageError
from cluster.storage import (
    library_storage_errors,
    staged_directory,
    storage_errors,
    verify_directory,
)
from jobs.training.run_folder import check_identity
from jobs.training.world import World

CHECKPOINT_KIND = "checkpoint"
_FOLDER_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint, and what a run must share with it to go on from it."""

    path: Path
    step: int
    identity: dict[str, Any] = field(default_factory=dict)


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the published checkpoints of a run, oldest first, unread and unchecked."""
    if not folder.is_dir():
        return []
    matches = ((path, _FOLDER_NAME.fullmatch(path.name)) for path in folder.iterdir())
    found = [Checkpoint(path, int(match[1])) for path, match in matches if match]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint after checking every byte of it; None if there is none.

    Raises IntegrityError naming the file that is damaged. An older checkpoint is never taken in
    its place: that is for a person to decide.
    """
    found = list_checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        manifest = verify_directory(newest.path)
        if manifest.get("kind") != CHECKPOINT_KIND or manifest.get("step") != newest.step:
            raise IntegrityError(f"{newest.path} holds another checkpoint than its name says.")
    except (IntegrityError, ModelFormatError) as error:
        earlier = f"step {found[-2].step}" if len(found) > 1 else "the beginning"
        raise IntegrityError(
            f"the newest checkpoint is damaged: {error.message} "
            f"To go on from {earlier} instead, delete {newest.path}."
        ) from error
    return replace(newest, identity=manifest["identity"])


class Checkpoints:
    """Saves and restores one run's tensors."""

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        identity: Mapping[str, Any],
        num_kept: int,
        is_async: bool,
    ) -> None:
        """`identity` is what a run must share with the checkpoint it goes on from."""
        self._folder = folder
        self._world = world
        self._identity = dict(identity)
        self._num_kept = num_kept
        self._is_async = is_async and distributed.is_initialized()
        self._pending: tuple[Future[Any], int] | None = None
        # A group of its own, so that writing beside training cannot mix up their messages.
        self._group = distributed.new_group(backend="gloo") if is_async and world.size > 1 else None

    def restore(self, tensors: dict[str, Tensor]) -> int:
        """Read the newest checkpoint into `tensors` in place and return its step, or 0.

        Raises IntegrityError if it is damaged, ConfigError if it belongs to another config.
        """
        newest = newest_checkpoint(self._folder)
        if newest is None:
            return 0
        check_identity(newest.identity, self._identity, newest.path)
        with _single_process_is_intended():
            load(dict(tensors), checkpoint_id=newest.path)
        return newest.step

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Write the tensors as the checkpoint of `step`, in the background where that pays."""
        self.finish()
        staging = self._staging(step)
        if self._world.is_first:
            with storage_errors(f"writing {staging}"):
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
        self._world.barrier()
        writer = FileSystemWriter(staging, sync_files=False)
        with _write_errors(staging):
            if self._is_async:
                future = async_save(tensors, storage_writer=writer, process_group=self._group)
                assert isinstance(future, Future), "the default stager copies before it returns"
                self._pending = (future, step)
                return
            with _single_process_is_intended():
                save(tensors, storage_writer=writer)
        self._publish(step)

    def poll(self) -> None:
        """Publish a background checkpoint that is complete; does not wait."""
        if self._pending is not None and self._pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for a background checkpoint and publish it."""
        if self._pending is None:
            return
        future, step = self._pending
        self._pending = None
        with _write_errors(self._staging(step)):
            future.result()
        self._publish(step)

    def _publish(self, step: int) -> None:
        if not self._world.is_first:
            return
        staging = self._staging(step)
        target = self._folder / f"step-{step:08d}"
        manifest = {"kind": CHECKPOINT_KIND, "step": step, "identity": self._identity}
        with staged_directory(target, manifest, replace=True) as folder:
            for path in staging.iterdir():
                path.rename(folder / path.name)
        staging.rmdir()
        for old in list_checkpoints(self._folder)[: -self._num_kept]:
            _remove(old)

    def _staging(self, step: int) -> Path:
        return self._folder / f".step-{step:08d}.writing.tmp"


@contextmanager
def _single_process_is_intended() -> Iterator[None]:
    """Silence the warning that there is no process group: one worker needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turn what torch.distributed.checkpoint wraps back into StorageError; leave no half behind."""
    try:
        with library_storage_errors(f"writing {path}", path):
            try:
                yield
            except CheckpointException as error:
                causes = [failure for failure, _ in error.failures.values()]
                raise next((c for c in causes if isinstance(c, OSError)), causes[0]) from error
    except StorageError:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _remove(checkpoint: Checkpoint) -> None:
    """Delete a checkpoint; renamed first, so that a kill leaves no half under its name."""
    doomed = checkpoint.path.with_name(f".{checkpoint.path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
