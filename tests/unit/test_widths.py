"""Decoders whose blocks differ in width: the same numbers everywhere, and how widths are found."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import decoder_config
from torch.nn import functional

import raysmith
from cluster.errors import ModelFormatError, RecipeError
from cluster.storage import staged_directory
from jobs.compression.gguf_export import export_gguf
from jobs.compression.methods.width import propose_sizes
from jobs.compression.packing import load_model, save_compressed
from jobs.compression.recipe import apply_recipe, final_shape, predicted_bytes
from jobs.compression.text import CalibrationText
from jobs.config import DecoderConfig, Recipe, Step
from jobs.data.tokens import open_split
from jobs.evaluation.agreement import continue_greedily
from jobs.evaluation.latency import decode_latency
from jobs.evaluation.quality import greedy_reference
from jobs.kernels import native
from jobs.kernels.formats import GROUPED
from jobs.models._fused import FusedDecoder
from jobs.models.decoder import build, load, save
from jobs.plan import count_parameters

SIZES = (64, 96, 32)
CONFIG = decoder_config(num_layers=3).with_mlp_sizes(SIZES)
TOKENS = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
NARROWED = Step(method="width", options={"intermediate_sizes": [96, 64, 32]})


def rounded(scheme: str) -> Step:
    groups: dict[str, object] = {"group_size": 32} if scheme in GROUPED else {}
    return Step(method="rtn", options={"scheme": scheme, **groups})


def test_logits_when_blocks_differ_equal_a_uniform_model_filled_up_with_zeros() -> None:
    model = build(CONFIG, seed=0)
    plain = build(CONFIG.with_mlp_sizes((96, 96, 96)), seed=1)
    state = plain.state_dict()
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            missing = [
                after - now for after, now in zip(state[name].shape, weight.shape, strict=True)
            ]
            pads = [pad for length in reversed(missing) for pad in (0, length)]
            state[name].copy_(functional.pad(weight, pads))
        torch.testing.assert_close(model(TOKENS), plain(TOKENS), atol=1e-5, rtol=1e-5)


def test_directory_when_saved_and_loaded_is_the_same_model(tmp_path: Path) -> None:
    model = build(CONFIG, seed=0)
    save(model, tmp_path, dtype=torch.float32)
    loaded = load(tmp_path)
    assert loaded.config.mlp_sizes == SIZES
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert count_parameters(CONFIG) == sum(p.numel() for p in model.parameters())


def test_transformers_when_given_such_a_directory_refuses_it(tmp_path: Path) -> None:
    save(build(CONFIG, seed=0), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_sizes"] == list(SIZES)
    with pytest.raises(ValueError, match="raysmith_llama"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore")  # It says that the type is another's.
def test_transformers_when_the_class_is_forced_refuses_the_weights(tmp_path: Path) -> None:
    save(build(CONFIG, seed=0), tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("scheme", ["bf16", "w8a8", "w4a16"])
def test_kernels_when_blocks_differ_give_what_plain_passes_give(
    scheme: str, tmp_path: Path
) -> None:
    compressed = apply_recipe(build(CONFIG, seed=0), Recipe(steps=(rounded(scheme),)))
    save_compressed(compressed, tmp_path)
    loaded = load_model(tmp_path, verify=False).model
    if native.is_available() and scheme != "bf16":
        assert FusedDecoder(loaded).is_one_call
    found_KT = continue_greedily(loaded, TOKENS, 8).tolist()
    assert found_KT == [greedy_reference(loaded, prompt, 8) for prompt in TOKENS.tolist()]
    assert decode_latency(loaded, context=8, tokens=2, repeats=1).p50_ms > 0


@pytest.mark.parametrize("steps", [(), (rounded("w8a8"),), (rounded("w4a16"),)])
def test_predicted_bytes_when_widths_are_given_equal_those_written(
    steps: tuple[Step, ...], tmp_path: Path
) -> None:
    config = decoder_config(num_layers=3)
    recipe = Recipe(steps=(NARROWED, *steps))
    compressed = apply_recipe(build(config, seed=0), recipe, CalibrationText.of(TOKENS))
    assert compressed.model.config == final_shape(config, recipe)
    save_compressed(compressed, tmp_path)
    loaded = load_model(tmp_path, verify=False)
    assert loaded.config.mlp_sizes == (96, 64, 32)
    path = tmp_path / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == predicted_bytes(config, recipe)


def test_width_when_channels_stay_keeps_those_that_matter() -> None:
    model = build(decoder_config(num_layers=2), seed=0)
    before = model(TOKENS)
    with torch.no_grad():
        for block, width in zip(model.model.layers, (64, 32), strict=True):
            block.mlp.down_proj.weight[:, width:] = 0  # what the others give is not read
        before = model(TOKENS)
    step = Step(method="width", options={"intermediate_sizes": [64, 32]})
    narrow = apply_recipe(model, Recipe(steps=(step,)), CalibrationText.of(TOKENS)).model
    torch.testing.assert_close(narrow(TOKENS), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("width", {"intermediate_sizes": [64, 64]}, "2 widths for 3 blocks"),
        ("width", {"intermediate_sizes": [64, 97, 64]}, "97 is more than the 96"),
        ("width", {"intermediate_sizes": [64, 96, 4]}, "4 for block 2 is less than 8"),
        ("width", {"intermediate_sizes": [64, 64, 64], "intermediate_size": 64}, "give either"),
        ("width", {"intermediate_size": 64}, "64 is more than the 32 there are in block 2"),
        ("depth", {"num_blocks": 1}, "Give `first`"),
    ],
)
def test_recipe_when_widths_cannot_be_names_the_value(
    method: str, options: dict[str, object], words: str
) -> None:
    is_varied = method == "depth" or "intermediate_sizes" not in options
    config = CONFIG if is_varied else decoder_config(num_layers=3)
    with pytest.raises(RecipeError, match=words):
        final_shape(config, Recipe(steps=(Step(method=method, options=options),)))


def test_depth_when_widths_differ_leaves_out_the_widths_of_its_blocks() -> None:
    recipe = Recipe(steps=(Step(method="depth", options={"num_blocks": 1, "first": 1}),))
    model = apply_recipe(build(CONFIG, seed=0), recipe, CalibrationText.of(TOKENS)).model
    assert model.config.mlp_sizes == (64, 32)
    assert model(TOKENS).isfinite().all()


@pytest.mark.parametrize("sizes", [(64, 96), (64, 32, 32), (64, 96, 4)])
def test_config_when_widths_do_not_fit_the_shape_is_refused(sizes: tuple[int, ...]) -> None:
    values = decoder_config(num_layers=3).model_dump() | {"intermediate_sizes": sizes}
    with pytest.raises(ValueError, match="intermediate_sizes"):
        DecoderConfig.model_validate(values)


def test_propose_sizes_when_one_block_matters_more_keeps_more_of_it() -> None:
    sizes = propose_sizes([torch.full((64,), 2.0), torch.full((64,), 1.0)], 0.5, 16)
    assert sizes == (48, 16)
    assert propose_sizes([torch.ones(64), torch.ones(64)], 1.0, 16) == (64, 64)
    with pytest.raises(RecipeError, match="multiple_of=128 is more than the 64"):
        propose_sizes([torch.ones(64)], 0.5, 128)


def test_export_when_blocks_differ_is_refused(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "m", {"kind": "model"}) as staging:
        save(build(CONFIG, seed=0), staging)
    with pytest.raises(ModelFormatError, match=r"intermediate_sizes=\[64, 96, 32\]"):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf")


def test_widths_command_when_asked_proposes_what_a_recipe_takes(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = decoder_config(vocab_size=open_split(tiny_data, "train").vocab_size)
    save(build(config, seed=0), tmp_path)
    arguments = ["widths", "--model", str(tmp_path), "--data", str(tiny_data), "--json"]
    arguments += ["--multiple-of", "16", "--num-sequences", "4", "--seq-len", "16"]
    assert raysmith.main([*arguments, "--keep", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["intermediate_sizes"]) == 96
    step = Step(method="width", options={"intermediate_sizes": found["intermediate_sizes"]})
    assert final_shape(config, Recipe(steps=(step,)))
    assert raysmith.main([*arguments, "--keep", "1.5"]) == 2
    assert "`--keep` = 1.5" in capsys.readouterr().err
