"""Statistics of an unchanged model: what a calibration pass sees, kept by digest and checked."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from cluster.errors import IntegrityError, RecipeError
from cluster.storage import verify_directory
from jobs.compression.calibration import CalibrationPass
from jobs.compression.inputs import LayerInputs
from jobs.compression.recipe import apply_recipe
from jobs.compression.shared_inputs import HEAD, shared_inputs
from jobs.compression.statistics import dense_statistics, statistics_digest
from jobs.compression.text import CalibrationText
from jobs.config import CalibrationConfig, DecoderConfig, Recipe, Step
from jobs.models.decoder import Decoder, build

CONFIG = DecoderConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2
)
TEXT = torch.randint(61, (6, 20), generator=torch.Generator().manual_seed(1))
SOME = ["model.layers.1.self_attn.o_proj", "model.layers.2.mlp.down_proj"]


class Computed:
    """Hears of blocks that were computed."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.heard.append((done, total))


def model(seed: int = 0) -> Decoder:
    return build(CONFIG, seed=seed)


def assert_equal(found: LayerInputs, expected: LayerInputs) -> None:
    assert torch.equal(found.gram_II, expected.gram_II)
    assert torch.equal(found.mean_abs_I, expected.mean_abs_I)
    assert torch.equal(found.max_abs_I, expected.max_abs_I)
    assert found.num_tokens == expected.num_tokens == TEXT.numel()


def by_pass() -> tuple[dict[str, LayerInputs], dict[str, Tensor]]:
    """Return what a calibration pass sees: inputs of groups and of the head, and effects."""
    inputs, effects = {}, {}
    with CalibrationPass(model(), TEXT) as text:
        for block in range(CONFIG.num_layers):
            groups = shared_inputs(block)
            inputs |= text.observe([group.layers[0] for group in groups])
            effects |= text.effects([layer for group in groups for layer in group.layers])
            text.advance()
        return inputs | text.observe([HEAD]), effects


@pytest.mark.parametrize("is_kept", [True, False])
def test_statistics_are_those_of_a_calibration_pass(tmp_path: Path, is_kept: bool) -> None:  # noqa: FBT001
    expected, effects = by_pass()
    with dense_statistics(model(), TEXT, tmp_path if is_kept else None) as found:
        folder = found.folder
        for layer, inputs in found.observe(list(expected)).items():
            assert_equal(inputs, expected[layer])
        for layer, effect_O in found.effects(list(effects)).items():
            assert torch.equal(effect_O, effects[layer])
    assert folder.is_dir() is is_kept


@pytest.mark.parametrize(
    ("layer", "first"),
    [
        ("model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.q_proj"),
        ("model.layers.2.mlp.up_proj", "model.layers.2.mlp.gate_proj"),
        ("lm_head", "lm_head"),
    ],
)
def test_statistics_when_asked_for_a_layer_give_those_of_its_group(
    tmp_path: Path, layer: str, first: str
) -> None:
    expected, _ = by_pass()
    with dense_statistics(model(), TEXT, tmp_path) as found:
        assert_equal(found.observe([layer])[layer], expected[first])


def test_statistics_when_kept_are_read_instead_of_computed_again(tmp_path: Path) -> None:
    first, second = Computed(), Computed()
    with dense_statistics(model(), TEXT, tmp_path, first) as found:
        folder = found.folder
        before = found.observe(SOME)
    assert first.heard == [(1, 3), (2, 3), (3, 3)]
    assert verify_directory(folder)["kind"] == "statistics"
    with dense_statistics(model(), TEXT, tmp_path, second) as again:
        assert second.heard == []
        for layer, inputs in again.observe(SOME).items():
            assert_equal(inputs, before[layer])


def test_statistics_when_weights_or_text_differ_lie_in_another_folder(tmp_path: Path) -> None:
    changed = model()
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight[3, 4] += 1e-3
    other_text = TEXT.clone()
    other_text[5, 19] = (other_text[5, 19] + 1) % 61
    cases = [
        (model(), TEXT),
        (changed, TEXT),
        (model(1), TEXT),
        (model(), other_text),
        (model(), TEXT.view(12, 10)),
        (build(CONFIG.replace(norm_eps=1e-4), seed=0), TEXT),
    ]
    digests = [statistics_digest(*case) for case in cases]
    assert len(set(digests)) == len(cases)
    assert statistics_digest(model(), TEXT) == digests[0]


