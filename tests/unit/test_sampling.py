import math

import pytest
import torch

from cluster.errors import RequestError
from serving.engines._protocol import GenerateRequest, Grammar, GrammarKind
from serving.engines.native.drawing import draw_sorted
from serving.engines.native.sampling import (
    SamplingRow,
    SamplingState,
    TokenizerInfo,
    likelihood,
    sample,
)

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


# The kernel takes float32, PyTorch's operators the rest.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [512, 500])
def test_sample_when_the_best_tie_far_apart_takes_the_lowest_id(vocab_size, dtype):
    logits = torch.zeros(1, vocab_size, dtype=dtype)
    logits[0, [70, 90, 300, 499]] = 1.0
    assert sample(logits, [SamplingRow()]) == [70]


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


@pytest.mark.parametrize("vocab_size", [640, 1000, 5000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3},
        {"top_k": 300},
        {"top_p": 0.8},
        {"top_p": 0.999},
        {"top_k": 40, "top_p": 0.7},
        {"min_p": 0.1},
        {"min_p": 0.02, "top_p": 0.9},
        {"min_p": 0.02, "top_p": 0.9, "top_k": 30},
    ],
)
def test_sample_for_every_truncation_follows_the_plain_definition(vocab_size, options):
    logits_V = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1)) * 2
    num_draws = 2000
    rows = [
        SamplingRow(temperature=1.3, draw=(n + 0.5) / num_draws, **options)
        for n in range(num_draws)
    ]
    drawn = sample(logits_V.expand(num_draws, -1), rows)
    share_V = torch.tensor(drawn).bincount(minlength=vocab_size) / num_draws
    assert (share_V - plain_probabilities(logits_V, 1.3, **options)).abs().max() < 2 / num_draws


def plain_probabilities(logits_V, temperature, top_k=None, top_p=1.0, min_p=0.0):
    """Return what is drawn with which probability, by sorting everything."""
    probability_V, ids_V = (logits_V.double() / temperature).softmax(-1).sort(descending=True)
    probability_V[probability_V < min_p * probability_V[0]] = 0
    probability_V[top_k or len(logits_V) :] = 0
    before_V = probability_V.cumsum(-1) - probability_V
    probability_V[before_V >= top_p * probability_V.sum()] = 0
    return torch.empty_like(probability_V).scatter(-1, ids_V, probability_V / probability_V.sum())


def test_draw_sorted_when_cut_keeps_the_same_tokens_as_the_draw_of_few():
    logits_V = torch.randn(500, generator=torch.Generator().manual_seed(2))
    rows = [SamplingRow(1.0, 0.7, k, draw=n / 500) for k in (None, 20) for n in range(500)]
    whole = logits_V.softmax(-1).expand(len(rows), -1)
    assert set(draw_sorted(whole, rows)) == set(sample(logits_V.expand(len(rows), -1), rows))


def test_sample_when_tokens_tie_at_the_cut_keeps_the_lowest_ids():
    rows = [SamplingRow(1.0, top_k=3, draw=n / 8) for n in range(8)]
    assert set(sample(torch.zeros(8, 256), rows)) == {0, 1, 2}


