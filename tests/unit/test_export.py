"""`raysmith export`, called as a person would."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
from tiny_models import decoder_config

import raysmith
from cluster.errors import VersionExistsError
from cluster.storage import staged_directory
from jobs.compression.packing import save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import Recipe, Step
from jobs.data.tokens import open_split
from jobs.export import ExportFormat, export_model
from jobs.models.decoder import build


@pytest.fixture
def home(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two models, `w8a8` and `fp8`; paths start from it."""
    monkeypatch.setenv("RAYSMITH_HOME", str(tmp_path))
    config = decoder_config(vocab_size=open_split(tiny_data, "train").vocab_size)
    for scheme in ("w8a8", "fp8"):
        recipe = Recipe(steps=(Step(method="rtn", options={"scheme": scheme}),))
        with staged_directory(tmp_path / scheme, {"kind": "model"}) as staging:
            save_compressed(apply_recipe(build(config, seed=0), recipe), staging)
            for path in (tiny_data / "tokenizer").iterdir():
                shutil.copyfile(path, staging / path.name)
    return tmp_path


def _export(model: str, kind: str, output: str) -> int:
    return raysmith.main(
        ["export", "--model", model, "--format", kind, "--output", output, "--json"]
    )


@pytest.mark.parametrize(
    ("kind", "embedding"), [("gguf-q8_0", "Q8_0"), ("gguf-q4_0", "Q4_0"), ("gguf-bf16", "BF16")]
)
def test_export_when_it_can_be_expressed_writes_the_file(
    home: Path, capsys: pytest.CaptureFixture[str], kind: str, embedding: str
) -> None:
    assert _export("w8a8", kind, "out/m.gguf") == 0
    values = json.loads(capsys.readouterr().out)
    path = home / "out" / "m.gguf"
    assert values["file"] == str(path)
    assert values["size_bytes"] == path.stat().st_size
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == embedding
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert sum(values["tensors"].values()) == len(kinds)
    assert [each.name for each in path.parent.iterdir()] == ["m.gguf"]


def test_export_when_another_writes_the_same_file_meanwhile_leaves_that_whole(home: Path) -> None:
    target, found = home / "m.gguf", []

    def be_overtaken(done: int, total: int) -> None:
        if done == 2 and not target.exists():
            export_model("w8a8", ExportFormat.GGUF_Q8_0, str(target))
            found.append(target.read_bytes())

    with pytest.raises(VersionExistsError, match="never overwritten"):
        export_model("w8a8", ExportFormat.GGUF_BF16, str(target), progress=be_overtaken)
    assert [target.read_bytes()] == found
    assert not [path.name for path in home.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("model", "kind", "output", "expected"),
    [
        ("w8a8", "gguf-q5_0", "m.gguf", "gguf-q5_0 is none that there is: gguf-bf16, gguf-q8_0"),
        ("w8a8", "gguf-q8_0", "m.bin", "m.bin does not end in .gguf"),
        ("w8a8", "gguf-q8_0", "taken.gguf", "exists and is never overwritten"),
        ("nowhere", "gguf-q8_0", "m.gguf", "nowhere"),
        ("fp8", "gguf-q8_0", "m.gguf", "is FP8, which GGUF does not have"),
    ],
)
def test_export_when_input_is_wrong_says_so_and_leaves_nothing(
    home: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    kind: str,
    output: str,
    expected: str,
) -> None:
    (home / "taken.gguf").touch()
    before = {path.name for path in home.iterdir()}
    assert _export(model, kind, output) == 2
    assert expected in capsys.readouterr().err
    assert {path.name for path in home.iterdir()} == before
