"""One set of random weights in every format that a contender reads.

Takes a shape; gives directories under .bench/models/, made once: dense bfloat16, our compressed
formats, OpenVINO's exports and GGUF files. Random weights cost what trained ones cost.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from cluster.errors import ConfigError
from cluster.storage import staged_directory
from jobs.compression.packing import copy_companions, save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import DataConfig, DecoderConfig, Recipe, Step
from jobs.data.corpus import training_texts
from jobs.data.tokenizer import train_tokenizer
from jobs.models import decoder

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / ".bench"
_TOKENIZER_BYTES = 20_000_000

# The model of the project's published figures: Llama shape, 387 million parameters.
REFERENCE = DecoderConfig(
    vocab_size=32_768,
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    max_seq_len=2048,
    tie_embeddings=True,
)
SMALL = REFERENCE.replace(
    vocab_size=8192, hidden_size=512, intermediate_size=1536, num_layers=6, num_heads=8
)
_RECIPES = {
    "w8a8": {"scheme": "w8a8"},
    "w4a8": {"scheme": "w4a8", "group_size": 32},
}


class Models:
    """The formats of one shape's weights, each made when it is first asked for."""

    def __init__(self, config: DecoderConfig, *, has_tokenizer: bool = True) -> None:
        self._config, self._has_tokenizer = config, has_tokenizer
        digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12]
        self._folder = BENCH / "models" / digest

    def dense(self) -> Path:
        """Return the dense bfloat16 directory, with a tokenizer if there is one."""
        return self._made("dense", self._make_dense)

    def compressed(self, scheme: str, *, has_head: bool = True) -> Path:
        """Return our directory of one scheme: round-to-nearest, with or without the head.

        vLLM does not load a quantized head.
        """
        name, targets = (scheme, ("*", "lm_head")) if has_head else (f"{scheme}-blocks", ("*",))
        step = Step(method="rtn", options=_RECIPES[scheme], targets=targets)
        return self.applied(name, Recipe(steps=(step,)))

    def applied(self, name: str, recipe: Recipe) -> Path:
        """Return our directory of what a recipe without text makes; one name, one recipe."""
        return self._made(name, lambda path: self._compress(recipe, path))

    def openvino(self, weight_format: str) -> Path:
        """Return an OpenVINO export: int8 per channel, or int4 in groups."""
        return self._made(f"openvino-{weight_format}", lambda p: self._export(weight_format, p))

    def gguf(self, kind: str) -> Path:
        """Return a GGUF file of Q8_0 or Q4_0."""
        return self._made(f"gguf-{kind}", lambda path: self._to_gguf(kind, path)) / "model.gguf"

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        path = self._folder / name
        if not path.exists():
            print(f"making {path.relative_to(ROOT)}", flush=True)
            with staged_directory(path, {"kind": "model"}) as staged:
                make(staged)
        return path

    def _make_dense(self, path: Path) -> None:
        decoder.save(decoder.build(self._config, seed=0), path)
        if not self._has_tokenizer:
            return
        texts = training_texts(DataConfig(source="stdlib"), _TOKENIZER_BYTES)
        train_tokenizer(texts, self._config.vocab_size, path)

    def _compress(self, recipe: Recipe, path: Path) -> None:
        save_compressed(apply_recipe(decoder.load(self.dense()), recipe), path)
        copy_companions(self.dense(), path)

    def _export(self, weight_format: str, path: Path) -> None:
        command = ["optimum-cli", "export", "openvino", "--model", str(self.dense())]
        command += ["--task", "text-generation-with-past", "--weight-format", weight_format]
        if weight_format == "int4":
            command += ["--sym", "--group-size", "128", "--ratio", "1.0"]
        run_in("openvino", [*command, str(path)])

    def _to_gguf(self, kind: str, path: Path) -> None:
        command = ["python", "-m", "benchmarks.peers.to_gguf", str(self.dense())]
        run_in("llama_cpp", [*command, str(path / "model.gguf"), "--type", kind])


def interpreter(environment: str) -> Path:
    """Return a peer's Python. Raises ConfigError if it was not built."""
    path = BENCH / environment / "bin" / "python"
    if not path.exists():
        raise ConfigError(f"{path} does not exist. Run `make bench-peers` to build the peers.")
    return path


def run_in(environment: str, command: list[str]) -> str:
    """Run a command of a peer's environment; return its output, or raise ConfigError with it."""
    folder = interpreter(environment).parent
    done = subprocess.run(
        [str(folder / command[0]), *command[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{folder}:{os.environ['PATH']}"},
        check=False,
    )
    if done.returncode != 0:
        raise ConfigError(
            f"{json.dumps(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout
