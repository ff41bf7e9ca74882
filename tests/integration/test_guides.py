"""The guides, word for word where no cluster is needed: their `bash` blocks, over a tiny model."""

import random
import re
import shlex
from pathlib import Path

import pytest
import yaml

import raysmith
from cluster.storage import staged_directory
from jobs.config import DecoderConfig, TrainConfig
from jobs.data.prepare import prepare
from jobs.data.tokenizer import train_tokenizer
from jobs.models.decoder import build, save
from jobs.registry import Registry

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
SHAPE = DecoderConfig(vocab_size=300, hidden_size=128, intermediate_size=384, num_layers=3)
WORDS = ("def", "return", "value", "for", "index", "in", "range", "print", "(", ")")


def blocks(page: Path, kind: str) -> list[str]:
    """Return the code blocks of a kind, in order."""
    pattern = re.compile(rf"^```{kind}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return pattern.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[list[str]]:
    """Return the words of every command in the `bash` blocks."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with `models/mine` and `texts`; paths start from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYSMITH_HOME", raising=False)
    generator = random.Random(0)
    (tmp_path / "texts").mkdir()
    for number in range(300):
        text = " ".join(generator.choices(WORDS, k=2000))
        (tmp_path / "texts" / f"{number:03d}.txt").write_text(f"{number} {text}\n")
    train_tokenizer([" ".join(WORDS)], 300, tmp_path / "models" / "mine")
    save(build(SHAPE, seed=0), tmp_path / "models" / "mine")
    return tmp_path


def test_guide_to_your_own_model_when_followed_publishes_it(folder: Path):
    page = GUIDES / "your-own-model.md"
    (config,) = blocks(page, "yaml")
    prepare(TrainConfig.model_validate(yaml.safe_load(config)), folder / "runs" / "mine" / "data")
    for name, *words in commands(page):
        assert name == "raysmith"
        assert raysmith.main(words) == 0
    entry = Registry(folder / "runs" / "registry").resolve("mine@production")
    assert 0 < entry.metrics["size_ratio"] < 0.75


RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"
TRAINED = SHAPE.replace(num_layers=6, num_heads=4, num_kv_heads=2, intermediate_size=640)
QUICK = ("--set", "calibration.num_sequences=4", "--set", "calibration.seq_len=32")


@pytest.fixture
def trained(folder: Path) -> Path:
    """Return the same folder with what a run of stdlib-tiny.yaml leaves, of fewer parameters."""
    values = {
        "name": "stdlib-tiny",
        "model": {"decoder": TRAINED.model_dump(), "init_from": str(folder / "models" / "mine")},
        "data": {"source": "text", "paths": ["texts/*.txt"]},
        "seq_len": 256,
    }
    run = folder / "runs" / "stdlib-tiny"
    with staged_directory(run / "model", {"kind": "model"}) as staging:
        save(build(TRAINED, seed=0), staging)
        tokenizer = folder / "models" / "mine" / "tokenizer.json"
        (staging / tokenizer.name).write_bytes(tokenizer.read_bytes())
    prepare(TrainConfig.model_validate(values), run / "data")
    return folder


def test_guide_to_compression_when_followed_makes_every_model(trained: Path):
    page = GUIDES / "compression.md"
    for block in blocks(page, "yaml"):
        name = block.splitlines()[0].removeprefix("# ")
        (trained / name).write_text(block)
    for name, *words in commands(page):
        assert name == "raysmith"
        if words[0] == "compress" and "calibration" in Path(words[2]).read_text():
            words.extend(QUICK)
        if words[0] == "compress" and "distill" in Path(words[2]).read_text():
            text = Path(words[2]).read_text()
            Path(words[2]).write_text(re.sub(r"num_tokens: \d+", "num_tokens: 4096", text))
        if words[0] == "evaluate":
            words.extend(["--set", "gate.eval_sequences=16"])
        assert raysmith.main(words) == 0, words
    made = {path.name for path in (trained / "runs").iterdir()}
    named = {
        yaml.safe_load(block)["output"].removeprefix("runs/") for block in blocks(page, "yaml")
    }
    assert named | {"tiny-w8a8.gguf", "tiny-gptq.gguf"} <= made


def test_guide_to_searches_when_followed_plans_the_search(trained: Path, capsys):
    page = GUIDES / "search.md"
    (block,) = blocks(page, "yaml")
    (trained / "search.yaml").write_text(block)
    (words,) = commands(page)
    assert raysmith.main(words[1:]) == 0
    printed = capsys.readouterr().out
    assert "24 groups of layers" in " ".join(printed.replace("│", " ").split())
    assert "w3a16 all" in printed


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("compress-*.yaml")))
def test_recipe_when_the_model_was_trained_compresses_it(trained: Path, recipe: str):
    path = RECIPES / f"{recipe}.yaml"
    quick = QUICK if "calibration" in path.read_text() else ()
    assert raysmith.main(["compress", "--config", str(path), *quick]) == 0
    assert (trained / yaml.safe_load(path.read_text())["output"] / "manifest.json").is_file()
