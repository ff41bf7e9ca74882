import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError, ModelFormatError
from jobs.config import DecoderConfig, ModelConfig, ScalingConfig, TrainConfig
from jobs.models import _hf
from jobs.models import decoder as decoder_module
from jobs.plan import count_matmul_parameters, count_parameters, training_demand

SHAPES: list[dict[str, Any]] = [
    {},
    {"shape": "qwen2", "tie_embeddings": False},
    {"shape": "qwen3", "head_dim": 48},
    {"shape": "mistral", "sliding_window": 64, "num_kv_heads": 4},
]


@pytest.mark.parametrize("values", SHAPES, ids=lambda values: values.get("shape", "llama"))
def test_count_parameters_equals_the_built_model(values: dict[str, Any]) -> None:
    config = DecoderConfig(hidden_size=64, intermediate_size=96, num_layers=2, **values)
    model = decoder_module.build(config, seed=0)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    linears = sum(
        module.weight.numel()
        for module in model.modules()
        if type(module).__name__ == "Linear"
    )  # fmt: skip
    assert count_matmul_parameters(config) == linears


def test_demand_follows_the_configuration() -> None:
    config = TrainConfig(
        name="t",
        scaling=ScalingConfig(num_workers=2, cpus_per_worker=0.5),
        global_batch_size=32,
        max_steps=10,
        eval_every_steps=5,
        eval_sequences=4,
    )
    demand = training_demand(config)
    assert demand.tokens_per_step == 32 * 256
    assert demand.eval_tokens == 3 * 4 * 256
    assert (demand.num_workers, demand.cpus_per_worker) == (2, 0.5)
    assert demand.attention_span == demand.seq_len == 256


def test_demand_when_window_is_narrower_than_the_sequence_sees_the_window() -> None:
    model = ModelConfig(decoder=DecoderConfig(shape="mistral", sliding_window=32))
    assert training_demand(TrainConfig(name="t", model=model)).attention_span == 32


def test_demand_when_starting_from_a_directory_reads_its_shape(tmp_path: Path) -> None:
    shape = DecoderConfig(hidden_size=64, intermediate_size=96, num_layers=3)
    (tmp_path / "config.json").write_text(json.dumps(_hf.to_hf_config(shape)), encoding="utf-8")
    demand = training_demand(TrainConfig(name="t", model=ModelConfig(init_from=str(tmp_path))))
    assert demand.num_layers == 3
    assert demand.parameters == count_parameters(shape)


def test_demand_when_the_directory_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="config"):
        training_demand(TrainConfig(name="t", model=ModelConfig(init_from=str(tmp_path))))


def test_demand_when_sequences_exceed_the_directorys_positions_is_refused(tmp_path: Path) -> None:
    shape = DecoderConfig(max_seq_len=64)
    (tmp_path / "config.json").write_text(json.dumps(_hf.to_hf_config(shape)), encoding="utf-8")
    with pytest.raises(ConfigError, match="seq_len=256 exceeds the 64 positions"):
        training_demand(TrainConfig(name="t", model=ModelConfig(init_from=str(tmp_path))))


def test_demand_when_the_directory_is_relative_starts_from_the_folder_of_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = DecoderConfig(num_layers=3)
    (tmp_path / "dense").mkdir()
    document = json.dumps(_hf.to_hf_config(shape))
    (tmp_path / "dense" / "config.json").write_text(document, encoding="utf-8")
    monkeypatch.setenv("RAYSMITH_HOME", str(tmp_path))
    demand = training_demand(TrainConfig(name="t", model=ModelConfig(init_from="dense")))
    assert demand.num_layers == 3


def test_planning_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, jobs.plan, cluster.planner, cluster.session; "
        "heavy = {'torch', 'ray', 'transformers', 'fastapi'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
