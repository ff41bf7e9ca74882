"""The fused decoder against the plain one: every family, format, kind of cache and batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import decoder_config
from torch import Tensor

from jobs.compression.packing import load_model, save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import DecoderConfig, Recipe, RopeScaling, Step
from jobs.kernels import native
from jobs.kernels.block_cache import BlockCache, BlockSpan
from jobs.models import decoder
from jobs.models._fused import FusedDecoder, _Angles
from jobs.models._rotary import Rotary

NUM_BLOCKS = 40
BLOCK_SIZE = 16
INT8 = Step(method="rtn", options={"scheme": "w8a8"})
INT4 = Step(method="rtn", options={"scheme": "w4a16", "group_size": 32})
INT8_WEIGHTS = Step(method="rtn", options={"scheme": "w8a16", "group_size": 32})
INT4_INT8 = Step(method="rtn", options={"scheme": "w4a8", "group_size": 32})
RECIPES = {
    "dense": Recipe(),
    "int8": Recipe(steps=(INT8,)),
    "int4": Recipe(steps=(INT4,)),
    "int4-int8": Recipe(steps=(INT4_INT8,)),
    "int8 weights": Recipe(steps=(INT8_WEIGHTS,)),
    "mixed": Recipe(steps=(INT8, INT4.replace(targets=("*layers.1*", "*.k_proj")))),
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": RopeScaling(kind="linear", factor=2.0)},
    "qwen2": {"num_heads": 6, "num_kv_heads": 2, "tie_embeddings": False},
    "qwen3": {"head_dim": 24},
    "mistral": {"sliding_window": 7, "num_kv_heads": 4},
}


@pytest.fixture(autouse=True)
def _needs_kernels() -> None:
    if (reason := native.why_unavailable()) is not None:
        pytest.skip(reason)


def config_of(shape: str, **changes: Any) -> DecoderConfig:
    return decoder_config(shape, **SHAPES[shape] | changes)


def write(directory: Path, config: DecoderConfig, recipe: Recipe) -> Path:
    """Write a compressed model with biases and norms that do something."""
    model = decoder.build(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save_compressed(apply_recipe(model.to(torch.bfloat16).float(), recipe), directory)
    return directory


def load(directory: Path) -> decoder.Decoder:
    """Read a model."""
    return load_model(directory, verify=False).model


class Session:
    """A model with a cache, and sequences that it computes in any parts."""

    def __init__(
        self, model: decoder.Decoder | FusedDecoder, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model
        self.cache = BlockCache(model.config, NUM_BLOCKS, BLOCK_SIZE, dtype)
        generator = torch.Generator().manual_seed(2)
        self.tokens_ST = torch.randint(0, 61, (4, 60), generator=generator)
        per_sequence = NUM_BLOCKS // 4
        order = torch.randperm(NUM_BLOCKS, generator=generator).view(4, per_sequence)
        self.blocks = [tuple(blocks) for blocks in order.tolist()]

    def run(
        self, *parts: tuple[int, int, int], adapters: decoder.RowAdapters | None = None
    ) -> list[Tensor]:
        """Return logits of tokens [start, stop) of each (sequence, start, stop)."""
        logits_TV = self.model.head(self.hidden(*parts, adapters=adapters))
        return list(logits_TV.split([stop - start for _, start, stop in parts]))

    @torch.inference_mode()
    def hidden(
        self,
        *parts: tuple[int, int, int],
        adapters: decoder.RowAdapters | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Return h_TC of these tokens, or of wanted ones."""
        spans = [BlockSpan(self.blocks[s], start, stop - start) for s, start, stop in parts]
        tokens = torch.cat([self.tokens_ST[s, start:stop] for s, start, stop in parts])
        positions = torch.cat([torch.arange(start, stop) for _, start, stop in parts])
        attention = self.cache.attention(spans)
        return self.model.hidden(tokens[None], positions[None], attention, adapters, wanted)[0]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_decoder_when_compared_to_the_plain_one_is_equal(
    tmp_path: Path, shape: str, recipe: str
) -> None:
    write(tmp_path, config_of(shape), RECIPES[recipe])
    model = load(tmp_path)
    fused, plain = Session(FusedDecoder(model)), Session(model)
    assert fused.model.is_one_call
    for parts in ([(0, 0, 9)], [(0, 9, 10), (1, 0, 21), (2, 0, 1)], [(2, 1, 2), (0, 10, 11)]):
        for found, expected in zip(fused.run(*parts), plain.run(*parts), strict=True):
            # Where a row is rounded to int8, a difference in the last bit may become a step.
            limit = 1e-5 if recipe == "dense" else 0.02
            assert (found - expected).abs().max() < limit * expected.abs().max()


@pytest.mark.parametrize("wanted", [[], [0], [3, 8, 9], list(range(10))])
@pytest.mark.parametrize("recipe", ["int8", "mixed"])
def test_fused_decoder_when_few_tokens_are_wanted_gives_their_rows_bitwise(
    tmp_path: Path, recipe: str, wanted: list[int]
) -> None:
    write(tmp_path, config_of("llama"), RECIPES[recipe])
    model = load(tmp_path)
    fused = Session(FusedDecoder(model))
    everything = fused.hidden((0, 0, 10))
    found = fused.hidden((0, 0, 10), wanted=torch.tensor(wanted, dtype=torch.int64))
    assert torch.equal(found, everything[wanted])
    # What later tokens attend to is whole.
    assert torch.equal(fused.hidden((0, 10, 12)), Session(fused.model).hidden((0, 0, 12))[10:])


