"""What the vLLM engine says in vLLM's own words; it runs where vLLM is installed."""

from functools import partial

import pytest
from tiny_models import publish

from cluster.errors import ConfigError, RequestError
from jobs.compression.packing import save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import DecoderConfig, Recipe, Step
from jobs.models.decoder import build
from serving.engines._protocol import GenerateRequest, Grammar, GrammarKind
from serving.engines.vllm import create

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-vllm` runs this")

from serving.engines.vllm.params import sampling_params


def params(**options):
    request = GenerateRequest(prompt_tokens=(5, 6), **options)
    return sampling_params(request, max_tokens=20, stop_ids={3, 1}, vocab_size=300)


def test_params_when_request_is_plain_leave_text_to_us():
    found = params()
    assert (found.max_tokens, found.top_k, found.stop_token_ids) == (20, 0, [1, 3])
    assert (found.detokenize, found.stop, found.seed) == (False, [], None)


def test_params_when_everything_is_asked_for_carry_it():
    found = params(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
        logit_bias={7: 2.0},
        num_logprobs=3,
    )
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.5, 0.9, 7, 0.1)
    assert (found.presence_penalty, found.frequency_penalty) == (0.2, 0.3)
    assert (found.repetition_penalty, found.logit_bias) == (1.1, {7: 2.0})
    assert found.logprobs == 3


def test_params_when_end_tokens_are_ignored_stop_at_none():
    found = params(ignore_eos=True)
    assert (found.ignore_eos, found.stop_token_ids) == (True, [])


def test_params_when_resumed_ask_for_the_rest_with_other_draws():
    whole, rest = params(seed=5), params(seed=5, resumed_tokens=(7, 8, 9))
    assert rest.max_tokens == 17
    assert None not in (whole.seed, rest.seed)
    assert whole.seed != rest.seed
    assert whole.seed != params(seed=-5).seed


@pytest.mark.parametrize(
    "options",
    [{"presence_penalty": 1.0}, {"grammar": Grammar(kind=GrammarKind.JSON_OBJECT)}],
)
def test_params_when_resumed_with_what_needs_the_past_are_refused(options):
    with pytest.raises(RequestError, match="cannot go on with"):
        params(resumed_tokens=(7,), **options)


def test_create_when_int4_is_asked_for_in_float32_is_refused(tmp_path):
    shape = DecoderConfig(vocab_size=300, hidden_size=128, intermediate_size=256, num_layers=1)
    recipe = Recipe(steps=(Step(method="rtn", options={"scheme": "w4a16"}),))
    publish(tmp_path, partial(save_compressed, apply_recipe(build(shape, seed=4), recipe)))
    with pytest.raises(ConfigError, match="bfloat16"):
        create(tmp_path, {"dtype": "float32"})
