import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from cluster.errors import ConfigError, IntegrityError, StorageError
from jobs.training.checkpoint import Checkpoints, list_checkpoints, newest_checkpoint
from jobs.training.run_folder import remove_unfinished
from jobs.training.world import World


def _checkpoints(folder: Path, *, is_async: bool = False, seed: int = 0) -> Checkpoints:
    return Checkpoints(folder, World(), identity={"seed": seed}, num_kept=2, is_async=is_async)


def _tensors(value: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(int(value))
    return {
        "model.weight": torch.randn(5, 3, generator=generator),
        "optimizer.weight.step": torch.tensor(value),
    }


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_restoring_when_there_is_no_checkpoint_starts_at_zero(tmp_path: Path) -> None:
    tensors = _tensors(1)
    assert _checkpoints(tmp_path / "none").restore(tensors) == 0
    assert torch.equal(tensors["model.weight"], _tensors(1)["model.weight"])


@pytest.mark.parametrize("is_async", [False, True])
def test_restoring_when_saved_gives_the_same_bits_in_place(
    tmp_path: Path, group: None, *, is_async: bool
) -> None:
    checkpoints = _checkpoints(tmp_path / "c", is_async=is_async)
    saved = _tensors(7)
    checkpoints.save(7, saved)
    checkpoints.finish()
    target = _tensors(1)
    inner = target["model.weight"]
    assert _checkpoints(tmp_path / "c").restore(target) == 7
    assert target["model.weight"] is inner
    assert all(torch.equal(target[name], tensor) for name, tensor in saved.items())


def test_saving_in_the_background_when_tensors_change_keeps_the_old_values(
    tmp_path: Path, group: None
) -> None:
    checkpoints = _checkpoints(tmp_path, is_async=True)
    tensors = _tensors(7)
    checkpoints.save(7, tensors)
    tensors["model.weight"].zero_()
    checkpoints.finish()
    target = _tensors(1)
    _checkpoints(tmp_path).restore(target)
    assert torch.equal(target["model.weight"], _tensors(7)["model.weight"])


def test_saving_when_more_than_are_kept_removes_the_oldest(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path)
    for step in (5, 10, 15):
        checkpoints.save(step, _tensors(step))
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [10, 15]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


def _files(folder: Path) -> list[str]:
    checkpoints = _checkpoints(folder)
    checkpoints.save(3, _tensors(3))
    checkpoints.save(5, _tensors(5))
    return sorted(path.name for path in (folder / "step-00000005").iterdir())


def test_restoring_when_any_file_has_one_damaged_byte_is_refused(tmp_path: Path) -> None:
    names = _files(tmp_path)
    assert names == [".metadata", "__0_0.distcp", "manifest.json"]
    for name in names:
        path = tmp_path / "step-00000005" / name
        whole = path.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 2):
            damaged = bytearray(whole)
            damaged[position] ^= 0x10
            path.write_bytes(damaged)
            with pytest.raises(IntegrityError, match=r"To go on from step 3 instead, delete"):
                _checkpoints(tmp_path).restore(_tensors(1))
        path.write_bytes(whole)
    assert _checkpoints(tmp_path).restore(_tensors(1)) == 5


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json"])
def test_restoring_when_a_file_is_missing_is_refused(tmp_path: Path, name: str) -> None:
    _files(tmp_path)
    (tmp_path / "step-00000005" / name).unlink()
    with pytest.raises(IntegrityError, match="newest checkpoint is damaged"):
        newest_checkpoint(tmp_path)


def test_restoring_when_a_folder_was_renamed_is_refused(tmp_path: Path) -> None:
    _files(tmp_path)
    (tmp_path / "step-00000005").rename(tmp_path / "step-00000009")
    with pytest.raises(IntegrityError, match="another checkpoint than its name says"):
        newest_checkpoint(tmp_path)


def test_restoring_when_the_config_is_another_says_what_changed(tmp_path: Path) -> None:
    _files(tmp_path)
    with pytest.raises(ConfigError, match=r"`seed` was 0 and is now 4.*another `name`"):
        _checkpoints(tmp_path, seed=4).restore(_tensors(1))


def test_restoring_when_a_save_was_cut_off_takes_the_last_whole_one(tmp_path: Path) -> None:
    _files(tmp_path)
    unfinished = tmp_path / ".step-00000008.writing.tmp"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"half")
    assert _checkpoints(tmp_path).restore(_tensors(1)) == 5
    remove_unfinished(tmp_path)
    assert not unfinished.exists()


def test_saving_when_the_folder_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"writing .* failed") as caught:
        _checkpoints(tmp_path / "file").save(1, _tensors(1))
    assert caught.value.__cause__.errno == errno.ENOTDIR  # type: ignore[union-attr]
