"""What every engine plug-in must do, over a tiny published model; one line per behaviour."""

import asyncio
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import serving.engines
from cluster.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    IntegrityError,
    PlacementError,
    RequestError,
)
from cluster.storage import write_manifest
from jobs.compression.packing import load_model, save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import DecoderConfig, Recipe, Step
from jobs.data.tokenizer import load_tokenizer, train_tokenizer
from jobs.evaluation.quality import greedy_reference
from jobs.models.decoder import build, load, save
from jobs.plugins import load_plugin, plugin_names
from serving.engines._protocol import (
    Chunk,
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
)

SHAPE = DecoderConfig(
    vocab_size=300,
    hidden_size=128,  # Heads of 32: the smallest that vLLM computes.
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
    initializer_range=0.3,  # Large, so that no two tokens are nearly as likely.
    bos_token_id=0,
    eos_token_id=1,
)
NAMES = plugin_names(serving.engines)
IS_VLLM_INSTALLED = importlib.util.find_spec("vllm") is not None  # `make test-vllm` has it.
# What makes an engine start soon and compute in float32 here.
OPTIONS = {"vllm": {"dtype": "float32", "enforce_eager": True}}
PROMPTS = [tuple((7 * i + j) % 298 + 2 for j in range(1 + 3 * i)) for i in range(12)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    train_tokenizer(["def read_file(path): return path\n" * 20], 300, directory)
    save(build(SHAPE, seed=3), directory, dtype=torch.float32)
    write_manifest(directory, {"kind": "model"})
    return directory


@pytest.fixture(scope="module")
def reference(directory):
    return load(directory)


class Plugin:
    """An engine plug-in by name, and how a test starts an engine of it."""

    def __init__(self, name):
        self.name = name
        self._module = load_plugin(serving.engines, name, what="engine")

    def create(self, directory, **options):
        return self._module.create(directory, {**OPTIONS.get(self.name, {}), **options})


@pytest.fixture(scope="module", params=[n for n in NAMES if n != "vllm" or IS_VLLM_INSTALLED])
def plugin(request):
    return Plugin(request.param)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A PEFT directory that changes one layer much."""
    directory = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(0)
    name = "base_model.model.model.layers.1.self_attn.o_proj"
    save_file(
        {
            f"{name}.lora_A.weight": torch.randn(4, 128, generator=generator) * 0.1,
            f"{name}.lora_B.weight": torch.randn(128, 4, generator=generator),
        },
        directory / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    config |= {"target_modules": ["o_proj"], "layers_to_transform": [1]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def adapted_reference(directory, adapter):
    """The model with the adapter's product added to its weight."""
    model = load(directory)
    parts = load_file(adapter / "adapter_model.safetensors")
    weight_a, weight_b = (parts[name] for name in sorted(parts))
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight += 8 / 4 * weight_b @ weight_a
    return model


@pytest.fixture(scope="module")
def engine(plugin, directory, adapter):
    engine = plugin.create(
        directory, max_slots=4, max_batch_tokens=16, adapters={"loud": str(adapter)}
    )
    yield engine
    engine.close()


async def chunks_of(engine, prompt_tokens=(5, 6, 7), **options) -> list[Chunk]:
    request = GenerateRequest(
        prompt_tokens=prompt_tokens, **{"max_tokens": 8, "temperature": 0.0, **options}
    )
    return [chunk async for chunk in engine.generate(request)]


def answer(engine, prompt_tokens=(5, 6, 7), **options) -> list[int]:
    return tokens_of(asyncio.run(chunks_of(engine, prompt_tokens, **options)))


def tokens_of(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def regret(model, prompt_tokens, answer_tokens) -> float:
    """Return how far, in deviations of the logits, an answer's worst token is from the best."""
    with torch.inference_mode():
        logits_TV = model(torch.tensor([[*prompt_tokens, *answer_tokens]]))[0]
    logits_TV = logits_TV[len(prompt_tokens) - 1 : -1]
    chosen_T = logits_TV.gather(1, torch.tensor(answer_tokens)[:, None])[:, 0]
    return float(((logits_TV.amax(dim=1) - chosen_T) / logits_TV.std(dim=1)).max())


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_engines_when_listed_are_the_ones_tested_here():
    assert NAMES == ["native", "transformers", "vllm"]


@pytest.mark.skipif(IS_VLLM_INSTALLED, reason="vLLM is installed")
def test_create_when_vllm_is_not_installed_says_what_to_do(directory):
    with pytest.raises(ConfigError, match=r"pip install 'raysmith\[vllm\]'"):
        Plugin("vllm").create(directory)


def test_generate_when_greedy_equals_the_plain_forward_for_every_batch(engine, reference):
    async def ask_all():
        return await asyncio.gather(*(chunks_of(engine, p, max_tokens=20) for p in PROMPTS))

    answers = [tokens_of(chunks) for chunks in asyncio.run(ask_all())]
    assert answers == [greedy_reference(reference, p, 20, {1}) for p in PROMPTS]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # zentorch's first import
@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "w4a16"])
def test_generate_when_model_is_quantized_follows_the_plain_forward(plugin, tmp_path, scheme):
    recipe = Recipe(steps=(Step(method="rtn", options={"scheme": scheme}),))
    train_tokenizer(["def read_file(path): return path\n" * 20], 300, tmp_path)
    save_compressed(apply_recipe(build(SHAPE, seed=4), recipe), tmp_path)
    write_manifest(tmp_path, {"kind": "model"})
    plain = load_model(tmp_path).model
    engine = plugin.create(tmp_path, max_slots=4, max_batch_tokens=16, **_typed(plugin, scheme))

    async def ask_all():
        return await asyncio.gather(*(chunks_of(engine, p, max_tokens=12) for p in PROMPTS))

    answers = [tokens_of(chunks) for chunks in asyncio.run(ask_all())]
    engine.close()
    assert scheme in engine.info().schemes.values()
    if plugin.name == "native":
        assert answers == [greedy_reference(plain, p, 12, {1}) for p in PROMPTS]
    # Others round activations a little differently (a scale of largest / 127.5), so that what is
    # nearly as likely may be chosen; a token at random is 3 deviations from the best.
    assert max(regret(plain, *pair) for pair in zip(PROMPTS, answers, strict=True)) < 0.6