def test_statistics_when_a_file_is_damaged_name_it_and_what_to_delete(tmp_path: Path) -> None:
    with dense_statistics(model(), TEXT, tmp_path) as found:
        folder = found.folder
    path = folder / "block-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (folder / "head.safetensors").unlink()
    with dense_statistics(model(), TEXT, tmp_path) as found:
        assert found.observe(["model.layers.0.mlp.up_proj"])
        with pytest.raises(IntegrityError, match=rf"block-00001.* SHA-256 .*Delete {folder} to"):
            found.observe(["model.layers.1.mlp.up_proj"])
        with pytest.raises(IntegrityError, match=r"head.* missing.*Delete"):
            found.observe([HEAD])


def test_statistics_when_several_ask_at_once_are_computed_by_one(tmp_path: Path) -> None:
    heard = [Computed() for _ in range(3)]

    def ask(progress: Computed) -> LayerInputs:
        with dense_statistics(model(), TEXT, tmp_path, progress) as found:
            return found.observe([HEAD])[HEAD]

    with ThreadPoolExecutor(len(heard)) as threads:
        for found in threads.map(ask, heard):
            assert_equal(found, by_pass()[0][HEAD])
    assert sorted(len(each.heard) for each in heard) == [0, 0, 3]


def test_statistics_when_a_process_was_killed_sweep_what_it_left(tmp_path: Path) -> None:
    leftover = tmp_path / f".{statistics_digest(model(), TEXT)}.0123abcd.tmp"
    leftover.mkdir()
    with dense_statistics(model(), TEXT, tmp_path):
        assert not leftover.exists()


def test_statistics_when_computing_fails_leave_nothing(tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise RuntimeError("cut off")

    with (
        pytest.raises(RuntimeError, match="cut off"),
        dense_statistics(model(), TEXT, tmp_path, fail),
    ):
        pytest.fail("there are no statistics")
    assert list(tmp_path.glob("*.lock")) == list(tmp_path.iterdir())


def compressed(steps: tuple[Step, ...], text: CalibrationText) -> dict[str, Tensor]:
    return apply_recipe(model(), Recipe(steps=steps), text).model.state_dict()


@pytest.mark.parametrize("scaling", [(), (Step(method="awq"),)])
def test_recipe_when_not_sequential_shows_every_block_what_the_unchanged_model_does(
    tmp_path: Path, scaling: tuple[Step, ...]
) -> None:
    options = {"scheme": "w4a16", "group_size": 16}
    every, last = (
        (*scaling, Step(method="gptq", targets=targets, options=options))
        for targets in (("*",), ("model.layers.2.*",))
    )
    if scaling:
        last = (scaling[0].replace(targets=("model.layers.2.*",)), *last[1:])
    apart = CalibrationText.of(TEXT)
    shared = replace(apart, is_sequential=False, cache=tmp_path)
    name = "model.layers.2.mlp.gate_proj.weight"
    alone = compressed(last, apart)[name]
    assert not torch.equal(compressed(every, apart)[name], alone)
    assert torch.equal(compressed(every, shared)[name], alone)
    (kept,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert torch.equal(compressed(last, shared)[name], alone)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [kept]


def test_calibration_config_when_a_cache_would_not_be_used_says_what_to_set() -> None:
    with pytest.raises(ValidationError, match=r"cache=kept.*sequential: false"):
        CalibrationConfig(data="data", cache="kept")


def test_recipe_when_two_steps_scale_and_not_sequential_is_refused() -> None:
    steps = (
        Step(method="smoothquant"),
        Step(method="awq"),
        Step(method="rtn", options={"scheme": "w8a8"}),
    )
    with pytest.raises(RecipeError, match=r"step 2 \(awq\).*step 1 \(smoothquant\).*sequential"):
        compressed(steps, replace(CalibrationText.of(TEXT), is_sequential=False))


def test_recipe_when_a_step_changes_the_whole_model_keeps_nothing_of_what_follows(
    tmp_path: Path,
) -> None:
    steps = (
        Step(method="depth", options={"num_blocks": 1}),
        Step(method="gptq", options={"scheme": "w4a16", "group_size": 16}),
    )
    compressed(steps, replace(CalibrationText.of(TEXT), is_sequential=False, cache=tmp_path))
    assert list(tmp_path.iterdir()) == []
