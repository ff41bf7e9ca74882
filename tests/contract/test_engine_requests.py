"""What a request can ask of every engine plug-in; one line per behaviour."""

import asyncio
import json

import pytest
import torch
from engine_plugins import PROMPTS, SHAPE, answer, chunks_of, text_of, tokens_of

from cluster.errors import ContextLengthError, RequestError
from jobs.data.tokenizer import load_tokenizer
from jobs.evaluation.quality import greedy_reference
from serving.engines._protocol import FinishReason, Grammar, GrammarKind
from serving.engines.native.detokenizer import Detokenizer
from serving.engines.native.loading import TokenizerDecoder


def test_generate_when_done_says_why_once_and_last(engine):
    reasons = [chunk.finish_reason for chunk in asyncio.run(chunks_of(engine))]
    assert reasons == [None] * (len(reasons) - 1) + [FinishReason.LENGTH]


def test_generate_when_end_token_comes_stops_without_it(engine, reference):
    prompt = next(
        p
        for p in ((a, b) for a in range(2, 300) for b in range(2, 9))
        if len(greedy_reference(reference, p, 8, {1})) < 8
    )
    expected = greedy_reference(reference, prompt, 8, {1})
    chunks = asyncio.run(chunks_of(engine, prompt))
    assert (tokens_of(chunks), chunks[-1].finish_reason) == (expected, FinishReason.STOP)
    assert len(answer(engine, prompt, ignore_eos=True)) == 8


def test_generate_when_text_is_joined_equals_the_decoded_tokens(engine, directory):
    chunks = asyncio.run(chunks_of(engine, max_tokens=30))
    assert text_of(chunks) == load_tokenizer(directory).decode(tokens_of(chunks))


def test_generate_when_stop_string_comes_cuts_before_it(engine):
    whole = text_of(asyncio.run(chunks_of(engine, max_tokens=30)))
    stop = whole[10:12]
    chunks = asyncio.run(chunks_of(engine, max_tokens=30, stop=(stop,)))
    assert text_of(chunks) == whole[: whole.find(stop)]
    assert chunks[-1].finish_reason is FinishReason.STOP


def test_generate_when_max_tokens_is_unset_fills_the_context(engine):
    assert len(answer(engine, max_tokens=None, ignore_eos=True)) == SHAPE.max_seq_len - 3


def test_generate_when_seeded_repeats_whatever_runs_beside_it(engine):
    options = {"temperature": 1.0, "seed": 11, "max_tokens": 12}
    alone = answer(engine, **options)

    async def among_others():
        others = [chunks_of(engine, p, temperature=1.0) for p in PROMPTS[:6]]
        return (await asyncio.gather(chunks_of(engine, **options), *others))[0]

    assert tokens_of(asyncio.run(among_others())) == alone
    assert answer(engine, **{**options, "seed": 12}) != alone


def test_generate_when_seeds_differ_in_sign_differs(engine):
    options = {"temperature": 2.0, "max_tokens": 20}
    assert answer(engine, **options, seed=-1) != answer(engine, **options, seed=1)


def test_generate_when_unseeded_differs_between_calls(engine):
    options = {"temperature": 2.0, "max_tokens": 20}
    assert answer(engine, **options) != answer(engine, **options)


def test_generate_when_logprobs_are_asked_for_equal_the_model(engine, reference):
    chunks = asyncio.run(chunks_of(engine, max_tokens=1, num_logprobs=3))
    (token,) = chunks[0].logprobs
    with torch.inference_mode():
        expected = reference(torch.tensor([[5, 6, 7]]))[0, -1].log_softmax(-1).topk(3)
    assert [other.token_id for other in token.top] == expected.indices.tolist()
    assert [other.logprob for other in token.top] == pytest.approx(
        expected.values.tolist(), abs=1e-4
    )
    assert (token.token_id, token.logprob) == (token.top[0].token_id, token.top[0].logprob)


def given_text(directory, tokens: list[int]) -> str:
    """Return what a reader has of an answer that goes on after these tokens."""
    detokenizer = Detokenizer(TokenizerDecoder(load_tokenizer(directory)), (5, 6, 7))
    return "".join(map(detokenizer.push, tokens))


