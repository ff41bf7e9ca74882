"""A disk that is really full: a small tmpfs in a mount namespace of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not can_mount(), reason="may not mount a tmpfs here")

SAVE_MODEL = """
import sys
from pathlib import Path
from cluster.errors import StorageError
from cluster.storage import staged_directory
from jobs.config import DecoderConfig
from jobs.models import decoder

folder = Path(sys.argv[1])
model = decoder.build(DecoderConfig(num_layers=2), seed=0)
try:
    with staged_directory(folder / "model", {"kind": "model"}) as staging:
        decoder.save(model, staging)
except StorageError as error:
    print(error)
print(sorted(path.name for path in folder.iterdir()))
"""

SAVE_CHECKPOINT = """
import sys
import warnings
from pathlib import Path
from cluster.errors import RaysmithError
from jobs.config import DecoderConfig, ModelConfig, TokenizerConfig, TrainConfig, DataConfig
from jobs.data.prepare import prepare
from jobs.training.loop import run
from jobs.training.world import World

folder = Path(sys.argv[1])
config = TrainConfig(
    name="full",
    output_dir=str(folder),
    model=ModelConfig(decoder=DecoderConfig(vocab_size=512, hidden_size=128, num_layers=4)),
    data=DataConfig(source="text", paths=(sys.argv[2],), num_processes=1),
    tokenizer=TokenizerConfig(vocab_size=512),
    seq_len=32, global_batch_size=2, micro_batch_size=2, max_steps=8, precision="fp32",
    checkpoint_every_steps=2, eval_every_steps=8, eval_sequences=1,
)
try:
    data = prepare(config, folder / "full" / "data")
    run(config, data.folder, folder / "full", World(0, 1), lambda step: None)
except RaysmithError as error:
    print(type(error).__name__, error)
print(sorted(path.name for path in (folder / "full" / "checkpoints").glob("*")))
"""


def on_full_disk(script: str, tmp_path: Path, *arguments: str, size: str) -> str:
    """Run a script whose folder has `size` bytes in all; return what it printed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = f'mount -t tmpfs -o size={size} tmpfs "$1" && shift && exec "$@"'
    in_namespace = ["unshare", "-rm", "sh", "-c", command, "sh", str(folder)]
    done = subprocess.run(
        [*in_namespace, sys.executable, "-W", "ignore", "-c", script, str(folder), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_saving_a_model_when_the_disk_is_full_says_so_and_leaves_nothing(tmp_path: Path):
    shown = on_full_disk(SAVE_MODEL, tmp_path, size="3m")
    assert "The disk is full" in shown
    assert shown.strip().endswith("[]")


def test_training_when_the_disk_fills_says_so_and_keeps_no_half_checkpoint(tmp_path: Path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(60):
        lines = (f"def f{number}_{i}(x): return x + {i * number}\n" for i in range(40))
        (text / f"{number}.txt").write_text("".join(lines))
    shown = on_full_disk(SAVE_CHECKPOINT, tmp_path, f"{text}/*.txt", size="10m")
    assert "StorageError" in shown
    assert "The disk is full" in shown
    left = shown.strip().splitlines()[-1]
    assert ".tmp" not in left
