"""LoRA adapters: equal to peft's own outputs, in batches of several; what is not one is refused."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ModelFormatError
from jobs.config import DecoderConfig
from jobs.models.decoder import build, save
from serving.engines.native.adapters import CONFIG, WEIGHTS, load_adapters

SHAPE = DecoderConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=32,
    initializer_range=0.2,
)
TOKENS = torch.tensor([[3, 9, 27, 41, 5, 17]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save(build(SHAPE, seed=1), directory, dtype=torch.float32)
    return directory


def peft_adapter(base, directory, seed, **options):
    """Write an adapter with random weights and return the logits of peft's own model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0.0, 0.2, generator=generator)
        model.save_pretrained(directory)
    with torch.inference_mode():
        return model(TOKENS).logits[0]


def logits_with(adapters, names, lengths) -> torch.Tensor:
    """Return logits of our model with every linear layer followed by the adapters' part."""
    model = build(SHAPE, seed=1)
    batch = adapters.batch(names, lengths)
    for name, module in model.named_modules():
        if name.startswith("model.layers.") and name.endswith("_proj"):

            def add(_module, inputs, output, name=name):
                flat = output.flatten(0, 1)
                batch.add(name, inputs[0].flatten(0, 1), flat)
                return flat.view_as(output)

            module.register_forward_hook(add)
    with torch.inference_mode():
        return model(TOKENS.repeat(len(names), 1))


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ALL, "r": 20},
        {"target_modules": ALL, "use_rslora": True},
        {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 9},
            "alpha_pattern": {"down_proj": 3},
        },
    ],
)
def test_adapter_when_added_equals_peft(base, tmp_path, options):
    expected = peft_adapter(base, tmp_path, seed=2, **options)
    adapters = load_adapters({"one": tmp_path}, SHAPE, torch.device("cpu"))
    plain = build(SHAPE, seed=1)(TOKENS)[0]
    found = logits_with(adapters, ["one"], [TOKENS.shape[1]])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (expected - plain).abs().max() > 0.05


def test_batch_when_rows_have_different_adapters_treats_each_as_if_alone(base, tmp_path):
    expected = {name: peft_adapter(base, tmp_path / name, seed) for seed, name in enumerate("ab")}
    adapters = load_adapters({n: tmp_path / n for n in "ab"}, SHAPE, torch.device("cpu"))
    names = ["b", None, "a", "b"]
    found = logits_with(adapters, names, [TOKENS.shape[1]] * 4)
    expected[None] = build(SHAPE, seed=1)(TOKENS)[0]
    for name, logits in zip(names, found, strict=True):
        torch.testing.assert_close(logits, expected[name], rtol=0, atol=1e-4)


def test_batch_when_nobody_asks_for_an_adapter_is_none(base, tmp_path):
    peft_adapter(base, tmp_path, seed=0)
    adapters = load_adapters({"one": tmp_path}, SHAPE, torch.device("cpu"))
    assert adapters.batch([None, None], [3, 1]) is None
    assert adapters.names == ("one",)
    assert adapters.bytes() > 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["embed_tokens"]}, "embed"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_load_when_option_is_not_supported_names_it(base, tmp_path, options, named):
    peft_adapter(base, tmp_path, seed=0, **options)
    with pytest.raises(ModelFormatError, match=named):
        load_adapters({"one": tmp_path}, SHAPE, torch.device("cpu"))


@pytest.fixture
def adapter(base, tmp_path):
    peft_adapter(base, tmp_path / "adapter", seed=0)
    return tmp_path / "adapter"


def test_load_when_option_is_unknown_names_it(adapter):
    document = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**document, "use_something_new": True}))
    with pytest.raises(ModelFormatError, match="use_something_new"):
        load_adapters({"one": adapter}, SHAPE, torch.device("cpu"))


def test_load_when_kind_is_not_lora_is_refused(adapter):
    document = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**document, "peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ModelFormatError, match="peft_type"):
        load_adapters({"one": adapter}, SHAPE, torch.device("cpu"))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_load_when_a_file_is_missing_names_it(adapter, name):
    (adapter / name).unlink()
    with pytest.raises(ModelFormatError, match=name):
        load_adapters({"one": adapter}, SHAPE, torch.device("cpu"))


def test_load_when_adapter_is_of_another_model_is_refused(adapter):
    shape = SHAPE.replace(hidden_size=64)
    with pytest.raises(ModelFormatError, match="another model"):
        load_adapters({"one": adapter}, shape, torch.device("cpu"))


def test_load_when_half_of_a_pair_is_missing_is_refused(adapter):
    tensors = load_file(adapter / WEIGHTS)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ModelFormatError, match=r"layers\.0\.self_attn\.q_proj"):
        load_adapters({"one": adapter}, SHAPE, torch.device("cpu"))