def test_generate_when_resumed_goes_on_as_if_it_had_never_stopped(engine, directory):
    options = {"max_tokens": 20, "ignore_eos": True}
    whole = asyncio.run(chunks_of(engine, **options))
    resumed = tuple(tokens_of(whole)[:9])
    rest = asyncio.run(chunks_of(engine, resumed_tokens=resumed, **options))
    assert (*resumed, *tokens_of(rest)) == tuple(tokens_of(whole))
    assert text_of(rest) == text_of(whole)[len(given_text(directory, resumed)) :] != ""
    assert rest[-1].finish_reason is FinishReason.LENGTH


def test_generate_when_resumed_within_a_stop_string_cuts_before_it(engine, directory):
    options = {"max_tokens": 30, "ignore_eos": True}
    whole = asyncio.run(chunks_of(engine, **options))
    text, tokens = text_of(whole), tokens_of(whole)
    ends = [len(given_text(directory, tokens[:n])) for n in range(5, 30)]
    # The last character of one token and the first of the next.
    stop = next(text[at - 1 : at + 1] for at in ends if text.find(text[at - 1 : at + 1]) == at - 1)
    cut = asyncio.run(chunks_of(engine, stop=(stop,), **options))
    *resumed, last = tokens_of(cut)
    asked = {"resumed_tokens": tuple(resumed), "stop": (stop,), **options}
    rest = asyncio.run(chunks_of(engine, **asked))
    assert (tokens_of(rest), text_of(rest)) == ([last], "")
    assert rest[-1].finish_reason is FinishReason.STOP


def test_generate_when_a_token_is_biased_chooses_it(engine):
    assert answer(engine, logit_bias={77: 100.0}, max_tokens=3) == [77] * 3


def test_generate_when_bias_is_of_no_token_is_refused(engine):
    with pytest.raises(RequestError, match="token id 300"):
        answer(engine, logit_bias={300: 1.0})


def test_generate_when_repeating_costs_much_repeats_nothing(engine):
    tokens = answer(engine, presence_penalty=2.0, repetition_penalty=10.0, ignore_eos=True)
    assert len(set(tokens)) == len(tokens)


def test_generate_when_top_k_is_one_is_greedy(engine):
    assert answer(engine, temperature=1.5, top_k=1) == answer(engine)


def test_generate_when_choices_are_given_answers_one_of_them(engine):
    grammar = Grammar(kind=GrammarKind.CHOICE, text='["return path", "def read"]')
    chunks = asyncio.run(chunks_of(engine, grammar=grammar, max_tokens=40))
    assert text_of(chunks) in ("return path", "def read")
    assert chunks[-1].finish_reason is FinishReason.STOP


def test_generate_when_a_schema_is_given_answers_a_document_of_it(engine):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema))
    chunks = asyncio.run(chunks_of(engine, grammar=grammar, max_tokens=60, seed=3, temperature=1))
    assert json.loads(text_of(chunks))["a"] in (1, 2)


@pytest.mark.parametrize(("kind", "text"), [("json_schema", "{"), ("regex", "("), ("choice", "1")])
def test_generate_when_grammar_is_malformed_is_refused(engine, kind, text):
    with pytest.raises(RequestError):
        answer(engine, grammar=Grammar(kind=GrammarKind(kind), text=text))
    assert len(answer(engine, ignore_eos=True)) == 8


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens"), [((5,) * 64, 1), ((5,) * 65, None), ((5,) * 60, 5)]
)
def test_generate_when_context_is_exceeded_is_refused(engine, prompt_tokens, max_tokens):
    with pytest.raises(ContextLengthError, match="64 tokens"):
        answer(engine, prompt_tokens, max_tokens=max_tokens)


@pytest.mark.parametrize("token", [-1, 300])
def test_generate_when_token_is_not_in_the_vocabulary_is_refused(engine, token):
    with pytest.raises(RequestError, match=f"token id {token}"):
        answer(engine, (5, token))


def test_generate_when_resumed_past_its_end_is_refused(engine):
    with pytest.raises(RequestError, match="`resumed_tokens`"):
        answer(engine, max_tokens=2, resumed_tokens=(5, 6, 7))
