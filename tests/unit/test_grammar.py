"""Structured output: what a grammar lets through, where it may end, and which are refused."""

import json

import pytest
import torch

from cluster.errors import RequestError
from jobs.data.tokenizer import load_tokenizer, train_tokenizer
from serving.engines._protocol import GenerateRequest, Grammar, GrammarKind
from serving.engines.native.grammar import MAX_GRAMMAR_CHARACTERS, GrammarCompiler
from serving.engines.native.sampling import SamplingState, TokenizerInfo, sample

VOCAB_SIZE = 330  # More than the tokenizer has: a model's vocabulary is often padded.
END = 1
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(['{"name": "bob", "age": 12}\nyes no maybe' * 20], 300, directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def info(tokenizer):
    return TokenizerInfo(VOCAB_SIZE, GrammarCompiler(tokenizer, VOCAB_SIZE, {END}))


def state_of(info, kind, text="", **options) -> SamplingState:
    grammar = Grammar(kind=kind, text=text if isinstance(text, str) else json.dumps(text))
    request = GenerateRequest(prompt_tokens=(5,), grammar=grammar, **options)
    return SamplingState.create(request, info)


def allowed(state) -> list[int]:
    """Return the tokens that may come next."""
    logits_V = torch.zeros(VOCAB_SIZE)
    for edit in state.row(0.0).edits:
        edit(logits_V)
    return (logits_V == 0).nonzero()[:, 0].tolist()


def answer(info, tokenizer, kind, text="", seed=0, max_tokens=80) -> tuple[str, bool]:
    """Return text sampled from random logits, and whether the grammar or an end token ended it."""
    state = state_of(info, kind, text)
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        logits = torch.randn(1, VOCAB_SIZE, generator=generator)
        logits[0, END] += 3  # So that sampling ends about as early as a model would.
        (token_id,) = sample(logits, [state.row(float(torch.rand(1, generator=generator)))])
        assert token_id is not None
        if token_id == END:
            return tokenizer.decode(tokens), True
        state.accept(token_id)
        tokens.append(token_id)
        if state.is_complete:
            return tokenizer.decode(tokens), True
    return tokenizer.decode(tokens), False


def encode(tokenizer, text) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("seed", range(4))
def test_sample_when_schema_is_given_answers_valid_json(info, tokenizer, seed):
    text, _ = answer(info, tokenizer, GrammarKind.JSON_SCHEMA, SCHEMA, seed, max_tokens=400)
    found = json.loads(text)
    assert set(found) == {"name", "age"}
    assert isinstance(found["age"], int)


def test_sample_when_any_object_is_asked_for_begins_one(info, tokenizer):
    state = state_of(info, GrammarKind.JSON_OBJECT)
    assert all(tokenizer.decode([t]).lstrip().startswith("{") for t in allowed(state))


@pytest.mark.parametrize("seed", range(3))
def test_sample_when_regex_is_given_matches_it_whole(info, tokenizer, seed):
    text, is_ended = answer(info, tokenizer, GrammarKind.REGEX, "[a-c]{2,5}-[0-9]{3}", seed)
    assert is_ended
    head, tail = text.split("-")
    assert set(head) <= set("abc")
    assert 2 <= len(head) <= 5
    assert len(tail) == 3
    assert tail.isdigit()


def test_sample_when_choices_are_given_answers_one_and_then_is_complete(info, tokenizer):
    choices = ["yes", "no", "nope", 'may"be\n', "é"]
    texts = [answer(info, tokenizer, GrammarKind.CHOICE, choices, seed) for seed in range(10)]
    assert all(text in choices and is_ended for text, is_ended in texts)
    assert len({text for text, _ in texts}) > 1


def test_row_when_grammar_may_not_end_forbids_the_end_token(info, tokenizer):
    state = state_of(info, GrammarKind.REGEX, "ab*")
    assert END not in allowed(state)
    state.accept(encode(tokenizer, "a")[0])
    assert END in allowed(state)
    assert not state.is_complete


def test_row_when_the_tokenizer_lacks_an_end_token_uses_the_others(tokenizer):
    info = TokenizerInfo(VOCAB_SIZE, GrammarCompiler(tokenizer, VOCAB_SIZE, {END, 310}))
    state = state_of(info, GrammarKind.REGEX, "a*")
    assert END in allowed(state)
    assert 310 not in allowed(state)


def test_is_complete_when_nothing_can_follow_is_true_without_an_end_token(info, tokenizer):
    state = state_of(info, GrammarKind.REGEX, "no")
    for token_id in encode(tokenizer, "no"):
        assert not state.is_complete
        state.accept(token_id)
    assert state.is_complete
    assert allowed(state) == [END]


def test_rollback_when_grammar_was_complete_goes_on(info, tokenizer):
    state = state_of(info, GrammarKind.REGEX, "nono")
    before = allowed(state)
    tokens = encode(tokenizer, "nono")
    for token_id in tokens:
        state.accept(token_id)
    state.rollback(len(tokens))
    assert (allowed(state), state.is_complete, state.failure) == (before, False, None)


def test_rows_when_draft_breaks_the_grammar_leaves_the_state_as_it_was(info, tokenizer):
    state = state_of(info, GrammarKind.REGEX, "[ab]{3}")
    before = allowed(state)
    a, wrong = encode(tokenizer, "a")[0], encode(tokenizer, "z")[0]
    rows = state.rows([0.1, 0.2, 0.3, 0.4], [a, wrong, a])
    assert len(rows) == 4
    assert (allowed(state), state.failure) == (before, None)
    # Row 1 is that after `a`; what would follow `wrong` is never used, since row 1 cannot give it.
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, wrong] = 50
    assert sample(logits, [rows[1]])[0] != wrong


