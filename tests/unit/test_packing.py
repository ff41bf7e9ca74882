"""Compressed models on disk: back again, in transformers, and refused when they are not right."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import decoder_config
from transformers import AutoModelForCausalLM

from cluster.errors import IntegrityError, ModelFormatError
from cluster.storage import staged_directory
from jobs.compression.packing import load_model, save_compressed
from jobs.compression.quantization_config import read_layouts
from jobs.compression.recipe import Compressed, apply_recipe, predicted_bytes
from jobs.compression.text import CalibrationText
from jobs.config import DecoderConfig, Recipe, Step
from jobs.kernels.formats import PACKED_BITS, Layout
from jobs.models.decoder import build, save

SHAPES = ("llama", "qwen2", "qwen3", "mistral")
INT8 = Step(method="rtn", options={"scheme": "w8a8"})
FP8 = Step(method="rtn", options={"scheme": "fp8"})
INT4 = Step(method="rtn", options={"scheme": "w4a16", "group_size": 32})
INT3 = Step(method="rtn", options={"scheme": "w3a16", "group_size": 32})
INT8_WEIGHTS = Step(method="rtn", options={"scheme": "w8a16", "group_size": 32})
INT4_INT8 = Step(method="rtn", options={"scheme": "w4a8", "group_size": 32})
CHANNELS = tuple(
    step.replace(options={"scheme": step.options["scheme"], "group_size": None})
    for step in (INT4, INT3, INT4_INT8, INT8_WEIGHTS)
)
MIXED = (INT4, INT8.replace(targets=("*.mlp.down_proj",)))
RECIPES = {
    "int8": Recipe(steps=(INT8,)),
    "int4": Recipe(steps=(INT4,)),
    "int3": Recipe(steps=(INT3,)),
    "fp8": Recipe(steps=(FP8,)),
    "mixed": Recipe(steps=MIXED),
    "partly": Recipe(steps=(INT8.replace(targets=("*layers.0*",)),)),
    "int4 weights, int8 inputs": Recipe(steps=(INT4_INT8,)),
    "head": Recipe(steps=(INT4_INT8, INT8.replace(targets=("lm_head",)))),
    "int4 by channel": Recipe(steps=CHANNELS[:1]),
    "int3 by channel": Recipe(steps=CHANNELS[1:2]),
    "int4 by channel, int8 inputs": Recipe(steps=CHANNELS[2:3]),
    "int8 weights": Recipe(steps=(INT8_WEIGHTS,)),
    "int8 weights by channel": Recipe(steps=CHANNELS[3:]),
    "dense": Recipe(),
}


def write(directory: Path, recipe: Recipe, config: DecoderConfig | None = None) -> Compressed:
    directory.mkdir(exist_ok=True)
    model = build(config or decoder_config(), seed=0).to(torch.bfloat16).float()
    compressed = apply_recipe(model, recipe)
    save_compressed(compressed, directory)
    return compressed


def some_tokens() -> torch.Tensor:
    return torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(0))


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def edit_config(directory: Path, path: list[str], value: object) -> None:
    document = json.loads((directory / "config.json").read_text())
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (directory / "config.json").write_text(json.dumps(document))


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        if tensor is None:
            del tensors[key]
        else:
            tensors[key] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_model_when_saved_loads_with_the_same_logits(
    shape: str, recipe: str, tmp_path: Path
) -> None:
    compressed = write(tmp_path, RECIPES[recipe], decoder_config(shape))
    loaded = load_model(tmp_path, verify=False)
    # W8A8 also rounds activations, which the fake-quantized model does not, FP8 rounds them to four
    # significant bits, W4A16 to bfloat16.
    limit = {"dense": 1e-5, "int4": 0.01, "int3": 0.01, "fp8": 0.1}.get(recipe, 0.04)
    difference = relative_difference(loaded.model(some_tokens()), compressed.model(some_tokens()))
    assert difference <= limit
    assert loaded.config == compressed.model.config
    assert all(compressed.scheme_of(layer) == s for layer, s in loaded.schemes.items())
    assert loaded.operators.keys() == loaded.schemes.keys()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_model_when_saved_loads_unmodified_in_transformers(
    shape: str, recipe: str, tmp_path: Path
) -> None:
    write(tmp_path, RECIPES[recipe], decoder_config(shape, tie_embeddings=shape != "mistral"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = theirs(some_tokens()).logits
    found = load_model(tmp_path, verify=False).model(some_tokens())
    limit = {"dense": 1e-5, "int4": 0.01, "int3": 0.01}.get(recipe, 0.04)
    assert relative_difference(found, expected) <= limit


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_model_when_rounded_in_transformers_equals_exact_arithmetic(tmp_path: Path) -> None:
    # Without rounding of activations on either side, nothing but float32 is left between the two.
    compressed = write(tmp_path, RECIPES["int4"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert relative_difference(theirs(some_tokens()).logits, compressed.model(some_tokens())) < 1e-5


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_predicted_bytes_when_saved_equal_the_tensors_on_disk(
    recipe: str,
    tie_embeddings: bool,  # noqa: FBT001  parametrized
    tmp_path: Path,
) -> None:
    config = decoder_config("qwen2", tie_embeddings=tie_embeddings)
    write(tmp_path, RECIPES[recipe], config)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored_bytes = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert predicted_bytes(config, RECIPES[recipe]) == stored_bytes


def test_model_when_loaded_holds_no_dense_copy(tmp_path: Path) -> None:
    config = decoder_config(hidden_size=256, intermediate_size=512, head_dim=64)
    step = INT4.replace(options={"scheme": "w4a16", "group_size": 128})
    write(tmp_path, Recipe(steps=(step,)), config)
    loaded = load_model(tmp_path, verify=False)
    num_linear = 2 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512)
    head_bytes = 2 * 64 * 256  # a copy of the embedding in the form that products read
    rest_bytes = 4 * (61 * 256 + 5 * 256) + head_bytes
    assert loaded.weight_bytes <= num_linear * 4.5 / 8 + rest_bytes


def test_model_when_dense_directory_has_shards_loads_too(tmp_path: Path) -> None:
    model = build(decoder_config(), seed=0)
    save(model, tmp_path, dtype=torch.float32, max_shard_bytes=40_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_model(tmp_path, verify=False)
    assert torch.equal(loaded.model(some_tokens()), model(some_tokens()))
    assert set(loaded.schemes.values()) == {"bf16"}


def test_config_when_model_has_one_format_targets_the_class(tmp_path: Path) -> None:
    write(tmp_path, RECIPES["int8"])
    document = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert document["format"] == "int-quantized"
    assert document["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert document["ignore"] == ["lm_head"]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(
    ("scheme", "bits"), [("w8a16", 8), ("w4a16", 4), ("w4a8", 4), ("w3a16", 3)]
)
def test_config_when_scales_are_by_channel_says_so_and_has_one_a_row(
    method: str, scheme: str, bits: int, tmp_path: Path
) -> None:
    step = Step(method=method, options={"scheme": scheme, "group_size": None})
    model = build(decoder_config(), seed=0)
    text = CalibrationText.of(torch.randint(0, 61, (16, 16)))
    compressed = apply_recipe(model, Recipe(steps=(step,)), text)
    save_compressed(compressed, tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    weights = document["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["strategy"]) == (bits, "channel")
    assert weights["group_size"] is None
    layer = "model.layers.0.mlp.down_proj"
    rows, _ = model.get_submodule(layer).weight.shape
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors[f"{layer}.weight_scale"].shape == (rows, 1)
    assert compressed.quantized[layer].layout == Layout(scheme)  # type: ignore[arg-type]  # parametrized text


def test_config_when_formats_are_mixed_names_every_layer(tmp_path: Path) -> None:
    compressed = write(tmp_path, RECIPES["mixed"])
    document = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    groups = document["config_groups"].values()
    assert document["format"] == "mixed-precision"
    assert {group["format"] for group in groups} == {"int-quantized", "pack-quantized"}
    assert {name for g in groups for name in g["targets"]} == set(compressed.quantized)


@pytest.mark.parametrize(
    "targets",
    [["re:.*proj$"], ["re:model[.]layers[.].*"], ["Linear"], ["re:.*self_attn.*", "re:.*mlp.*"]],
)
def test_config_when_targets_are_patterns_is_understood(targets: list[str], tmp_path: Path) -> None:
    write(tmp_path, RECIPES["int8"])
    edit_config(tmp_path, ["quantization_config", "config_groups", "group_0", "targets"], targets)
    loaded = load_model(tmp_path, verify=False)
    assert [name for name, s in loaded.schemes.items() if s == "bf16"] == ["lm_head"]


@pytest.mark.parametrize(
    ("recipe", "preset", "scheme"), [("int8", "W8A8", "w8a8"), ("fp8", "FP8_DYNAMIC", "fp8")]
)
def test_config_when_a_preset_names_the_scheme_is_understood(
    recipe: str, preset: str, scheme: str, tmp_path: Path
) -> None:
    write(tmp_path, RECIPES[recipe])
    edit_config(tmp_path, ["quantization_config", "config_groups"], {preset: ["Linear"]})
    assert load_model(tmp_path, verify=False).schemes["model.layers.0.mlp.up_proj"] == scheme


@pytest.mark.parametrize("preset", ["W8A8", "FP8_DYNAMIC", "W8A16", "W4A16", "W4A8"])
def test_preset_when_read_is_the_librarys(preset: str) -> None:
    weights = preset_name_to_scheme(preset, ["Linear"]).weights
    assert weights is not None
    document = {"quant_method": "compressed-tensors", "config_groups": {preset: ["Linear"]}}
    layout = read_layouts(document, {"layer": (8, 256)})["layer"]
    assert layout.group_size == weights.group_size
    assert PACKED_BITS.get(layout.scheme, 8) == weights.num_bits


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["quant_method"], "gptq", "`gptq` is not supported"),
        (["kv_cache_scheme"], {"num_bits": 8}, "kv_cache_scheme"),
        (["quantization_status"], "frozen", "quantization_status `frozen`"),
        (["config_groups"], {"FP8": ["Linear"]}, "scheme `FP8` is not supported"),
        (["config_groups", "group_0", "weights", "num_bits"], 3, "3-bit int weights by channel"),
        (["config_groups", "group_0", "weights", "num_bits"], 5, "5-bit int weights by channel"),
        (
            ["config_groups", "group_0", "weights", "type"],
            "float",
            "8-bit float weights by channel",
        ),
        (["config_groups", "group_0", "weights", "symmetric"], False, "symmetric=False"),
        (["config_groups", "group_0", "weights", "actorder"], "group", "actorder='group'"),
        (["config_groups", "group_0", "input_activations"], None, "`int-quantized`.*w8a16.*`pack-"),
        (["config_groups", "group_0", "output_activations"], {"num_bits": 8}, "quantized outputs"),
        (["config_groups", "group_0", "format"], "marlin-24", "format `marlin-24`"),
        (["ignore"], [], "`lm_head`"),
    ],
)
def test_config_when_unsupported_is_refused_by_name(
    path: list[str], value: object, words: str, tmp_path: Path
) -> None:
    write(tmp_path, RECIPES["int8"])
    edit_config(tmp_path, ["quantization_config", *path], value)
    with pytest.raises(ModelFormatError, match=words):
        load_model(tmp_path, verify=False)


def test_weights_when_a_scale_is_missing_are_refused(tmp_path: Path) -> None:
    write(tmp_path, RECIPES["int8"])
    edit_tensors(tmp_path, model__layers__0__mlp__up_proj__weight_scale=None)
    with pytest.raises(ModelFormatError, match=r"lack `model.layers.0.mlp.up_proj.weight_scale`"):
        load_model(tmp_path, verify=False)


def test_weights_when_of_another_type_are_refused(tmp_path: Path) -> None:
    write(tmp_path, RECIPES["int8"])
    edit_tensors(tmp_path, model__layers__0__mlp__up_proj__weight=torch.zeros(96, 64))
    with pytest.raises(ModelFormatError, match=r"up_proj.weight` is \[96, 64\] torch.float32"):
        load_model(tmp_path, verify=False)


def test_weights_when_their_recorded_shape_differs_are_refused(tmp_path: Path) -> None:
    write(tmp_path, RECIPES["int4"])
    edit_tensors(tmp_path, model__layers__0__mlp__up_proj__weight_shape=torch.tensor([64, 96]))
    with pytest.raises(ModelFormatError, match=r"weight_shape` is \[64, 96\]"):
        load_model(tmp_path, verify=False)


def test_weights_when_unknown_are_refused(tmp_path: Path) -> None:
    write(tmp_path, RECIPES["int4"])
    edit_tensors(tmp_path, model__layers__0__mlp__up_proj__weight_g_idx=torch.zeros(64))
    with pytest.raises(ModelFormatError, match="weight_g_idx"):
        load_model(tmp_path, verify=False)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_model_when_one_byte_is_damaged_is_refused(name: str, tmp_path: Path) -> None:
    target = tmp_path / "model"
    with staged_directory(target, {"kind": "model"}) as staging:
        write(staging, RECIPES["int4"])
    assert load_model(target).weight_bytes > 0
    content = bytearray((target / name).read_bytes())
    content[len(content) // 2] ^= 1
    (target / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{name} is damaged"):
        load_model(target)


def test_model_when_it_has_no_manifest_is_refused_unless_told(tmp_path: Path) -> None:
    write(tmp_path, RECIPES["int8"])
    with pytest.raises(ModelFormatError, match=r"manifest\.json"):
        load_model(tmp_path)
