"""Guessing ahead: what is guessed, how far, and that answers stay what they are without it."""

import asyncio
from functools import partial

import pytest
import torch
from engine_fakes import sequence
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import publish

from cluster.errors import ConfigError
from jobs.config import DecoderConfig
from jobs.kernels.block_cache import BlockCache
from jobs.models.decoder import build, save
from serving.engines._protocol import GenerateRequest, Grammar
from serving.engines.native import create, start
from serving.engines.native.blocks import BlockManager
from serving.engines.native.config import EngineConfig
from serving.engines.native.drafting import Drafting, NgramIndex
from serving.engines.native.passes import Piece
from serving.engines.native.speculation import ModelDrafter

SHAPE = DecoderConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=96,
    initializer_range=0.3,
    bos_token_id=0,
    eos_token_id=1,
)
REPEATED = (5, 6, 7, 8, 9) * 5
OPTIONS = {"max_slots": 4, "max_batch_tokens": 16, "block_size": 4}


def test_guess_when_words_occurred_before_gives_what_followed():
    assert NgramIndex().guess([1, 2, 3, 4, 9, 9, 2, 3], 3) == [4, 9, 9]


def test_guess_when_nothing_occurred_before_gives_nothing():
    assert NgramIndex().guess([1, 2, 3, 4], 3) == []
    assert NgramIndex().guess([1], 3) == []


def test_guess_when_the_longer_match_differs_prefers_it():
    tokens = [1, 2, 3, 4, 50, 9, 3, 4, 60, 1, 2, 3, 4]
    assert NgramIndex().guess(tokens, 1) == [50]


def test_guess_when_text_repeats_to_its_end_goes_round():
    assert NgramIndex().guess([1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_guess_when_text_grows_equals_a_guess_over_the_whole(tokens):
    index = NgramIndex()
    for length in range(1, len(tokens) + 1):
        assert index.guess(tokens[:length], 4) == NgramIndex().guess(tokens[:length], 4)


def test_drafting_when_guesses_fail_stops_and_tries_again_less_and_less_often():
    drafting = Drafting(4)
    lengths = []
    for _ in range(12):
        lengths.append(drafting.length)
        drafting.note(drafting.length, 0)
    assert lengths == [4, 2, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0]


def test_drafting_when_guesses_hold_goes_further():
    drafting = Drafting(8)
    drafting.note(8, 1)
    assert drafting.length == 2
    drafting.note(2, 2)
    assert drafting.length == 4


def test_propose_when_a_small_model_guesses_equals_its_own_greedy_tokens():
    model = build(SHAPE, seed=1).eval()
    manager = BlockManager(16, 4)
    cache = BlockCache(SHAPE, 16, 4, torch.float32)
    drafter = ModelDrafter(model, cache, torch.device("cpu"), max_tokens=4)
    each = sequence(0, max_tokens=20, prompt_tokens=(5, 6, 7, 8, 9, 10), drafts=3)
    manager.allocate(each)
    manager.extend(each, 12)
    # It reads four tokens a pass, so it has nothing to say in the first.
    assert drafter.propose([Piece(each, 0, 6, is_last=True, max_drafts=3)]) == [[]]
    (guess,) = drafter.propose([Piece(each, 5, 1, is_last=True, max_drafts=3)])
    tokens = list(each.tokens)
    for _ in range(3):
        with torch.inference_mode():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert guess == tokens[6:]


@pytest.fixture(scope="module")
def model():
    return build(SHAPE, seed=3)


@pytest.fixture(scope="module", params=["ngram", "draft", "itself"])
def guessing(request, model):
    """An engine that guesses: from the text, by another model, or by the model itself."""
    kind = "ngram" if request.param == "ngram" else "draft"
    draft = {"ngram": None, "draft": build(SHAPE.replace(num_layers=1), seed=9), "itself": model}
    speculation = {"kind": kind, "num_tokens": 4, "draft": None if kind == "ngram" else "given"}
    options = EngineConfig(**OPTIONS, speculation=speculation, device="cpu")
    engine = start(model, options, draft=draft[request.param])
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(model):
    engine = start(model, EngineConfig(**OPTIONS, device="cpu"))
    yield engine
    engine.close()


def answers(engine, **options) -> list[list[int]]:
    async def ask(prompt_tokens):
        request = GenerateRequest(
            **{"prompt_tokens": prompt_tokens, "max_tokens": 30, "temperature": 0.0, **options}
        )
        return [token async for chunk in engine.generate(request) for token in chunk.token_ids]

    async def ask_all():
        prompts = [REPEATED, (5, 6, 7), tuple(range(20, 50)), (9, 9, 9), REPEATED[:11]]
        return await asyncio.gather(*map(ask, prompts))

    return asyncio.run(ask_all())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8, "seed": 4},
        {"temperature": 1.5, "seed": 4, "top_p": 0.9, "repetition_penalty": 1.3},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"logit_bias": {7: 4.0}, "ignore_eos": True},
    ],
)
def test_generate_when_guessing_equals_the_answer_without(guessing, plain, options):
    assert answers(guessing, **options) == answers(plain, **options)


