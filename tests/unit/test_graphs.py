"""Decode passes that are recorded and replayed: the same answers as operator by operator."""

import asyncio
import itertools
import logging
from dataclasses import dataclass

import pytest
import torch

from jobs.compression.packing import load_model, save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import DecoderConfig, Recipe, Step
from jobs.evaluation.quality import greedy_reference
from jobs.kernels.block_cache import BlockCache
from jobs.kernels.formats import GROUPED
from jobs.models.decoder import Decoder, build
from serving.engines._protocol import EngineInfo, GenerateRequest
from serving.engines.native.answers import Vocabulary
from serving.engines.native.blocks import BlockManager
from serving.engines.native.config import EngineConfig
from serving.engines.native.engine import NativeEngine
from serving.engines.native.graphs import CudaRecorder, DecodeGraphs, GraphLimits, ladder
from serving.engines.native.loading import start
from serving.engines.native.passes import PassLimits
from serving.engines.native.runner import Chunked, Runner, read
from serving.engines.native.sampling import TokenizerInfo
from serving.engines.native.scheduler import Scheduler

SHAPE = DecoderConfig(
    vocab_size=300,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
    initializer_range=0.2,
)
BLOCK_SIZE = 8
MAX_BLOCKS = SHAPE.max_seq_len // BLOCK_SIZE
CPU = torch.device("cpu")
PROMPTS = [tuple(range(place, place + 3 + 4 * place)) for place in range(1, 7)]
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Again:
    """Records nothing: what it gives calls the function, as a graph would start its kernels."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def record(self, function):
        self.num_recorded += 1
        return function


class Refuses:
    def record(self, function):
        raise RuntimeError("operation not permitted when stream is capturing")


@dataclass
class Held:
    """What a recording reads of a sequence."""

    blocks: list[int]


class Session:
    """Sequences in scattered blocks, read by recordings and operator by operator, each with a
    cache of its own."""

    def __init__(self, model: Decoder, recorder, num_sequences: int, device=CPU, dtype=None):
        dtype = dtype or torch.float32
        num_blocks = num_sequences * MAX_BLOCKS
        kinds = {"replayed": False, "plain": None if device == CPU else False}
        self.caches = {
            kind: BlockCache(SHAPE, num_blocks, BLOCK_SIZE, dtype, device, use_kernels=kernels)
            for kind, kernels in kinds.items()
        }
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3))
        self.sequences = [Held(list(x)) for x in order.view(num_sequences, -1).tolist()]
        self.model, self.device = model, device
        self.graphs = DecodeGraphs(
            model,
            self.caches["replayed"],
            GraphLimits(num_sequences, MAX_BLOCKS),
            device,
            recorder,
        )
        self.graphs.prepare()
        self.places = [0] * num_sequences

    @torch.inference_mode()
    def run(self, lengths: dict[int, int], seed: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return h_TC of a pass by recordings, if they take it, and without."""
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for index, length in lengths.items():
            tokens = torch.randint(0, 300, (length,), generator=generator).tolist()
            parts.append(Chunked(self.sequences[index], self.places[index], tokens))
            self.places[index] += length
        replayed_TC = self.graphs.run(parts)
        if replayed_TC is not None:
            replayed_TC = replayed_TC.clone()
        else:
            read(self.model, self.caches["replayed"], parts, self.device)
        return replayed_TC, read(self.model, self.caches["plain"], parts, self.device)


def model_of(tmp_path, scheme: str = "bf16", device="cpu", dtype=torch.float32) -> Decoder:
    options = {"scheme": scheme} | ({"group_size": 64} if scheme in GROUPED else {})
    recipe = Recipe(steps=(Step(method="rtn", options=options),))
    save_compressed(apply_recipe(build(SHAPE, seed=5), recipe), tmp_path)
    return load_model(tmp_path, dtype=dtype, device=device, verify=False).model


@pytest.mark.parametrize("scheme", ["bf16", "w8a8", "fp8", "w4a16"])
def test_replay_when_sequences_come_and_go_equals_operator_by_operator(tmp_path, scheme):
    recorder = Again()
    session = Session(model_of(tmp_path, scheme), recorder, 6)
    for index in range(6):
        session.run({index: 3 + 5 * index}, seed=index)
    for turn in range(14):
        chosen = [index for index in range(6) if (turn + index) % 4]
        replayed_TC, plain_TC = session.run(dict.fromkeys(chosen, 1), seed=100 + turn)
        assert replayed_TC is not None
        # Sums in another order may flip the rounding of an activation to int8, and a step of that
        # moves what follows by a few hundredths.
        tolerance = 5e-2 if scheme == "w8a8" else 2e-3
        torch.testing.assert_close(replayed_TC, plain_TC, atol=tolerance, rtol=tolerance)
        logits = [session.model.head(h_TC) for h_TC in (replayed_TC, plain_TC)]
        assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))
    # One for 1 x 1, and for 4 or 6 rows each number of blocks that the longest sequence has had.
    assert recorder.num_recorded <= 1 + 2 * 3


