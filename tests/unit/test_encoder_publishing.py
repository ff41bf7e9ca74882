"""An encoder on its way into the registry: compressed, judged beside its origin, published."""

import pytest
import torch

from cluster.errors import ConfigError, DataError, GateRefusedError
from jobs.compress import compress
from jobs.config import CompressConfig, EvaluateConfig, GateConfig, PublishConfig, Recipe, Step
from jobs.data.tokenizer import train_tokenizer
from jobs.evaluate import JOB
from jobs.evaluation.encoders import evaluate_encoder, judge_distances
from jobs.models.encoder import EncoderConfig, build, save
from jobs.publish import publish
from serving.engines.native import create

SHAPE = EncoderConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    max_seq_len=48,
    initializer_range=0.1,
)
W8A8 = Recipe(steps=(Step(method="rtn", options={"scheme": "w8a8"}),))
LIMITS = GateConfig(eval_sequences=8, max_size_ratio=0.9)


@pytest.fixture
def folder(tmp_path):
    base = tmp_path / "base"
    train_tokenizer(["def read_file(path): return path\n" * 20], 300, base)
    save(build(SHAPE, seed=1), base)
    compress(CompressConfig(model=str(base), output=str(tmp_path / "small"), recipe=W8A8))
    lines = [f"def read_{n}(path): return {n}" for n in range(12)]
    (tmp_path / "inputs.txt").write_text("\n\n".join(lines))
    return tmp_path


def config(folder, **changes):
    values = {"model": "small", "base": "base", "data": "inputs.txt"}
    paths = {key: str(folder / name) for key, name in values.items()}
    return EvaluateConfig(**{**paths, "gate": LIMITS, "record": True, **changes})


def test_encoder_when_judged_close_is_published_and_served(folder):
    found = evaluate_encoder(config(folder))
    assert found.verdict.passed, found.verdict.reasons
    assert 0 < found.verdict.numbers["cosine_distance_max"] < 1e-3
    entry = publish(folder / "small", PublishConfig(registry=str(folder / "r"), name="tiny"))
    engine = create(entry.path, {})
    engine.close()
    assert (engine.info().task, entry.metrics["num_sequences"]) == ("embed", 8)


def test_encoder_when_too_far_is_refused_with_the_number(folder):
    gate = LIMITS.replace(max_cosine_distance=1e-9)
    assert "the farthest vector" in str(JOB.run(config(folder, gate=gate))["reasons"])
    with pytest.raises(GateRefusedError, match="farthest"):
        publish(folder / "small", PublishConfig(registry=str(folder / "r"), name="tiny"))


def test_evaluate_when_planned_names_the_inputs(folder):
    assert ("inputs", "the first 8") in JOB.plan(config(folder))


def test_evaluate_when_inputs_are_too_few_says_how_many(folder):
    with pytest.raises(ConfigError, match="has 12 lines"):
        evaluate_encoder(config(folder, gate=LIMITS.replace(eval_sequences=13)))


def test_evaluate_when_data_is_no_text_is_refused(folder):
    with pytest.raises(DataError, match="nothing"):
        evaluate_encoder(config(folder, data=str(folder / "nothing")))


@pytest.mark.parametrize("distances", [[0.0, float("nan")], [0.0, 0.01]])
def test_judge_when_one_vector_is_off_refuses(distances):
    assert not judge_distances(torch.tensor(distances), (50, 100), LIMITS).passed


def test_judge_when_the_model_is_not_smaller_refuses():
    limits = LIMITS.replace(max_size_ratio=2.0)
    assert not judge_distances(torch.zeros(3), (100, 100), limits).passed