def _typed(plugin, scheme):
    # vLLM's 4-bit product takes bfloat16 alone.
    return {"dtype": "bfloat16"} if (plugin.name, scheme) == ("vllm", "w4a16") else {}


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


def test_generate_when_resumed_goes_on_as_if_it_had_never_stopped(engine):
    options = {"max_tokens": 20, "ignore_eos": True}
    whole = asyncio.run(chunks_of(engine, **options))
    resumed = tuple(tokens_of(whole)[:9])
    rest = asyncio.run(chunks_of(engine, resumed_tokens=resumed, **options))
    assert (*resumed, *tokens_of(rest)) == tuple(tokens_of(whole))
    assert text_of(whole).endswith(text_of(rest))
    assert rest[-1].finish_reason is FinishReason.LENGTH


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


def test_generate_when_an_adapter_is_named_runs_with_it_beside_others(
    engine, reference, adapted_reference
):
    async def ask_all():
        return await asyncio.gather(
            *(chunks_of(engine, p, adapter=name) for p in PROMPTS for name in (None, "loud"))
        )

    answers = [tokens_of(chunks) for chunks in asyncio.run(ask_all())]
    assert answers[::2] == [greedy_reference(reference, p, 8, {1}) for p in PROMPTS]
    assert answers[1::2] == [greedy_reference(adapted_reference, p, 8, {1}) for p in PROMPTS]
    assert answers[::2] != answers[1::2]


def test_generate_when_the_adapter_is_unknown_is_refused(engine):
    with pytest.raises(RequestError, match="no adapter `quiet`; there are: loud"):
        answer(engine, adapter="quiet")


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


def test_generate_when_closed_early_frees_its_slot(engine):
    async def leave_early():
        stream = engine.generate(
            GenerateRequest(prompt_tokens=(5,), temperature=0.0, ignore_eos=True)
        )
        await anext(stream)
        await stream.aclose()
        # The next request runs after the cancellation, in the same order as they were asked.
        return await chunks_of(engine)

    asyncio.run(leave_early())
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_slots) == (0, 0, 4)
    assert stats.generated_tokens > 0


def test_generate_when_resumed_past_its_end_is_refused(engine):
    with pytest.raises(RequestError, match="`resumed_tokens`"):
        answer(engine, max_tokens=2, resumed_tokens=(5, 6, 7))


def test_info_when_asked_describes_the_model(engine):
    info = engine.info()
    assert (info.vocab_size, info.max_len, info.max_slots) == (300, 64, 4)
    assert info.weight_bytes > 0
    assert info.cache_bytes > 0


def test_create_when_option_is_unknown_is_refused(plugin, directory):
    with pytest.raises(ConfigError, match="max_slots"):
        plugin.create(directory, max_slot=3)


def test_create_when_cache_exceeds_memory_is_refused(plugin, tmp_path):
    shape = SHAPE.replace(max_seq_len=2**30)
    train_tokenizer(["some text"], 300, tmp_path)
    save(build(shape, seed=0), tmp_path)
    write_manifest(tmp_path, {"kind": "model"})
    with pytest.raises(PlacementError, match="max_len=1073741824"):
        plugin.create(tmp_path, max_slots=1024, max_len=2**30)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_create_when_a_file_is_damaged_is_refused(plugin, directory, tmp_path, name):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        plugin.create(tmp_path)


def test_close_when_sequences_run_ends_them_and_refuses_new_ones(plugin, directory):
    engine = plugin.create(directory, max_slots=1)

    async def close_while_running():
        running = engine.generate(
            GenerateRequest(prompt_tokens=(5,), temperature=0.0, ignore_eos=True)
        )
        await anext(running)
        # One slot and many whole contexts: they cannot all be done before the engine is closed.
        waiting = [
            asyncio.create_task(chunks_of(engine, max_tokens=None, ignore_eos=True))
            for _ in range(100)
        ]
        await asyncio.sleep(0)
        engine.close()
        outcomes = await asyncio.gather(drain(running), *waiting, return_exceptions=True)
        return [outcome for outcome in outcomes if isinstance(outcome, EngineError)]

    async def drain(stream):
        return [chunk async for chunk in stream]

    failures = asyncio.run(close_while_running())
    assert len(failures) >= 1
    with pytest.raises(EngineError):
        engine.stats()
    with pytest.raises(EngineError):
        answer(engine)
    engine.close()