def test_generate_when_guessing_reports_equal_logprobs(guessing, plain):
    async def ask(engine):
        request = GenerateRequest(
            prompt_tokens=REPEATED, max_tokens=20, temperature=0.0, num_logprobs=2
        )
        return [token async for chunk in engine.generate(request) for token in chunk.logprobs]

    found, expected = asyncio.run(ask(guessing)), asyncio.run(ask(plain))
    assert [token.token_id for token in found] == [token.token_id for token in expected]
    assert [token.logprob for token in found] == pytest.approx(
        [token.logprob for token in expected], abs=1e-4
    )


def test_generate_when_the_model_guesses_for_itself_accepts_nearly_all(model):
    speculation = {"kind": "draft", "num_tokens": 4, "draft": "given"}
    options = EngineConfig(**OPTIONS, speculation=speculation, device="cpu")
    engine = start(model, options, draft=model)
    answers(engine, ignore_eos=True)
    stats = engine.stats()
    engine.close()
    assert stats.drafted_tokens > 50
    assert stats.accepted_tokens > 0.95 * stats.drafted_tokens
    assert stats.num_ticks < stats.generated_tokens / 2


def test_create_when_guessing_under_a_grammar_keeps_to_it(tmp_path):
    publish(tmp_path, partial(save, build(SHAPE, seed=3), dtype=torch.float32))
    grammar = Grammar(kind="regex", text="(abc ){6}d")
    found = []
    for kind in ("none", "ngram"):
        engine = create(tmp_path, {**OPTIONS, "speculation": {"kind": kind}})
        found.append(answers(engine, grammar=grammar, ignore_eos=True))
        text = _text(engine, grammar)
        engine.close()
        assert text == "abc " * 6 + "d"
    assert found[0] == found[1]


def test_create_when_the_draft_has_another_vocabulary_is_refused(tmp_path):
    for name, vocab_size in (("model", 300), ("draft", 320)):
        model = build(SHAPE.replace(vocab_size=vocab_size), seed=3)
        publish(tmp_path / name, partial(save, model))
    speculation = {"kind": "draft", "draft": str(tmp_path / "draft")}
    with pytest.raises(ConfigError, match="320 tokens, and the model one of 300"):
        create(tmp_path / "model", {"speculation": speculation})


def test_create_when_a_draft_is_named_for_no_drafter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="`draft` names a directory"):
        create(tmp_path, {"speculation": {"kind": "ngram", "draft": "small"}})


def _text(engine, grammar: Grammar) -> str:
    async def ask():
        request = GenerateRequest(prompt_tokens=(5, 6), temperature=0.0, grammar=grammar)
        return "".join([chunk.text async for chunk in engine.generate(request)])

    return asyncio.run(ask())