def test_rows_when_draft_follows_the_grammar_equal_those_one_by_one(info, tokenizer):
    draft = encode(tokenizer, '{"name": "b')
    draws = [n / 20 for n in range(len(draft) + 1)]
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(5))
    state = state_of(info, GrammarKind.JSON_SCHEMA, SCHEMA)
    together = sample(logits.expand(len(draws), -1), state.rows(draws, draft))
    one_by_one = []
    for draw, token_id in zip(draws, [*draft, 0], strict=True):
        one_by_one += sample(logits, [state.row(draw)])
        state.accept(token_id)
    assert together == one_by_one


def test_matcher_when_two_sequences_share_a_grammar_keeps_them_apart(info, tokenizer):
    one, other = (state_of(info, GrammarKind.REGEX, "ab") for _ in range(2))
    one.accept(encode(tokenizer, "a")[0])
    assert allowed(one) != allowed(other)


def test_create_when_resumed_goes_on_in_the_grammar(info, tokenizer):
    tokens = encode(tokenizer, '{"name": "bo')
    state = state_of(info, GrammarKind.JSON_SCHEMA, SCHEMA)
    for token_id in tokens:
        state.accept(token_id)
    resumed = state_of(info, GrammarKind.JSON_SCHEMA, SCHEMA, resumed_tokens=tuple(tokens))
    assert allowed(resumed) == allowed(state)


def test_create_when_resumed_tokens_break_the_grammar_is_refused(info, tokenizer):
    tokens = tuple(encode(tokenizer, "maybe"))
    with pytest.raises(RequestError, match="do not follow"):
        state_of(info, GrammarKind.CHOICE, ["yes"], resumed_tokens=tokens)


@pytest.mark.parametrize(
    ("kind", "text", "named"),
    [
        (GrammarKind.JSON_SCHEMA, "{", "json_schema"),
        (GrammarKind.JSON_SCHEMA, '{"type": "bogus"}', "bogus"),
        (GrammarKind.JSON_SCHEMA, '{"not": {"type": "string"}}', "not"),
        (GrammarKind.JSON_SCHEMA, '{"$ref": "http://127.0.0.1:9/x"}', "127.0.0.1"),
        (GrammarKind.JSON_SCHEMA, "false", "unsatisfiable|Unsatisfiable"),
        (GrammarKind.JSON_SCHEMA, "[]", "json_schema"),
        (GrammarKind.JSON_SCHEMA, "3", "json_schema"),
        (GrammarKind.JSON_SCHEMA, '{"$ref": "#"}', "no answer"),
        (GrammarKind.REGEX, "(a", "regex"),
        (GrammarKind.REGEX, "(?=a)b", "regex"),
        (GrammarKind.CHOICE, "yes", "JSON list"),
        (GrammarKind.CHOICE, "[]", "JSON list"),
        (GrammarKind.CHOICE, '[""]', "not empty"),
        (GrammarKind.CHOICE, "[1]", "JSON list"),
        (GrammarKind.REGEX, "a" * (MAX_GRAMMAR_CHARACTERS + 1), "at most"),
        (GrammarKind.JSON_SCHEMA, '{"a":' * 5000 + "1" + "}" * 5000, "json_schema"),
    ],
)
def test_create_when_grammar_is_wrong_is_refused_by_name(info, kind, text, named):
    with pytest.raises(RequestError, match=named):
        state_of(info, kind, text)


def test_failure_when_grammar_grows_too_complex_is_told_and_nothing_is_sampled(info, tokenizer):
    state = state_of(info, GrammarKind.REGEX, "x(a{1000}){1000}")
    state.accept(encode(tokenizer, "x")[0])
    assert sample(torch.zeros(1, VOCAB_SIZE), [state.row(0.5)]) == [None]
    assert "too complex" in state.failure
