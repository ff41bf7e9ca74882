import asyncio

import pytest
from transformers import PreTrainedTokenizerFast

from cluster.errors import ConfigError, EngineError, RequestError
from cluster.storage import write_manifest
from jobs.config import DecoderConfig
from jobs.data.tokenizer import load_tokenizer, train_tokenizer
from jobs.models.decoder import build, save
from serving.engines._protocol import Chunk
from serving.messages import (
    ChatPrompt,
    Delta,
    EmbeddingRequest,
    InferenceRequest,
    Refused,
    Sampling,
    Started,
    TextPrompt,
    TokenPrompt,
    Turn,
)
from serving.prompts import PromptEncoder
from serving.replica import EngineReplica, merge


class Stream:
    """Chunks one after another; an exception among them is raised, None waits forever."""

    def __init__(self, *items):
        self._items = list(items)
        self.was_cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self._items:
            raise StopAsyncIteration
        item = self._items.pop(0)
        if isinstance(item, Exception):
            raise item
        if item is None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.was_cancelled = True
                raise
        return item


def chunk(text: str) -> Chunk:
    return Chunk(text, (1,))


def collect(*streams):
    async def run():
        return [item async for batch in merge(dict(enumerate(streams))) for item in batch]

    return asyncio.run(run())


def test_merge_when_streams_end_keeps_the_order_of_each():
    items = collect(Stream(chunk("a"), chunk("b")), Stream(), Stream(chunk("c")))
    assert [c.text for i, c in items if i == 0] == ["a", "b"]
    assert [c.text for i, c in items if i == 2] == ["c"]


def test_merge_when_reader_is_slow_gives_several_at_once():
    async def run():
        return [len(batch) async for batch in merge({0: Stream(*map(chunk, "abcd")), 1: Stream()})]

    assert asyncio.run(run()) == [4]


def test_merge_when_one_stream_fails_cancels_the_others():
    waiting = Stream(None)
    with pytest.raises(EngineError, match="broken"):
        collect(waiting, Stream(EngineError("broken")))
    assert waiting.was_cancelled


def test_merge_when_closed_early_cancels_all():
    streams = [Stream(chunk("a"), None), Stream(None)]

    async def run():
        batches = merge(dict(enumerate(streams)))
        await anext(batches)
        await batches.aclose()

    asyncio.run(run())
    assert [stream.was_cancelled for stream in streams] == [True, True]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> PreTrainedTokenizerFast:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["hello world, hello there"] * 10, 300, directory)
    return load_tokenizer(directory)


def test_encode_when_prompt_is_text_equals_the_tokenizer(tokenizer):
    encoded = PromptEncoder(tokenizer).encode(TextPrompt("hello"))
    assert encoded == tuple(tokenizer.encode("hello"))


def test_encode_when_prompt_is_tokens_keeps_them(tokenizer):
    assert PromptEncoder(tokenizer).encode(TokenPrompt((5, 6))) == (5, 6)


def test_encode_when_prompt_is_a_chat_writes_the_template(tokenizer):
    encoded = PromptEncoder(tokenizer).encode(ChatPrompt((Turn("user", "hello"),)))
    assert tokenizer.decode(list(encoded)) == "<|begin|>hello\n"


def test_encode_when_there_is_no_template_names_the_other_route(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    plain = load_tokenizer(tmp_path)
    plain.chat_template = None
    with pytest.raises(RequestError, match="/v1/completions"):
        PromptEncoder(plain).encode(ChatPrompt((Turn("user", "x"),)))


def test_encode_when_template_refuses_says_why(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    strict = load_tokenizer(tmp_path)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="roles must alternate"):
        PromptEncoder(strict).encode(ChatPrompt((Turn("user", "x"),)))


def test_replica_when_engine_is_unknown_lists_the_right_ones(tmp_path):
    with pytest.raises(ConfigError, match="no engine `nativ`; there are: native"):
        EngineReplica(str(tmp_path), "nativ", {})


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    train_tokenizer(["hello world, hello there"] * 10, 300, directory)
    shape = DecoderConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_layers=1, max_seq_len=32
    )
    save(build(shape, seed=0), directory)
    write_manifest(directory, {"kind": "model"})
    return directory


@pytest.fixture
def replica(directory):
    replica = EngineReplica(str(directory), "native", {"max_slots": 4})
    yield replica
    replica.close()


