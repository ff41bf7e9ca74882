"""Repair: a pruned model learns what the dense one predicts, and zeros stay zero."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cluster.errors import DataError, RecipeError
from jobs.compression.methods import distill
from jobs.compression.methods._protocol import Repair
from jobs.compression.recipe import apply_recipe, predicted_bytes
from jobs.compression.text import CalibrationText
from jobs.config import DecoderConfig, Recipe, Step
from jobs.models.decoder import Decoder, build

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
    initializer_range=0.1,
)
TEXT = CalibrationText.of(torch.randint(61, (200, 16), generator=torch.Generator().manual_seed(4)))
OTHER = torch.randint(61, (8, 16), generator=torch.Generator().manual_seed(5))


def step(method: str, **options: object) -> Step:
    return Step(method=method, options=options)


def repair(num_tokens: int = 3000, **options: object) -> Step:
    settings = {"batch_size": 8, "seq_len": 16, "lr": 5e-4, "precision": "fp32"}
    return step("distill", num_tokens=num_tokens, **(settings | options))


def apply(*steps: Step) -> Decoder:
    return apply_recipe(build(CONFIG, seed=0), Recipe(steps=steps), TEXT).model


def divergence(model: Decoder, text_BT: Tensor = OTHER) -> float:
    """Return the mean forward divergence from the dense model's predictions."""
    with torch.no_grad():
        wanted, found = (m(text_BT).log_softmax(-1) for m in (build(CONFIG, seed=0), model))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def plain_loss(
    student: Decoder, teacher: Decoder, rows_BT: Tensor, temperature: float, alpha: float
) -> Tensor:
    """Hinton's loss over all logits at once, its soft part less the teacher's entropy."""
    logits_NV, wanted_NV = (m(rows_BT[:, :-1]).flatten(0, 1) for m in (student, teacher))
    wanted_NV = (wanted_NV / temperature).softmax(-1).detach()
    soft_N = -(wanted_NV * (logits_NV / temperature).log_softmax(-1)).sum(-1)
    entropy_N = -(wanted_NV * wanted_NV.log()).sum(-1)
    hard = functional.cross_entropy(logits_NV, rows_BT[:, 1:].flatten())
    return (1 - alpha) * temperature**2 * (soft_N - entropy_N).mean() + alpha * hard


@pytest.mark.parametrize("logits_bytes", [2**20, 4 * 61 * 10])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.0), (2.0, 0.3)])
def test_distill_when_logits_come_in_parts_trains_as_a_plain_loss_over_all_does(
    logits_bytes: int, temperature: float, alpha: float
) -> None:
    options = distill.Options(
        num_tokens=5 * 8 * 16,
        batch_size=8,
        seq_len=16,
        lr=3e-3,
        warmup_ratio=0.0,
        final_lr_ratio=1.0,
        temperature=temperature,
        alpha=alpha,
        precision="fp32",
    )
    teacher, plain = build(CONFIG, seed=0), build(CONFIG, seed=1)
    found: list[float] = []
    distill.repair(
        Repair(build(CONFIG, seed=1), teacher, TEXT),
        options,
        lambda done, total, loss: found.append(loss),
        logits_bytes=logits_bytes,
    )
    expected: list[float] = []
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for number in range(5):
        loss = plain_loss(plain, teacher, TEXT.batch(0, number, 8, 16), temperature, alpha)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert expected[-1] < 0.95 * expected[0]
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "cut", [step("depth", num_blocks=1), step("width", intermediate_size=48, num_kv_heads=1)]
)
def test_distill_when_a_model_was_cut_brings_it_nearer_to_the_dense_one_also_quantized(
    cut: Step,
) -> None:
    quantize = step("gptq", scheme="w8a8")
    without, repaired = apply(cut, quantize), apply(cut, repair(), quantize)
    assert repaired.config == without.config
    assert divergence(repaired) < 0.8 * divergence(without)