def test_fused_decoder_when_wanted_tokens_do_not_rise_says_so(tmp_path: Path) -> None:
    write(tmp_path, config_of("llama"), RECIPES["int8"])
    session = Session(FusedDecoder(load(tmp_path)))
    with pytest.raises(AssertionError, match="must rise"):
        session.hidden((0, 0, 4), wanted=torch.tensor([2, 1]))


class Doubling:
    """Adapters that add the outputs of some rows to themselves."""

    def __init__(self, rows: slice) -> None:
        self.rows = rows
        self.names: set[str] = set()

    def add(self, layer_name: str, x_TC: Tensor, y_TO: Tensor) -> None:
        assert x_TC.shape[0] == y_TO.shape[0]
        self.names.add(layer_name)
        y_TO[self.rows].mul_(2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_decoder_when_rows_have_adapters_adds_them_to_these_rows_alone(
    tmp_path: Path, recipe: str
) -> None:
    write(tmp_path, config_of("qwen2"), RECIPES[recipe])
    fused, plain = Session(FusedDecoder(load(tmp_path))), Session(load(tmp_path))
    adapters, parts = Doubling(slice(5, 20)), [(0, 0, 5), (1, 0, 15), (2, 0, 2)]
    found, expected = fused.run(*parts, adapters=adapters), plain.run(*parts, adapters=adapters)
    assert adapters.names == set(decoder.linear_names(decoder.build(fused.model.config, seed=0)))
    for with_fused, with_plain in zip(found, expected, strict=True):
        assert (with_fused - with_plain).abs().max() < 0.02 * with_plain.abs().max()
    alone = Session(FusedDecoder(load(tmp_path))).run(*parts)
    assert torch.equal(found[0], alone[0])
    assert not torch.equal(found[1], alone[1])
    assert torch.equal(found[2], alone[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_decoder_when_batches_chunks_and_threads_differ_gives_the_same_bits(
    tmp_path: Path, recipe: str, dtype: torch.dtype
) -> None:
    write(tmp_path, config_of("mistral", sliding_window=40), RECIPES[recipe])
    model = FusedDecoder(load(tmp_path))
    whole, pieces = Session(model, dtype), Session(model, dtype)
    expected = [whole.run((n, 0, 60))[0] for n in range(3)]
    found: list[list[Tensor]] = [[], [], []]
    threads = torch.get_num_threads()
    try:
        for step, stops in enumerate(([1, 33, 7], [2, 34, 50], [19, 35, 51], [60, 60, 60])):
            torch.set_num_threads(1 + step % 2)
            starts = [sum(len(rows) for rows in found[n]) for n in range(3)]
            results = pieces.run(*((n, starts[n], stops[n]) for n in (2, 0, 1)))
            for n, rows in zip((2, 0, 1), results, strict=True):
                found[n].append(rows)
    finally:
        torch.set_num_threads(threads)
    for n in range(3):
        assert torch.equal(torch.cat(found[n]), expected[n])


@pytest.mark.parametrize("threads_in_use", [1, 2, 3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_decoder_when_a_pass_is_long_gives_the_bits_of_short_ones(
    tmp_path: Path, recipe: str, threads_in_use: int
) -> None:
    # Threads share the rows of long passes, and the outputs of short ones.
    write(tmp_path, config_of("qwen3"), RECIPES[recipe])
    model = FusedDecoder(load(tmp_path))
    short, long = Session(model), Session(model)
    expected = [short.run((n, 0, 60))[0] for n in range(4)]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_in_use)
    try:
        found = long.run(*((n, 0, 60) for n in range(4)))
    finally:
        torch.set_num_threads(threads)
    for n in range(4):
        assert torch.equal(found[n], expected[n])


def test_fused_decoder_when_attention_is_not_paged_is_equal(tmp_path: Path) -> None:
    write(tmp_path, config_of("qwen3"), RECIPES["int8"])
    model = FusedDecoder(load(tmp_path))
    paged, gathered = Session(model), Session(model)
    gathered.cache = BlockCache(
        model.config, NUM_BLOCKS, BLOCK_SIZE, torch.float32, use_kernels=False
    )
    for parts in ([(0, 0, 9), (1, 0, 3)], [(0, 9, 10)]):
        for found, expected in zip(gathered.run(*parts), paged.run(*parts), strict=True):
            assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("token", [-1, 61])
def test_fused_decoder_when_a_token_is_not_in_the_vocabulary_stops_at_once(
    tmp_path: Path, token: int
) -> None:
    session = Session(FusedDecoder(load(write(tmp_path, config_of("llama"), Recipe()))))
    session.tokens_ST[0, 3] = token
    with pytest.raises(AssertionError, match="token id"):
        session.run((0, 0, 5))


def test_angles_when_later_positions_come_are_those_of_the_formula_and_stay_the_same_bits() -> None:
    rotary = Rotary(config_of("llama"))
    angles = _Angles(rotary)
    early_T, late_T = torch.tensor([0, 5, 17]), torch.tensor([9000, 4095, 4096, 5])
    before = angles.of(early_T)
    for positions_T in (late_T, early_T):
        expected = rotary(positions_T[None], torch.float32)
        for found_TD, expected_BT1D in zip(angles.of(positions_T), expected, strict=True):
            assert torch.equal(found_TD, expected_BT1D[0, :, 0])
    for old_TD, new_TD in zip(before, angles.of(early_T), strict=True):
        assert torch.equal(old_TD, new_TD)
