import math

import pytest
import torch

from serving.engines.native.sampling import SamplingRow, likelihood, sample

PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])
LOGITS = PROBABILITIES.log()


def counts(row: dict, num_draws: int = 1000) -> list[float]:
    """Return how often each token is drawn over evenly spaced draws."""
    rows = [SamplingRow(draw=(n + 0.5) / num_draws, **row) for n in range(num_draws)]
    tokens = sample(LOGITS.expand(num_draws, -1), rows)
    return [tokens.count(token) / num_draws for token in range(len(PROBABILITIES))]


def test_sample_when_temperature_is_zero_takes_the_likeliest():
    assert sample(LOGITS[None], [SamplingRow()]) == [1]


def test_sample_when_logits_are_equal_takes_the_lowest_id():
    assert sample(torch.zeros(1, 5), [SamplingRow()]) == [0]


def test_sample_when_temperature_is_one_follows_the_model():
    assert counts({"temperature": 1.0}) == pytest.approx(PROBABILITIES.tolist(), abs=0.002)


def test_sample_when_temperature_is_two_flattens():
    flat = PROBABILITIES.sqrt() / PROBABILITIES.sqrt().sum()
    assert counts({"temperature": 2.0}) == pytest.approx(flat.tolist(), abs=0.002)


@pytest.mark.parametrize("temperature", [1e-300, 1e-7, 1e-5])
def test_sample_when_temperature_is_tiny_is_greedy(temperature):
    assert counts({"temperature": temperature}) == [0, 1, 0, 0]


def test_sample_when_top_k_is_two_keeps_two():
    assert counts({"temperature": 1.0, "top_k": 2}) == pytest.approx(
        [0, 4 / 7, 0, 3 / 7], abs=0.002
    )


def test_sample_when_top_k_exceeds_vocabulary_keeps_all():
    assert counts({"temperature": 1.0, "top_k": 99}) == counts({"temperature": 1.0})


def test_sample_when_top_p_falls_within_a_token_keeps_it():
    assert counts({"temperature": 1.0, "top_p": 0.5}) == pytest.approx(
        [0, 4 / 7, 0, 3 / 7], abs=0.002
    )


def test_sample_when_top_p_is_tiny_keeps_one():
    assert counts({"temperature": 1.0, "top_p": 1e-9}) == [0, 1, 0, 0]


@pytest.mark.parametrize("draw", [0.0, 1.0 - 2**-53])
def test_sample_when_draw_is_extreme_stays_within_what_is_kept(draw):
    row = SamplingRow(temperature=1.0, top_k=2, draw=draw)
    assert sample(LOGITS[None], [row])[0] in (1, 3)


def test_sample_when_rows_differ_treats_each_as_if_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator)
    rows = [
        SamplingRow(),
        SamplingRow(1.0, draw=0.3),
        SamplingRow(0.7, 0.9, 5, draw=0.99),
        SamplingRow(),
        SamplingRow(2.0, 0.5, draw=0.5),
        SamplingRow(1.0, 1.0, 1, draw=0.9),
    ]
    alone = [sample(logits[n : n + 1], [row])[0] for n, row in enumerate(rows)]
    assert sample(logits, rows) == alone


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sample_when_logits_are_not_finite_reports_that_row_only(bad):
    logits = torch.stack([LOGITS, LOGITS, LOGITS])
    logits[1, 2] = bad
    rows = [SamplingRow(), SamplingRow(1.0, draw=0.1), SamplingRow()]
    assert sample(logits, rows) == [1, None, 1]


def test_likelihood_when_asked_for_alternatives_lists_the_best_first():
    likely = likelihood(LOGITS, 2, 3)
    assert likely.logprob == pytest.approx(math.log(0.2))
    assert likely.top_ids == (1, 3, 2)
    assert likely.top_logprobs == pytest.approx([math.log(p) for p in (0.4, 0.3, 0.2)])


def test_likelihood_when_asked_for_none_gives_the_chosen_one_alone():
    assert likelihood(LOGITS, 0, 0).top_ids == ()