@pytest.mark.parametrize("num_threads", [1, 2])
def test_sample_when_batch_is_large_treats_each_row_as_if_alone(num_threads):
    generator = torch.Generator().manual_seed(3)
    logits_NV = torch.randn(33, 4096, generator=generator) * 3
    options = [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 1}]
    rows = [
        SamplingRow(temperature=0.9, draw=n / 33, **options[n % len(options)]) for n in range(33)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    together = sample(logits_NV, rows)
    torch.set_num_threads(before)
    assert together == [sample(logits_NV[n : n + 1], [row])[0] for n, row in enumerate(rows)]


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


def state_of(prompt_tokens=(0, 3), vocab_size=4, **options) -> SamplingState:
    request = GenerateRequest(prompt_tokens=prompt_tokens, **{"temperature": 0.0, **options})
    return SamplingState.create(request, TokenizerInfo(vocab_size))


def edited(state: SamplingState, logits=(1.0, -1.0, 2.0, 3.0)) -> list[float]:
    """Return logits as the state's next row changes them."""
    logits_V = torch.tensor(logits)
    for edit in state.row(0.0).edits:
        edit(logits_V)
    return logits_V.tolist()


def test_row_when_nothing_is_asked_for_has_no_edits_and_needs_no_history():
    state = state_of(temperature=0.5, top_p=0.6, top_k=7, min_p=0.1)
    assert state.is_plain
    assert state.row(0.25) == SamplingRow(0.5, 0.6, 7, 0.25, 0.1)


def test_row_when_tokens_are_biased_adds_to_their_logits():
    assert edited(state_of(logit_bias={1: 5.0, 3: -100.0})) == [1.0, 4.0, 2.0, -97.0]


@pytest.mark.parametrize("bias", [{4: 1.0}, {-1: 1.0}, {0: 100.5}, {0: math.nan}])
def test_create_when_bias_is_out_of_bounds_is_refused(bias):
    with pytest.raises(RequestError, match="logit_bias"):
        state_of(logit_bias=bias)


def test_row_when_presence_and_frequency_count_generated_tokens_only():
    state = state_of(presence_penalty=0.5, frequency_penalty=0.25)
    for token_id in (2, 2, 1):
        state.accept(token_id)
    assert edited(state) == [1.0, -1.75, 1.0, 3.0]


def test_row_when_repetition_is_penalised_counts_the_prompt_too():
    state = state_of(repetition_penalty=2.0)
    state.accept(1)
    assert edited(state) == [0.5, -2.0, 2.0, 1.5]


@pytest.mark.parametrize("penalty", [0.01, 10.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_sample_when_repetition_is_penalised_at_a_bound_stays_finite(penalty, sign):
    largest = sign * torch.finfo(torch.float32).max
    state = state_of((0, 1, 2, 3), repetition_penalty=penalty)
    assert all(map(math.isfinite, edited(state, (largest, largest, largest, largest))))
    assert sample(torch.full((1, 4), largest), [state.row(0.0)]) == [0]


@pytest.mark.parametrize("penalty", [0.0, 1e-30, 0.0099, 10.1, math.nan])
def test_request_when_repetition_penalty_is_out_of_bounds_is_refused(penalty):
    with pytest.raises(ValueError, match="repetition_penalty"):
        GenerateRequest(prompt_tokens=(1,), repetition_penalty=penalty)


def test_rollback_when_tokens_were_accepted_forgets_them():
    state = state_of(presence_penalty=0.5, repetition_penalty=2.0)
    before = edited(state)
    for token_id in (1, 2, 2):
        state.accept(token_id)
    state.rollback(3)
    assert edited(state) == before


def test_create_when_tokens_are_resumed_counts_them():
    state = state_of(presence_penalty=0.5)
    state.accept(2)
    assert edited(state_of(presence_penalty=0.5, resumed_tokens=(2,))) == edited(state)


def test_rows_when_drafted_equal_those_after_accepting_one_by_one():
    state = state_of(frequency_penalty=1.0, temperature=1.0)
    logits = torch.tensor([[1.0, -1.0, 2.0, 3.0]])
    drafted = [sample(logits, [row])[0] for row in state.rows(draws=[0.1, 0.5, 0.9], draft=[2, 3])]
    one_by_one = []
    for draw, token_id in zip([0.1, 0.5, 0.9], [2, 3, 0], strict=True):
        one_by_one += sample(logits, [state.row(draw)])
        state.accept(token_id)
    assert drafted == one_by_one


def test_rows_when_taken_early_do_not_change_with_later_tokens():
    state = state_of(presence_penalty=2.0)
    logits = torch.tensor([[1.0, -1.0, 2.0, 3.0]])
    row = state.row(0.0)
    state.accept(3)
    assert sample(logits, [row]) == [3]
    assert sample(logits, [state.row(0.0)]) == [2]


def test_sample_when_edits_leave_no_token_reports_that_row_only():
    def forbid(logits_V):
        logits_V.fill_(-math.inf)

    logits = torch.stack([LOGITS, LOGITS])
    assert sample(logits, [SamplingRow(edits=(forbid,)), SamplingRow()]) == [None, 1]
    assert logits.equal(torch.stack([LOGITS, LOGITS]))


def test_create_when_grammar_is_asked_for_without_tokenizer_is_refused():
    with pytest.raises(RequestError, match="needs a tokenizer"):
        state_of(grammar=Grammar(kind=GrammarKind.JSON_OBJECT))