def test_replay_when_the_pass_is_filled_up_gives_the_bits_of_one_that_is_not(tmp_path):
    model = model_of(tmp_path, "w8a8")
    found = []
    for limits in (GraphLimits(5, 3), GraphLimits(16, MAX_BLOCKS)):
        session = Session(model, Again(), 5)
        session.graphs = DecodeGraphs(model, session.caches["replayed"], limits, CPU, Again())
        for index in range(5):
            session.run({index: 2 + 4 * index}, seed=index)
        found.append([session.run(dict.fromkeys(range(5), 1), seed=9 + n)[0] for n in range(4)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("lengths", [{0: 2}, {0: 1, 1: 2}])
def test_run_when_a_part_has_more_tokens_leaves_the_pass_to_others(tmp_path, lengths):
    recorder = Again()
    replayed_TC, _ = Session(model_of(tmp_path), recorder, 2).run(lengths, seed=0)
    assert replayed_TC is None
    assert recorder.num_recorded == 1  # prepare's


def test_run_when_recording_fails_says_so_once_and_leaves_passes_to_others(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="serving.engines.native.graphs"):
        session = Session(model_of(tmp_path), Refuses(), 2)
        results = [session.run({0: 1, 1: 1}, seed=n)[0] for n in range(3)]
    assert results == [None] * 3
    (record,) = caplog.records
    assert "not permitted when stream is capturing" in record.getMessage()
    assert "RuntimeError: operation not permitted" in session.graphs.failure


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, (1,)), (2, (1, 2)), (5, (1, 2, 3, 4, 5)), (20, (1, 2, 3, 4, 6, 8, 12, 16, 20))],
)
def test_ladder_when_climbed_ends_at_the_largest(largest, sizes):
    assert ladder(largest) == sizes


def test_ladder_when_long_never_steps_by_more_than_half():
    sizes = ladder(1024)
    pairs = list(itertools.pairwise(sizes[1:]))
    assert all(after <= before * 3 // 2 for before, after in pairs)


def answers(engine) -> list[list[int]]:
    async def ask(prompt):
        request = GenerateRequest(prompt_tokens=prompt, max_tokens=20, temperature=0.0)
        return [token async for chunk in engine.generate(request) for token in chunk.token_ids]

    async def ask_all():
        return await asyncio.gather(*map(ask, PROMPTS))

    return asyncio.run(ask_all())


def test_engine_when_decode_passes_are_replayed_answers_like_the_plain_model(tmp_path):
    model, recorder = model_of(tmp_path), Again()
    cache = BlockCache(SHAPE, 4 * MAX_BLOCKS, BLOCK_SIZE, torch.float32, use_kernels=False)
    graphs = DecodeGraphs(model, cache, GraphLimits(4, MAX_BLOCKS), CPU, recorder)
    engine = NativeEngine(
        Runner(model, cache, CPU, replays=graphs),
        Scheduler(PassLimits(4, 16), BlockManager(4 * MAX_BLOCKS, BLOCK_SIZE)),
        EngineInfo("native", 300, 64, 4, 1, 1, {}, {}),
        Vocabulary(TokenizerInfo(300)),
    )
    found = answers(engine)
    engine.close()
    assert found == [greedy_reference(model, prompt, 20) for prompt in PROMPTS]
    assert recorder.num_recorded > 0


@pytest.mark.gpu
@NEEDS_CUDA
def test_engine_when_on_cuda_replays_graphs_and_answers_like_the_plain_model(tmp_path):
    model_of(tmp_path)
    loaded = load_model(tmp_path, device="cuda", verify=False)
    options = {"max_slots": 4, "max_batch_tokens": 16, "max_len": 64, "dtype": "float32"}
    for is_on, decoding in ((True, "CUDA graphs"), (False, "`cuda_graphs` is off")):
        engine = start(loaded, EngineConfig(**options, device="cuda", cuda_graphs=is_on))
        found = answers(engine)
        engine.close()
        assert decoding in engine.info().decoding
        assert found == [greedy_reference(model_of(tmp_path), prompt, 20) for prompt in PROMPTS]


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("scheme", ["bf16", "w8a8", "fp8", "w4a16"])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_graph_when_replayed_equals_operator_by_operator(tmp_path, scheme, cache_dtype):
    device = torch.device("cuda")
    model = model_of(tmp_path, scheme, "cuda", torch.bfloat16)
    sessions = [
        Session(model, recorder, 6, device, cache_dtype)
        for recorder in (CudaRecorder(device), Again())
    ]
    for index in range(6):
        for session in sessions:
            session.run({index: 3 + 5 * index}, seed=index)
    for turn in range(14):
        chosen = [index for index in range(6) if (turn + index) % 4]
        graph, again = (s.run(dict.fromkeys(chosen, 1), seed=100 + turn) for s in sessions)
        assert sessions[0].graphs.failure is None
        # The same kernels in the same order; the other way of attention only to rounding.
        assert torch.equal(graph[0], again[0])
        torch.testing.assert_close(graph[0], graph[1], atol=0.1, rtol=0.1)
