"""Model directories and configurations that are refused, and what is read leniently."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ModelFormatError
from jobs.config import DecoderConfig
from jobs.models import _hf, decoder

TINY = DecoderConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    decoder.save(decoder.build(TINY, seed=3), tmp_path / "model", dtype=torch.float32)
    return tmp_path / "model"


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / _hf.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_load_when_the_tied_head_is_stored_too_accepts_only_an_equal_one(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, saved / "model.safetensors")
    model = decoder.load(saved)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    state["lm_head.weight"][0, 0] += 1.0
    save_file(state, saved / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"lm_head\.weight differs"):
        decoder.load(saved)


def test_load_when_old_files_hold_rotary_frequencies_ignores_them(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(state, saved / "model.safetensors")
    assert decoder.load(saved).config.num_layers == TINY.num_layers


def drop(state: dict[str, torch.Tensor]) -> None:
    del state["model.layers.1.mlp.up_proj.weight"]


def add(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)


def reshape(state: dict[str, torch.Tensor]) -> None:
    state["model.norm.weight"] = torch.zeros(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"lacks the weights `model\.layers\.1\.mlp\.up_proj\.weight`"),
        (add, r"holds weights `model\.layers\.9"),
        (reshape, r"`model\.norm\.weight` has shape \[5\], and the config asks for \[32\]"),
    ],
)
def test_load_when_tensors_do_not_match_the_config_names_the_tensor(
    saved: Path, change: Any, message: str
) -> None:
    state = load_file(saved / "model.safetensors")
    change(state)
    save_file(state, saved / "model.safetensors")
    with pytest.raises(ModelFormatError, match=message):
        decoder.load(saved)


def test_load_when_files_are_damaged_or_absent_says_which(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"not a model directory: it has no config\.json"):
        decoder.load(tmp_path / "nowhere")
    (saved / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ModelFormatError, match="not a readable safetensors file"):
        decoder.load(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelFormatError, match="convert the weights to safetensors"):
        decoder.load(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ModelFormatError, match="cannot be read"):
        decoder.load(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(ModelFormatError, match="holds a list"):
        decoder.load(saved)


def test_load_when_an_index_names_an_absent_or_outside_shard_is_refused(tmp_path: Path) -> None:
    decoder.save(decoder.build(TINY, seed=0), tmp_path / "m", max_shard_bytes=10_000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    (tmp_path / "outside.safetensors").write_bytes(b"")
    for shard in ("../outside.safetensors", "model-9.safetensors"):
        name = next(iter(document["weight_map"]))
        changed = {**document, "weight_map": {**document["weight_map"], name: shard}}
        index.write_text(json.dumps(changed))
        with pytest.raises(ModelFormatError, match="which is not in the folder"):
            decoder.load(tmp_path / "m")
    shards = sorted(set(document["weight_map"].values()))
    swapped = {name: shards[0] for name in document["weight_map"]}
    index.write_text(json.dumps({**document, "weight_map": swapped}))
    with pytest.raises(ModelFormatError, match="promises"):
        decoder.load(tmp_path / "m")


def test_load_when_the_model_is_quantized_asks_for_the_dense_one(saved: Path) -> None:
    edit_config(saved, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelFormatError, match="quantized"):
        decoder.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architecture `GemmaForCausalLM`"),
        ({"architectures": None, "model_type": "gpt2"}, "architecture `gpt2`"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rotary scaling `yarn`"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ by layer"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
        ({"hidden_act": "gelu"}, "`hidden_act` = 'gelu'"),
        ({"attention_bias": True}, "`attention_bias` = True"),
        ({"mlp_bias": True}, "`mlp_bias` = True"),
        ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` = 0.5"),
        ({"hidden_size": None}, "lacks `hidden_size`"),
        ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads=3"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 4,
                "max_window_layers": 1,
            },
            "2 of 3 layers",
        ),
    ],
)
def test_load_when_the_config_asks_for_what_is_not_computed_names_it(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(saved, **changes)
    with pytest.raises(ModelFormatError, match=message):
        decoder.load(saved)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TINY.replace(sliding_window=4), "sliding_window=4 has no place in the llama layout"),
        (TINY.replace(hidden_size=34, head_dim=8), "hidden_size=34"),
    ],
)
def test_build_when_transformers_could_not_read_the_result_is_refused(
    config: DecoderConfig, message: str
) -> None:
    with pytest.raises(ModelFormatError, match=message):
        decoder.build(config, seed=0)


def test_from_hf_config_when_keys_are_left_out_takes_the_familys_defaults() -> None:
    document = _hf.to_hf_config(TINY)
    sparse = {key: document[key] for key in (*_hf._REQUIRED, "model_type")}
    assert not _hf.from_hf_config(sparse).tie_embeddings
    assert _hf.from_hf_config(sparse).num_kv_heads == TINY.num_heads
    assert _hf.from_hf_config({**sparse, "model_type": "mistral"}).sliding_window == 4096
    assert _hf.from_hf_config({**sparse, "model_type": "qwen3"}).resolved_head_dim == 128


def test_from_hf_config_when_several_end_tokens_warns_and_keeps_the_first(saved: Path) -> None:
    edit_config(saved, eos_token_id=[5, 6])
    with pytest.warns(UserWarning, match=r"end tokens \[5, 6\]"):
        assert _hf.from_hf_config(_hf.read_config(saved)).eos_token_id == 5
    (saved / _hf.GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert _hf.stop_token_ids(saved, 7, None) == {5, 6, 7}


def test_from_hf_config_when_dropout_is_set_warns_that_it_is_ignored() -> None:
    document = {**_hf.to_hf_config(TINY), "attention_dropout": 0.1}
    with pytest.warns(UserWarning, match="attention_dropout=0.1 is ignored"):
        _hf.from_hf_config(document)