class Failing:
    """An engine that lives while every sequence of it fails."""

    async def generate(self, request):
        raise EngineError("the model computed values that are not finite.")
        yield


def ask(replica, *prompts, num_choices=1, **sampling):
    async def run():
        request = InferenceRequest(prompts, Sampling(**sampling), num_choices)
        return [event async for batch in replica.generate(request) for event in batch]

    return asyncio.run(run())


def test_generate_when_asked_counts_prompts_once_and_numbers_choices(replica):
    prompts = TokenPrompt((5, 6)), TokenPrompt((7,))
    first, *deltas = ask(replica, *prompts, num_choices=2, max_tokens=3)
    assert first == Started(3)
    assert all(isinstance(delta, Delta) for delta in deltas)
    assert {delta.choice for delta in deltas} == {0, 1, 2, 3}
    assert sum(delta.finish_reason is not None for delta in deltas) == 4


def test_generate_when_seed_is_negative_gives_choices_that_differ(replica):
    events = ask(replica, TokenPrompt((5,)), num_choices=3, seed=-1, max_tokens=20)
    choices = [
        [token for e in events[1:] if e.choice == choice for token in e.token_ids]
        for choice in range(3)
    ]
    assert len({tuple(tokens) for tokens in choices}) == 3


def tokens_of(events, choice: int) -> list[int]:
    return [token for e in events[1:] if e.choice == choice for token in e.token_ids]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 7}])
def test_generate_when_resumed_goes_on_as_if_it_had_never_stopped(replica, sampling):
    prompts = (TokenPrompt((5, 6)),)
    whole = ask(replica, *prompts, num_choices=2, max_tokens=12, **sampling)
    expected = [tokens_of(whole, choice) for choice in range(2)]

    async def resume():
        request = InferenceRequest(
            prompts,
            Sampling(max_tokens=12, **sampling),
            2,
            resumed=(tuple(expected[0][:5]), tuple(expected[1])),
            finished=(1,),
        )
        return [event async for batch in replica.generate(request) for event in batch]

    rest = asyncio.run(resume())
    assert rest[0] == Started(2)
    assert tokens_of(rest, 0) == expected[0][5:]
    assert tokens_of(rest, 1) == []


def test_embed_when_the_model_generates_names_the_other_route(replica):
    refused = asyncio.run(replica.embed(EmbeddingRequest((TextPrompt("hello"),))))
    assert (refused.status, refused.param) == (400, "model")
    assert "/v1/completions" in refused.message


class Recording:
    """An encoder that remembers who asked for what."""

    def __init__(self):
        self.asked = []

    async def embed(self, inputs, tenant=""):
        self.asked.append((inputs, tenant))
        return [[1.0, 0.0] for _ in inputs]


def test_embed_when_a_team_asks_tells_the_engine_which(directory):
    model = EngineReplica(str(directory), "native", {"max_slots": 4})
    try:
        model._embedder = encoder = Recording()
        asked = EmbeddingRequest((TokenPrompt((5, 6)),), team="small")
        embedded = asyncio.run(model.embed(asked))
    finally:
        model.close()
    assert encoder.asked == [([(5, 6)], "small")]
    assert embedded.prompt_tokens == 2


@pytest.mark.parametrize(
    ("bad", "code"),
    [(TokenPrompt((5,) * 33), "context_length_exceeded"), (TokenPrompt((300,)), None)],
)
def test_generate_when_one_prompt_is_wrong_refuses_all(replica, bad, code):
    (refused,) = ask(replica, TokenPrompt((5,)), bad)
    assert isinstance(refused, Refused)
    assert (refused.status, refused.code, refused.param) == (400, code, "prompt")


def test_generate_when_the_model_computes_nonsense_says_that_no_other_replica_would_help(
    directory, caplog
):
    model = EngineReplica(str(directory), "native", {"max_slots": 4})
    try:
        model._generator = Failing()
        (refused,) = ask(model, TokenPrompt((5,)))
    finally:
        model.close()
    assert (refused.status, refused.code) == (500, "generation_failed")
    assert "not finite" not in refused.message
    assert "not finite" in caplog.text


def test_generate_when_engine_stopped_says_so_and_is_not_healthy(replica):
    replica.close()
    (refused,) = ask(replica, TokenPrompt((5,)))
    assert (refused.status, refused.code) == (503, "engine_failed")
    with pytest.raises(EngineError):
        replica.check_health()
