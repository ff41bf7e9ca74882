import math

import numpy as np
import pytest
import torch

from jobs.config import DecoderConfig
from jobs.evaluation.quality import greedy_reference, perplexity_increase, sequence_losses
from jobs.models.decoder import Decoder, build

CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    max_seq_len=32,
    initializer_range=0.3,
)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return build(CONFIG, seed=1)


def _sequences(num: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, size=(num, length))


def test_sequence_losses_when_batched_equal_plain_log_probabilities(model: Decoder) -> None:
    sequences = _sequences(5, 13)
    losses = sequence_losses(model, sequences, batch_size=2)
    with torch.inference_mode():
        for row, loss in zip(sequences, losses, strict=True):
            log_probs = model(torch.tensor(row[None, :-1])).double().log_softmax(-1)[0]
            plain = -log_probs[torch.arange(12), torch.tensor(row[1:])].mean()
            assert loss == pytest.approx(float(plain), abs=1e-6)


def test_sequence_losses_when_logits_come_in_chunks_are_the_same(model: Decoder) -> None:
    sequences = _sequences(3, 13)
    whole = sequence_losses(model, sequences)
    chunked = sequence_losses(model, sequences, logits_at_once=5 * CONFIG.vocab_size)
    assert chunked == pytest.approx(whole, abs=1e-6)


def test_greedy_reference_when_followed_takes_the_most_likely_token(model: Decoder) -> None:
    answer = greedy_reference(model, [1, 2, 3], max_tokens=5)
    assert len(answer) == 5
    for count in range(5):
        logits = model(torch.tensor([[1, 2, 3, *answer[:count]]]))[0, -1]
        assert answer[count] == int(logits.argmax())


def test_greedy_reference_when_a_stop_token_comes_ends_without_it(model: Decoder) -> None:
    answer = greedy_reference(model, [1, 2, 3], max_tokens=5)
    stop = answer[2]
    assert greedy_reference(model, [1, 2, 3], 5, {stop}) == answer[: answer.index(stop)]


def test_greedy_reference_when_positions_run_out_ends(model: Decoder) -> None:
    prompt = [3] * (CONFIG.max_seq_len - 2)
    assert len(greedy_reference(model, prompt, max_tokens=50)) == 2


def test_perplexity_increase_when_losses_are_equal_is_zero() -> None:
    losses = np.linspace(2, 4, 30)
    found = perplexity_increase(losses, losses, samples=200, seed=0)
    assert (found.point, found.lower, found.upper) == (0.0, 0.0, 0.0)


def test_perplexity_increase_when_shifted_is_the_exponential_of_the_shift() -> None:
    losses = np.random.default_rng(0).normal(3, 1, 50)
    found = perplexity_increase(losses, losses + 0.01, samples=200, seed=0)
    assert found.point == pytest.approx(math.expm1(0.01))
    assert found.upper == pytest.approx(found.lower)


def test_perplexity_increase_when_repeated_with_the_seed_is_the_same() -> None:
    generator = np.random.default_rng(0)
    base, candidate = generator.normal(3, 1, 40), generator.normal(3, 1, 40)
    first = perplexity_increase(base, candidate, samples=300, seed=7)
    assert first == perplexity_increase(base, candidate, samples=300, seed=7)
    assert first != perplexity_increase(base, candidate, samples=300, seed=8)
    assert first.lower < first.point < first.upper


def test_perplexity_increase_upper_bound_when_drawn_often_covers_the_truth() -> None:
    # The true mean difference is 0.01; a one-sided 95% bound misses it in about 5% of cases.
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(400):
        base = generator.normal(3.0, 1.0, 64)
        candidate = base + generator.normal(0.01, 0.05, 64)
        upper = perplexity_increase(base, candidate, samples=400, seed=trial).upper
        covered += upper >= math.expm1(0.01)
    assert 0.92 <= covered / 400 <= 0.98


def test_perplexity_increase_when_a_loss_is_not_finite_is_nan() -> None:
    base = np.ones(8)
    found = perplexity_increase(base, np.array([1.0] * 7 + [math.inf]), samples=100, seed=0)
    assert math.isnan(found.point)
    assert math.isnan(found.upper)


def test_perplexity_increase_when_shapes_differ_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="unpaired"):
        perplexity_increase(np.ones(4), np.ones(5), samples=100, seed=0)
