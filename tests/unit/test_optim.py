import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from jobs.config import OptimizerConfig, ScheduleConfig
from jobs.training.optim import build_optimizer, learning_rate, set_learning_rate

STEPS = 50


def _rates(config: ScheduleConfig, steps: int = STEPS) -> list[float]:
    return [learning_rate(step, steps, 0.1, config) for step in range(steps)]


def _reference(make: object, steps: int = STEPS) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make(optimizer)  # type: ignore[operator]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step() if len(rates) < steps else None
    return rates


def test_onecycle_when_compared_with_pytorch_is_equal() -> None:
    config = ScheduleConfig(kind="onecycle", warmup_steps=14, final_lr_ratio=0.02)
    # PyTorch's rising part ends at pct_start * total - 1.
    reference = _reference(
        lambda optimizer: OneCycleLR(
            optimizer,
            max_lr=0.1,
            total_steps=STEPS,
            pct_start=15 / STEPS,
            div_factor=25,
            final_div_factor=0.04 / 0.02,
            cycle_momentum=False,
        )
    )
    assert _rates(config) == pytest.approx(reference, rel=1e-9)


def test_cosine_when_compared_with_pytorch_is_equal() -> None:
    config = ScheduleConfig(kind="cosine", warmup_steps=0, final_lr_ratio=0.1)
    reference = _reference(
        lambda optimizer: CosineAnnealingLR(optimizer, T_max=STEPS - 1, eta_min=0.01)
    )
    assert _rates(config) == pytest.approx(reference, rel=1e-9)


def test_cosine_when_warming_up_rises_in_a_line_to_the_peak() -> None:
    rates = _rates(ScheduleConfig(kind="cosine", warmup_steps=9, final_lr_ratio=0.1))
    assert rates[:10] == pytest.approx([0.01 * (step + 1) for step in range(10)])
    assert max(rates) == rates[9]
    assert rates[-1] == pytest.approx(0.01)


def test_linear_when_warmed_up_falls_in_a_line_to_the_last_rate() -> None:
    rates = _rates(ScheduleConfig(kind="linear", warmup_steps=9, final_lr_ratio=0.1))
    assert rates[:10] == pytest.approx([0.01 * (step + 1) for step in range(10)])
    assert rates[9:] == pytest.approx([0.1 - 0.09 * step / 40 for step in range(41)])


def test_constant_when_warmed_up_stays() -> None:
    rates = _rates(ScheduleConfig(kind="constant", warmup_steps=4))
    assert rates[4:] == [0.1] * 46


@pytest.mark.parametrize("kind", ["cosine", "onecycle", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_rate_when_warmup_is_longer_than_the_run_stays_in_bounds(kind: str, steps: int) -> None:
    config = ScheduleConfig.model_validate({"kind": kind, "warmup_steps": 20})
    rates = _rates(config, steps)
    assert all(0 < rate <= 0.1 + 1e-12 for rate in rates)


def test_optimizer_when_stepping_equals_plain_adamw_and_decays_matrices_only() -> None:
    torch.manual_seed(0)
    ours, plain = nn.Linear(4, 3), nn.Linear(4, 3)
    plain.load_state_dict(ours.state_dict())
    config = OptimizerConfig(lr=0.01, weight_decay=0.3)
    optimizer = build_optimizer(ours, config)
    groups = [
        {"params": [plain.weight], "weight_decay": 0.3},
        {"params": [plain.bias], "weight_decay": 0.0},
    ]
    reference = AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    for _ in range(5):
        x = torch.randn(8, 4)
        for model, stepper in ((ours, optimizer), (plain, reference)):
            stepper.zero_grad()
            model(x).square().mean().backward()
            stepper.step()
    assert torch.allclose(ours.weight, plain.weight, atol=1e-6)
    assert torch.allclose(ours.bias, plain.bias, atol=1e-6)


def test_optimizer_when_just_built_has_its_whole_state() -> None:
    model = nn.Linear(4, 3)
    optimizer = build_optimizer(model, OptimizerConfig())
    assert all(
        optimizer.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for parameter in model.parameters()
    )


def test_setting_the_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(nn.Linear(4, 3), OptimizerConfig())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
