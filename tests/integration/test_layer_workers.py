"""Layers compressed by Ray tasks on a real local cluster: bitwise what one process gives."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from local_head import local_head

from cluster.session import Session
from cluster.storage import staged_directory, verify_directory
from jobs.config import DecoderConfig
from jobs.data.tokens import open_split
from jobs.models.decoder import build, save

pytestmark = pytest.mark.ray

DECODER = DecoderConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
)
STEPS = [
    {"method": "sparsegpt", "options": {"pattern": "2:4"}},
    {"method": "awq", "targets": ["*mlp*"]},
    {"method": "gptq", "options": {"scheme": "w4a16", "group_size": 32}},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A folder with a dense model of the prepared text's tokenizer."""
    folder = tmp_path_factory.mktemp("workers")
    vocab_size = open_split(tiny_data, "train").vocab_size
    with staged_directory(folder / "model", {"kind": "model"}) as staging:
        save(build(DECODER.replace(vocab_size=vocab_size), seed=0), staging)
        shutil.copyfile(tiny_data / "tokenizer" / "tokenizer.json", staging / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def session(home: Path) -> Iterator[Session]:
    with local_head(home, "workers") as running:
        yield running


def compress(
    session: Session,
    home: Path,
    data: Path,
    workers: int,
    steps: list[dict[str, object]] = STEPS,
    num_sequences: int = 16,
) -> "subprocess.CompletedProcess[str]":
    config = {
        "model": "model",
        "output": f"workers-{workers}",
        "recipe": {"steps": steps},
        "calibration": {"data": str(data), "num_sequences": num_sequences, "seq_len": 32},
        "workers": workers,
    }
    path = home / f"workers-{workers}.yaml"
    path.write_text(yaml.safe_dump(config))
    return subprocess.run(
        [sys.executable, "-m", "jobs.compress", "--config", str(path), "--json"],
        env={**os.environ, **session.environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_compress_when_ray_tasks_compute_layers_writes_the_same_bytes(
    home: Path, session: Session, tiny_data: Path
) -> None:
    files = []
    for workers in (1, 2):
        done = compress(session, home, tiny_data, workers)
        assert done.returncode == 0, done.stderr
        files.append(verify_directory(Path(json.loads(done.stdout)["model"]))["files"])
    assert files[0] == files[1]
    tasks = session.request("/api/v0/tasks?limit=1000&detail=0", timeout_s=20)
    names = [task["name"] for task in tasks["data"]["result"]["result"]]
    # Two blocks of seven layers, before the scaling and after it.
    assert names.count("_change") == 2 * 2 * 7


def test_compress_when_a_layer_fails_in_a_ray_task_says_which_and_leaves_nothing(
    home: Path, session: Session, tiny_data: Path
) -> None:
    steps: list[dict[str, object]] = [
        {"method": "sparsegpt", "options": {"sparsity": 0.5, "damping": 1e-30}}
    ]
    # Of 64 inputs, 64 tokens that repeat themselves leave some undetermined.
    done = compress(session, home, tiny_data, 3, steps, num_sequences=2)
    assert done.returncode == 2
    assert (
        "step 1 (sparsegpt), `model.layers.0.self_attn.q_proj`: the inputs' Hessian" in done.stderr
    )
    assert not (home / "workers-3").exists()
