"""Encoders against transformers and sentence-transformers, dense and compressed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

from cluster.errors import ModelFormatError, RecipeError
from cluster.storage import read_manifest, verify_directory
from jobs.compress import compress
from jobs.compression.encoders import load_encoder
from jobs.compression.recipe import predicted_bytes
from jobs.config import CompressConfig, Recipe, Step
from jobs.models.encoder import EncoderConfig, build, load, read_config, save

CONFIG = EncoderConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_positions=40,
    max_seq_len=32,
    initializer_range=0.1,
)
INPUTS = [[3, 4, 5, 6], [7], list(range(20)), [9] * 32]
W8A8 = Recipe(steps=(Step(method="rtn", options={"scheme": "w8a8"}),))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save(build(CONFIG, seed=1), tmp_path / "dense", dtype=torch.float32)
    return tmp_path / "dense"


def plain_vectors(model: BertModel, pooling: str = "mean") -> torch.Tensor:
    """Return transformers' hidden states of one input at a time, pooled by hand."""
    vectors = []
    with torch.inference_mode():
        for tokens in INPUTS:
            h_TC = model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
            pooled_C = h_TC[0] if pooling == "cls" else h_TC.mean(dim=0)
            vectors.append(pooled_C / pooled_C.norm())
    return torch.stack(vectors)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_encoder_when_saved_gives_the_vectors_of_transformers(tmp_path, pooling):
    model = build(CONFIG.replace(pooling=pooling), seed=2)
    save(model, tmp_path, dtype=torch.float32)
    theirs = plain_vectors(AutoModel.from_pretrained(tmp_path, dtype=torch.float32), pooling)
    with torch.inference_mode():
        torch.testing.assert_close(load(tmp_path)(INPUTS), theirs, atol=1e-5, rtol=0)
        assert read_config(tmp_path).pooling == pooling


def test_encoder_when_transformers_saved_it_gives_equal_vectors(tmp_path):
    theirs = BertModel(
        BertConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=40,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    with torch.inference_mode():
        ours = load(tmp_path)(INPUTS)
    torch.testing.assert_close(ours, plain_vectors(theirs), atol=1e-5, rtol=0)


def test_encoder_when_inputs_are_batched_equals_each_alone():
    model = build(CONFIG, seed=3)
    with torch.inference_mode():
        alone = torch.cat([model([tokens]) for tokens in INPUTS])
        torch.testing.assert_close(model(INPUTS), alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"hidden_act": "relu"}, "hidden_act"),
        ("config.json", {"architectures": ["RobertaModel"]}, "RobertaModel"),
        ("config.json", {"num_attention_heads": 5}, "num_heads=5"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "max_tokens"),
        ("sentence_bert_config.json", {"max_seq_length": 99}, "max_seq_len=99"),
    ],
)
def test_load_when_an_option_is_not_supported_names_it(directory, name, change, message):
    document = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps({**document, **change}))
    with pytest.raises(ModelFormatError, match=message):
        load(directory)


def test_load_when_a_module_is_not_supported_names_it(directory):
    modules = json.loads((directory / "modules.json").read_text())
    modules.append({"type": "sentence_transformers.models.Dense", "path": "2_Dense"})
    (directory / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelFormatError, match="`Dense`"):
        load(directory)


def test_compress_when_given_an_encoder_writes_one_close_to_it(directory, tmp_path):
    (directory / "tokenizer.json").write_text("{}")
    target = tmp_path / "small"
    compress(CompressConfig(model=str(directory), output=str(target), recipe=W8A8))
    verify_directory(target)
    loaded = load_encoder(target)
    assert set(loaded.schemes.values()) == {"w8a8"}
    assert (target / "tokenizer.json").is_file()
    with torch.inference_mode():
        cosine_N = (loaded.model(INPUTS) * load(directory)(INPUTS)).sum(dim=-1)
    assert cosine_N.min() > 0.999
    stored_bytes = read_manifest(target)["metrics"]["weight_bytes"]
    assert stored_bytes == predicted_bytes(read_config(target), W8A8)
    assert stored_bytes == pytest.approx((target / "model.safetensors").stat().st_size, rel=0.1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compress_when_encoder_is_read_by_transformers_computes_the_same(directory, tmp_path):
    target = tmp_path / "small"
    compress(CompressConfig(model=str(directory), output=str(target), recipe=W8A8))
    theirs = plain_vectors(AutoModel.from_pretrained(target, dtype=torch.float32))
    with torch.inference_mode():
        cosine_N = (load_encoder(target).model(INPUTS) * theirs).sum(dim=-1)
    assert cosine_N.min() > 0.9995


def test_compress_when_target_is_no_layer_of_the_encoder_is_refused(directory, tmp_path):
    step = Step(method="rtn", options={"scheme": "w8a8"}, targets=("*.q_proj",))
    config = CompressConfig(
        model=str(directory), output=str(tmp_path / "small"), recipe=Recipe(steps=(step,))
    )
    with pytest.raises(RecipeError, match="attention"):
        compress(config)


def test_load_encoder_when_dense_equals_the_plain_model(directory):
    loaded = load_encoder(directory, verify=False)
    with torch.inference_mode():
        assert torch.equal(loaded.model(INPUTS), load(directory)(INPUTS))


def test_load_when_weights_are_missing_says_so(directory):
    shutil.move(directory / "model.safetensors", directory / "other.safetensors")
    with pytest.raises(ModelFormatError, match=r"model\.safetensors"):
        load(directory)