@pytest.mark.parametrize("prune", [{"sparsity": 0.5}, {"pattern": "2:4"}])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_distill_when_layers_were_pruned_keeps_their_zeros_and_moves_the_rest(
    method: str, prune: dict[str, object]
) -> None:
    targets = ("*mlp*",)
    pruning = Step(method=method, targets=targets, options=prune)
    before, after = apply(pruning), apply(pruning, repair())
    for block in range(CONFIG.num_layers):
        for name in ("gate_proj", "up_proj", "down_proj"):
            layer = f"model.layers.{block}.mlp.{name}.weight"
            old, new = before.state_dict()[layer], after.state_dict()[layer]
            assert torch.equal(old == 0, new == 0)
            assert (old == new).float().mean() < 0.51
    assert divergence(after) < 0.95 * divergence(before)


def test_distill_when_blocks_are_left_out_after_pruning_keeps_the_zeros_of_those_that_stay() -> (
    None
):
    prune = Step(method="magnitude", targets=("model.layers.2.mlp.*",), options={"sparsity": 0.5})
    model = apply(prune, step("depth", num_blocks=1, first=0), repair(num_tokens=256))
    shares = [
        float((model.get_submodule(f"model.layers.{n}.mlp.up_proj").weight == 0).float().mean())
        for n in range(2)
    ]
    assert shares == [0.0, 0.5]


def test_distill_compares_with_the_model_as_it_was_before_any_step() -> None:
    heard: list[tuple[str, int, int]] = []
    steps = (step("depth", num_blocks=2), repair(lr=1e-9, num_tokens=256))
    apply_recipe(build(CONFIG, seed=0), Recipe(steps=steps), TEXT, lambda *line: heard.append(line))
    rows_BT = TEXT.batch(0, 0, 8, 16)
    expected = divergence(apply(steps[0]), rows_BT[:, :-1])
    assert [line[1:] for line in heard] == [(1, 2), (2, 2)]
    assert heard[0][0] == f"step 2 (distill), loss {expected:.4g}"


def test_distill_when_the_loss_is_no_number_names_rate_and_remedy() -> None:
    words = r"step 1 \(distill\): in training step \d+ of 23 the loss is .* lr=1e\+30. Lower `lr`"
    with pytest.raises(RecipeError, match=words):
        apply(repair(lr=1e30, grad_clip=None))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((step("rtn"), repair()), r"step 2 \(distill\) changes .* step 1 has quantized"),
        (
            (Step(method="rtn", targets=("lm_head",)), repair()),
            r"step 2 \(distill\) changes the weights of `lm_head`",
        ),
        ((repair(seq_len=65),), r"step 1 \(distill\): seq_len=65 exceeds the model's 64 pos"),
        ((repair(num_tokens=100),), r"num_tokens=100 is less than one step .* 8 x 16 = 128"),
        (
            (repair().replace(targets=("*mlp*",)),),
            r"step 1 \(distill\).*Leave `targets` out",
        ),
    ],
)
def test_recipe_when_it_cannot_repair_says_so_before_weights_are_touched(
    steps: tuple[Step, ...], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        predicted_bytes(CONFIG, Recipe(steps=steps))


def test_recipe_when_there_is_too_little_text_to_repair_is_refused() -> None:
    words = r"step 1 \(distill\) trains on 200 sequences of 16 .* has 199 \(3,200 tokens\)"
    with pytest.raises(DataError, match=words):
        apply(repair(num_tokens=3200))


def test_recipe_when_there_is_no_text_to_repair_says_to_give_some() -> None:
    with pytest.raises(RecipeError, match=r"step 1 \(distill\).*Give `calibration`\.$"):
        apply_recipe(build(CONFIG, seed=0), Recipe(steps=(repair(),)))


def test_text_when_batches_are_drawn_gives_every_sequence_once_with_its_targets() -> None:
    batches = [TEXT.batch(7, number, 8, 16) for number in range(24)]
    rows = {tuple(row.tolist()) for batch_BT in batches for row in batch_BT}
    assert len(rows) == 24 * 8
    stream = TEXT.tokens_NT.flatten()
    whole = {tuple(stream[16 * n : 16 * n + 17].tolist()) for n in range(199)}
    assert rows <= whole
    assert torch.equal(TEXT.batch(7, 3, 8, 16), batches[3])
